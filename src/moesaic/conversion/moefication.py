"""MoEfication: many small experts of neurons that belong together, and a router fitted to them.

Source: MoEfication, arXiv 2110.01786: equal experts of about 32 neurons, cut by clustering weight
rows or by co-activation; a router fitted for each layer to what every expert's activations sum to;
the k highest experts run unscaled. Its settings are kept: Adam at 0.01, 30 epochs of batches of
512, targets divided by the largest of a batch, nine tenths of the tokens for training and the last
tenth for choosing the epoch.

Ours: the paper's networks have ReLU, whose activations are at least zero and mostly zero; those of
a gated network are neither, so |a| (the same for ReLU) or a^2 is summed. Activations are those of
the true inputs, since scaling these, which only scales ReLU, would change them. The tenth is drawn
at random. The router that knows the true sums is a bound, not a conversion.

Shapes: T tokens, D model width, F neurons, E experts, M neurons of an expert.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, normalize
from transformers import PreTrainedModel

from moesaic._errors import InputError
from moesaic._progress import SILENT, Progress
from moesaic.calibration.collectors import block_neurons
from moesaic.calibration.stats import CalibrationStats
from moesaic.conversion._active import whole_experts
from moesaic.conversion._error import error_results, layer_error
from moesaic.conversion._layers import Cut, convert_layers, expert_layer
from moesaic.conversion.partition._base import validate_num_experts
from moesaic.conversion.partition._settings import partition_collectors, partition_settings
from moesaic.models.ffn import FFN
from moesaic.nn.experts._base import Experts
from moesaic.nn.layer import LayerConfig
from moesaic.nn.routers.mlp_top_k import MlpTopK
from moesaic.nn.routers.nearest_top_k import NearestTopK

_CHUNK = 512
_BATCH = 512
_LEARNING_RATE = 0.01
_HELD = 0.1
# Neurons of one of the paper's experts.
_USUAL_WIDTH = 32

_ROUTERS = {"mlp": "mlp-top-k", "similarity": "nearest-top-k"}


@dataclass(frozen=True, slots=True, kw_only=True)
class MoEfication:
    """Settings of the conversion.

    Attributes:
        experts: Experts E of every layer; must divide the width of the network. None for the
            divisor nearest to a thirty-second of it, the paper's.
        active: Fraction of the experts that a token uses; must be a whole number of them.
        partition: Which neurons share an expert; a name of `moesaic ls partitions`. The paper's are
            `weights` and a co-activation graph.
        partition_options: Its settings.
        router: `mlp` is fitted to the calibration text; `similarity` takes the experts whose mean
            weight row is nearest, which needs no text and loses more.
        target: What the fitted router learns to foresee of each expert: the sum of the `magnitude`
            or of the `square` of its activations. The paper's ReLU is its own magnitude.
        epochs: Passes over the calibration text in the fit; 30 is the paper's.
        seed: Of the partition, the held tokens and the order of the batches.
    """

    experts: int | None = None
    active: float = 0.75
    partition: str = "coactivation"
    partition_options: Mapping[str, Any] = field(default_factory=dict)
    router: Literal["mlp", "similarity"] = "mlp"
    target: Literal["magnitude", "square"] = "magnitude"
    epochs: int = 30
    seed: int = 0

    def __post_init__(self) -> None:
        partition_settings(self.partition, self.partition_options)
        for name, least in (("experts", 1), ("epochs", 1), ("seed", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise InputError(f"{name} must be at least {least}, got {value}")
        # Without a number of experts, which depends on the model, only the range can be checked.
        whole_experts(1.0 if 0.0 < self.active <= 1.0 else self.active, 1)
        if self.experts is not None:
            whole_experts(self.active, self.experts)

    def collectors(self) -> tuple[str, ...]:
        """Names of the calibration collectors that these settings need."""
        needs = partition_collectors(self.partition)
        return tuple(sorted(needs | ({"inputs"} if self.router == "mlp" else set())))


def convert_moefication(
    model: PreTrainedModel,
    stats: CalibrationStats | None,
    config: MoEfication,
    *,
    store: Path | None = None,
    progress: Progress = SILENT,
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Convert a dense model; it is consumed, layer by layer, so that no second copy exists.

    Args:
        model: A dense model of a known architecture.
        stats: Calibration with `config.collectors()`; none if that is empty.
        config: Settings.
        store: Directory for finished layers; an interrupted conversion goes on after them.
        progress: Told of every layer.

    Returns:
        The converted model in evaluation mode and, with a fitted router, per layer:
        `error_per_layer`, the relative squared error on calibration inputs, and `kept_per_layer`,
        the part of the target that the chosen experts hold of held-out tokens.

    Raises:
        InputError: Before any work, if the settings do not fit the model or the statistics.
    """
    kept = convert_layers(
        model,
        stats,
        method="moefication",
        collectors=config.collectors(),
        describe=partial(_describe, config=config),
        convert=partial(_convert_layer, config=config),
        store=store,
        progress=progress,
    )
    results = error_results(kept)
    if results:
        results["kept_per_layer"] = [round(float(tensors["kept"]), 5) for tensors in kept]
    return model, results


