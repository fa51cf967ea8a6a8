"""A whole MoE layer whose gates let the number of experts vary by token, on each of our paths.

Shapes: T tokens, E experts, F width of one expert, D model width.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moesaic._progress import Progress
from moesaic.evaluation.bench.cell import DENSE, OURS, Method, Methods
from moesaic.evaluation.bench.ffn import (
    FfnCell,
    FfnConfig,
    Use,
    dense_call,
    num_copies,
    run_cells,
)
from moesaic.evaluation.bench.ours import our_layer
from moesaic.models.checkpoint import dtype_of
from moesaic.nn.layer import LayerConfig, MoELayer, record_routing
from moesaic.nn.routers.sigmoid_threshold import SigmoidThreshold
from moesaic.ops.select import Backend

_PATHS: tuple[Backend, ...] = ("grouped", "masked")


def bench_layer(config: FfnConfig, progress: Progress | None = None) -> dict[str, Any]:
    """Measure every combination; the active fraction is the mean over the tokens.

    Args:
        config: What is measured.
        progress: Told of every cell.

    Returns:
        The document, as `bench_ffn` gives it.

    Raises:
        InputError: If the combinations are empty or do not fit into memory.
        RunError: If a path is wrong; nothing is reported then.
    """
    return run_cells("layer", config, _methods, progress)


def _methods(cell: FfnCell, config: FfnConfig) -> tuple[Methods, Use]:
    dtype = dtype_of(config.dtype)
    width = cell.neurons // cell.num_experts
    layer = MoELayer(
        cell.dim,
        LayerConfig(num_experts=cell.num_experts, width=width, router="sigmoid-threshold"),
    )
    router, experts = layer.router, layer.experts
    assert isinstance(router, SigmoidThreshold)
    assert experts is not None
    experts.weights().up.normal_(std=cell.dim**-0.5)
    experts.weights().down.normal_(std=cell.neurons**-0.5)
    layer.to(dtype).eval()
    h_TD = torch.randn(cell.num_tokens, cell.dim).to(dtype)
    router.threshold = _threshold(router(h_TD).scores_TE, cell.num_active / cell.num_experts)
    with record_routing(layer) as routings:
        layer(h_TD)
    active_TE = routings[0].active_TE()
    use = Use(touched=int(active_TE.any(0).sum()), pairs=int(active_TE.sum()))
    wide = _on("reference", copy.deepcopy(layer).float())
    copies = [copy.deepcopy(layer) for _ in range(num_copies(cell, config))]
    expected = wide(h_TD.float())
    found = Methods()
    assert wide.experts is not None
    found.running[DENSE] = Method(
        [dense_call(each.experts.weights(), h_TD) for each in copies if each.experts is not None],
        wide.experts.dense(h_TD.float()),
    )
    found.running[OURS] = Method([_call(our_layer(each), h_TD) for each in copies], expected)
    for path in _PATHS:
        # The copies share the memory of the weights, so only the path differs.
        calls = [_call(_on(path, _shallow(each)), h_TD) for each in copies]
        found.running[f"moesaic {path}"] = Method(calls, expected)
    return found, use


def _threshold(scores_TE: Tensor, active: float) -> float:
    """The threshold that this part of the gates exceeds, as far from two gates as it can be."""
    ordered = scores_TE.flatten().sigmoid().sort().values
    num_off = round((1.0 - active) * ordered.numel())
    return float(ordered[num_off - 1 : num_off + 1].mean()) if num_off else 0.0


def _on(path: Backend, layer: MoELayer) -> MoELayer:
    assert layer.experts is not None
    layer.experts.backend = path
    return layer


def _shallow(layer: MoELayer) -> MoELayer:
    """Copy the modules of a layer but not its parameters."""
    shared: dict[int, Any] = {id(p): p for p in layer.parameters()}
    return copy.deepcopy(layer, shared)


def _call(layer: Callable[[Tensor], Tensor], h_TD: Tensor) -> Callable[[], Tensor]:
    return lambda: layer(h_TD)
