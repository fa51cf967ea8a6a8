"""Sparse upcycling: every expert starts as a copy of the whole network.

Source: Sparse Upcycling, arXiv 2212.05055: copies of the network, a random router, softmax and then
top-k, training of everything. With weights that sum to one the first model is the dense one. Ours:
every layer is upcycled, where the paper takes every other one; and copies of a network that FLAP
(arXiv 2312.11983) pruned first, for a budget below that of the dense model.

Copies that differ a little, and a router that starts dense, are EvoMoE, arXiv 2112.14397: it trains
one expert first, copies it, masks random weights of every copy, which then train on from zero, and
lets a gate go from all experts to one. The part that it masks is not known to us.

Copies are not parts: a token that uses k whole copies does k times the work of the dense network,
so `active` is k, and only pruned copies come down to a fraction. All experts on is not the dense
model, so the converted model cannot be its own teacher.

Shapes: F neurons of the network, W neurons of a copy, E copies.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moesaic._errors import InputError
from moesaic._progress import SILENT, Progress
from moesaic.calibration.fluctuation import fluctuation, mean_output
from moesaic.calibration.stats import CalibrationStats
from moesaic.conversion._layers import Cut, convert_layers, expert_layer
from moesaic.models.ffn import FFN
from moesaic.nn.layer import LayerConfig, MoELayer, moe_layers


@dataclass(frozen=True, slots=True, kw_only=True)
class SparseUpcycling:
    """Settings of the conversion.

    Attributes:
        copies: Experts E of every layer, each a copy; memory grows by as much.
        top_k: Copies that a token uses.
        active: Weights of the feed-forward network that a token uses, over those of the dense one,
            in (0, top_k]. At top_k (the paper) copies are whole and a token does top_k times the
            dense work. Below, the network is pruned to active / top_k of its width first and
            copied then.
        renormalize: Whether the weights of the chosen copies sum to one. Without it (the paper's
            language models) the output starts smaller than the dense one.
        router: `topk-softmax`, or `dense-to-sparse`, which needs `top_k` 1 and ends there.
        router_options: More settings of that router.
        diversify: What makes copies differ at first: `mask` sets random weights of each copy to
            zero, `noise` adds normal numbers, `none` leaves them alike.
        amount: Part of the weights that are masked, or the noise over the root mean square of the
            weights.
        balance_coef: Weight of the load balance loss in training; 0.01 is usual.
        seed: Of the random routers, and of what makes copies differ.
    """

    copies: int = 8
    top_k: int = 2
    active: float = 2.0
    renormalize: bool = True
    router: Literal["topk-softmax", "dense-to-sparse"] = "topk-softmax"
    router_options: Mapping[str, Any] = field(default_factory=dict)
    diversify: Literal["none", "mask", "noise"] = "none"
    amount: float = 0.1
    balance_coef: float = 0.01
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.top_k <= self.copies:
            raise InputError(
                f"top_k must be in [1, copies={self.copies}], got {self.top_k}; 2 is usual"
            )
        if not 0.0 < self.active <= self.top_k:
            raise InputError(
                f"active must be in (0, top_k={self.top_k}], got {self.active}; at top_k copies "
                "are whole"
            )
        if self.router != "topk-softmax" and self.top_k != 1:
            raise InputError(f"top_k must be 1 with router {self.router}, got {self.top_k}; set 1")
        if not 0.0 < self.amount < 1.0:
            raise InputError(f"amount must be in (0, 1), got {self.amount}; 0.1 is usual")
        if self.balance_coef < 0 or self.seed < 0:
            raise InputError(
                f"balance_coef and seed must be at least 0, got {self.balance_coef} and {self.seed}"
            )

    def collectors(self) -> tuple[str, ...]:
        """Names of the calibration collectors that these settings need."""
        return ("neurons",) if self.active < self.top_k else ()


def convert_sparse_upcycling(
    model: PreTrainedModel,
    stats: CalibrationStats | None,
    config: SparseUpcycling,
    *,
    store: Path | None = None,
    progress: Progress = SILENT,
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Convert a dense model; it is consumed, layer by layer, and grows as it is.

    Args:
        model: A dense model of a known architecture.
        stats: Calibration with `config.collectors()`; none if copies are whole.
        config: Settings.
        store: Directory for finished layers; an interrupted conversion goes on after them.
        progress: Told of every layer.

    Returns:
        The converted model in evaluation mode, and the neurons of a copy in each layer.

    Raises:
        InputError: Before any work, if the settings do not fit the model or the statistics.
    """
    convert_layers(
        model,
        stats,
        method="sparse-upcycling",
        collectors=config.collectors(),
        describe=partial(_describe, config=config),
        convert=partial(_convert_layer, config=config),
        losses={"load-balance": {"coef": config.balance_coef}},
        store=store,
        progress=progress,
    )
    for index, layer in enumerate(moe_layers(model)):
        # All at once at the end: what an interrupted conversion keeps are the copies.
        _diversify(layer, config, index)
    if config.diversify == "mask":
        # These train on from zero, where weights that pruning took stay there.
        model.config.moesaic["zeros_train"] = True
    return model, {
        "router": "random, untrained",
        "copy_widths": [layer.config.width for layer in moe_layers(model)],
    }