def usual_experts(width: int) -> int:
    """The divisor of a width nearest to a thirty-second of it, the larger of two."""
    divisors = [e for e in range(1, width + 1) if width % e == 0]
    return min(divisors, key=lambda e: (abs(e - width / _USUAL_WIDTH), -e))


def mean_unit_rows(rows_ND: Tensor, num_experts: int) -> Tensor:
    """Mean of the rows of each expert, each scaled to unit length first, [E, D] in float32."""
    unit_EMD = normalize(rows_ND.float(), dim=1).unflatten(0, (num_experts, -1))
    mean_ED: Tensor = unit_EMD.mean(1)
    return mean_ED


def _describe(ffn: FFN, config: MoEfication) -> LayerConfig:
    num_experts = config.experts or usual_experts(ffn.width)
    validate_num_experts(ffn.width, num_experts)
    return expert_layer(
        ffn,
        num_experts=num_experts,
        width=ffn.width // num_experts,
        router=_ROUTERS[config.router],
        router_options={"top_k": whole_experts(config.active, num_experts)},
    )


def _convert_layer(cut: Cut, config: MoEfication) -> dict[str, Tensor]:
    """Cut one network and start its router."""
    router, num_experts, seed = cut.moe.router, cut.moe.config.num_experts, config.seed + cut.index
    options = partition_settings(config.partition, config.partition_options)
    order_F = cut.partition(config.partition, options, num_experts, seed)
    cut.fill(order_F)
    # The first matrix: that of the activation.
    rows_FD = cut.ffn.up_FD if cut.ffn.gate_FD is None else cut.ffn.gate_FD
    assert isinstance(router, MlpTopK | NearestTopK)
    router.weight.copy_(mean_unit_rows(rows_FD[order_F], num_experts))
    if isinstance(router, NearestTopK):
        return {}
    assert cut.moe.experts is not None
    h_TD = cut.measured["inputs.h_TD"]
    target_TE = expert_sums(h_TD, cut.moe.experts, config.target)
    with torch.enable_grad():
        kept = fit_router(router, h_TD.float(), target_TE, epochs=config.epochs, seed=seed)
    return {"error": layer_error(cut), "kept": torch.tensor(kept)}


@torch.no_grad()
def expert_sums(h_TD: Tensor, experts: Experts, target: Literal["magnitude", "square"]) -> Tensor:
    """Sum the activations of each expert for each token.

    Args:
        h_TD: Inputs of the layer.
        experts: Its experts.
        target: What of an activation is summed.

    Returns:
        Sums at least zero, [T, E] in float32.
    """
    weights = experts.weights()
    sums = []
    for h in h_TD.split(_CHUNK):
        neurons_TEM = block_neurons(h.to(weights.up.dtype), weights)
        neurons_TEM = neurons_TEM.abs() if target == "magnitude" else neurons_TEM.square()
        sums.append(neurons_TEM.sum(2))
    return torch.cat(sums)


def fit_router(
    router: MlpTopK, h_TD: Tensor, target_TE: Tensor, *, epochs: int, seed: int
) -> float:
    """Train a router, in place, to foresee what every expert's activations sum to.

    Args:
        router: Started with the centres of the experts; the best of all epochs is written to it.
        h_TD: Inputs of the layer, float32.
        target_TE: Sums, at least zero.
        epochs: Passes over the tokens.
        seed: Of the held tokens and the batches.

    Returns:
        Part of the target that the chosen experts hold, mean over the held tokens.
    """
    generator = torch.Generator().manual_seed(seed)
    order_T = torch.randperm(len(h_TD), generator=generator)
    num_held = max(1, round(len(h_TD) * _HELD))
    held_T = order_T[:num_held]
    train_T = order_T[num_held:] if len(order_T) > num_held else held_T
    fitted = copy.deepcopy(router).float()
    optimizer = torch.optim.Adam(fitted.parameters(), lr=_LEARNING_RATE)
    best, best_state = -1.0, fitted.state_dict()
    for _ in range(epochs):
        train_T = train_T[torch.randperm(len(train_T), generator=generator)]
        for batch in train_T.split(_BATCH):
            share_TE = target_TE[batch]
            share_TE = share_TE / share_TE.max().clamp(min=torch.finfo(torch.float32).tiny)
            loss = binary_cross_entropy_with_logits(fitted.scores(h_TD[batch]), share_TE)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        kept = _kept(fitted, h_TD[held_T], target_TE[held_T])
        if kept > best:
            best, best_state = kept, copy.deepcopy(fitted.state_dict())
    router.load_state_dict(best_state)
    return best


@torch.no_grad()
def _kept(router: MlpTopK, h_TD: Tensor, target_TE: Tensor) -> float:
    """Part of the target that the experts chosen for each token hold, mean over tokens."""
    chosen_T = target_TE.gather(1, router(h_TD).ids_TK).sum(1)
    total_T = target_TE.sum(1)
    tiny = torch.finfo(torch.float32).tiny
    return float((chosen_T / total_T.clamp(min=tiny)).mean())