def copy_width(config: SparseUpcycling, dense_width: int) -> int:
    """Neurons of one copy.

    Raises:
        InputError: If no whole number gives the active fraction; names the nearest fractions.
    """
    exact = config.active * dense_width / config.top_k
    if exact >= 1 and abs(exact - round(exact)) < 1e-6 * dense_width:
        return round(exact)
    nearest = {max(1, math.floor(exact)), max(1, math.ceil(exact))}
    works = [f"{width * config.top_k / dense_width:.6g}" for width in sorted(nearest)]
    raise InputError(
        f"active={config.active} leaves copies of {exact:.6g} of {dense_width} neurons; the "
        f"nearest that works is {' or '.join(works)}"
    )


@torch.no_grad()
def _diversify(layer: MoELayer, config: SparseUpcycling, index: int) -> None:
    """Make the copies of a layer differ, each in its own way."""
    if config.diversify == "none":
        return
    assert layer.experts is not None
    draw = torch.Generator().manual_seed(config.seed * 10_007 + index)
    weights = layer.experts.weights()
    for tensor in (weights.up, weights.down):
        if config.diversify == "mask":
            gone = torch.rand(tensor.shape, generator=draw) < config.amount
            tensor.masked_fill_(gone.to(tensor.device), 0.0)
        else:
            noise = torch.randn(tensor.shape, generator=draw).to(tensor)
            tensor.add_(noise * tensor.float().square().mean().sqrt() * config.amount)


def _describe(ffn: FFN, config: SparseUpcycling) -> LayerConfig:
    width = copy_width(config, ffn.width)
    options: dict[str, Any] = dict(config.router_options)
    if config.router == "topk-softmax":
        options = {"top_k": config.top_k, "renormalize": config.renormalize, **options}
    return expert_layer(
        ffn,
        num_experts=config.copies,
        width=width,
        router=config.router,
        router_options=options,
        output_bias=ffn.down_bias_D is not None or width < ffn.width,
    )


def _convert_layer(cut: Cut, config: SparseUpcycling) -> Mapping[str, Tensor]:
    """Fill every expert with the network, or with what pruning leaves of it."""
    ffn, width = cut.ffn, cut.moe.config.width
    if width == ffn.width:
        cut.fill(torch.arange(width).repeat(config.copies))
    else:
        score_F = fluctuation(cut.measured["neurons.variance_F"], ffn.down_DF)
        order_F = score_F.sort(descending=True, stable=True).indices
        cut.fill(order_F[:width].sort().values.repeat(config.copies))
        assert cut.moe.output_bias is not None
        bias_D = mean_output(ffn, cut.measured["neurons.mean_F"], order_F[width:])
        cut.moe.output_bias.copy_(bias_D)
    cut.fresh_router(config.seed)
    return {}
