"""LLaMA-MoE: a network cut at random, noisy top-k routers, and much training to follow.

Source: LLaMA-MoE v1, arXiv 2406.16554: equal blocks of neurons, random ones being the paper's best;
the noisy top-k router with the factor E / k; the balance loss; a residual part that is always on.
Two departures: the calibrated factor is measured at the inputs of the dense network, where the
released code runs the converted layers before it, and the load in the balance loss is Shazeer's
(see the router `noisy-top-k`). Ours: what is shared where the partition is not
`importance-by-domain`, the first blocks of any other.

The router starts at random and the paper trains it, and everything else, for billions of tokens:
before any training the model is far worse than its parent.

Shapes: F neurons of the network, D model width, T tokens.
"""

from __future__ import annotations

import dataclasses
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
from moesaic.calibration.stats import CalibrationStats
from moesaic.conversion._active import whole_experts
from moesaic.conversion._layers import Cut, convert_layers, expert_layer
from moesaic.conversion.partition._base import validate_num_experts
from moesaic.conversion.partition._settings import partition_collectors, partition_settings
from moesaic.models.ffn import FFN
from moesaic.nn.layer import LayerConfig, moe_layers
from moesaic.nn.routers.noisy_top_k import NoisyTopK

# Tokens whose outputs are measured, enough for a mean, and at a time.
_TOKENS = 2048
_CHUNK = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class LLaMAMoE:
    """Settings of the conversion; `PRESETS["paper"]` has the paper's.

    Attributes:
        experts: Equal blocks E of every layer, shared ones included; must divide the width of the
            network.
        active: Fraction of the blocks that a token uses, shared ones included: a multiple of
            1 / E.
        shared: Blocks that are always on. With the partition `importance-by-domain` they hold the
            neurons that matter to most domains (the paper's residual variant), else the first
            blocks of the partition.
        partition: Which neurons share a block; a name of `moesaic ls partitions`. `random` is the
            paper's best when much training follows.
        partition_options: Its settings.
        gate: How the router scores: `mlp` (the paper) or `linear`, which starts at zero.
        scale: Factor on the routed experts, whose weights sum to one. `calibrated` (ours as the
            default) makes the routed output of each layer as long, on average, as that of all
            routed experts. `blocks` (the released models) is E / k, so that each of k experts
            weighs about E / k^2: 2 for 2 of 8, but 0.22 for 6 of 8.
        balance_coef: Weight of the balance losses in training, importance and load each; 0.01 is
            the paper's.
        seed: Of the partition and the random routers.
    """

    experts: int = 8
    active: float = 0.5
    shared: int = 0
    partition: str = "random"
    partition_options: Mapping[str, Any] = field(default_factory=dict)
    gate: Literal["mlp", "linear"] = "mlp"
    scale: Literal["blocks", "calibrated"] = "calibrated"
    balance_coef: float = 0.01
    seed: int = 0

    def __post_init__(self) -> None:
        partition_settings(self.partition, self.partition_options)
        if self.experts < 1 or not 0 <= self.shared < self.experts:
            raise InputError(
                "experts must be at least 1 and shared in [0, experts), got "
                f"experts={self.experts} and shared={self.shared}; leave some to the router"
            )
        self.top_k()
        if self.balance_coef < 0:
            raise InputError(
                f"balance_coef must be at least 0, got {self.balance_coef}; 0.01 is the paper's"
            )
        if self.seed < 0:
            raise InputError(f"seed must be at least 0, got {self.seed}")

    @classmethod
    def presets(cls) -> dict[str, LLaMAMoE]:
        """Named settings."""
        return PRESETS

    def top_k(self) -> int:
        """Routed experts per token."""
        return whole_experts(self.active, self.experts, least=self.shared + 1) - self.shared

    def collectors(self) -> tuple[str, ...]:
        """Names of the calibration collectors that these settings need."""
        needs = partition_collectors(self.partition)
        if self.scale == "calibrated":
            needs |= {"inputs"}
        return tuple(sorted(needs))


PRESETS: dict[str, LLaMAMoE] = {
    "default": LLaMAMoE(),
    "paper": LLaMAMoE(experts=8, active=0.25, scale="blocks"),
    "paper-4-of-16": LLaMAMoE(experts=16, active=0.25, scale="blocks"),
}


def convert_llama_moe(
    model: PreTrainedModel,
    stats: CalibrationStats | None,
    config: LLaMAMoE,
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
        The converted model in evaluation mode, and what came out: experts per token, the factor of
        each layer, and that the routers are untrained.

    Raises:
        InputError: Before any work, if the settings do not fit the model or the statistics.
    """
    kept = convert_layers(
        model,
        stats,
        method="llama-moe",
        collectors=config.collectors(),
        describe=partial(_describe, config=config),
        convert=partial(_convert_layer, config=config),
        losses={name: {"coef": config.balance_coef} for name in ("importance", "load")},
        store=store,
        progress=progress,
    )
    scales = [float(tensors["scale"]) for tensors in kept]
    _set_scales(model, scales)
    return model, {
        "router": "random, untrained",
        "top_k": config.top_k(),
        "scale_per_layer": [round(scale, 5) for scale in scales],
    }


def _describe(ffn: FFN, config: LLaMAMoE) -> LayerConfig:
    validate_num_experts(ffn.width, config.experts)
    width = ffn.width // config.experts
    routed = config.experts - config.shared
    return expert_layer(
        ffn,
        num_experts=routed,
        width=width,
        shared_width=config.shared * width,
        router="noisy-top-k",
        router_options={
            "top_k": config.top_k(),
            "gate": config.gate,
            "scale": routed / config.top_k(),
        },
    )


def _convert_layer(cut: Cut, config: LLaMAMoE) -> dict[str, Tensor]:
    """Cut one network and start its router; gives the factor on its routed experts."""
    order_N = cut.partition(
        config.partition,
        partition_settings(config.partition, config.partition_options),
        config.experts,
        config.seed + cut.index,
        num_shared=config.shared,
    )
    cut.fill(order_N)
    cut.fresh_router(config.seed)
    router = cut.moe.router
    assert isinstance(router, NoisyTopK)
    scale = router.scale
    if config.scale == "calibrated":
        scale *= length_ratio(cut, cut.measured["inputs.h_TD"])
    return {"scale": torch.tensor(scale, dtype=torch.float64)}


@torch.no_grad()
def length_ratio(cut: Cut, h_TD: Tensor) -> float:
    """Mean length of what all routed experts give over that of what the router chooses.

    Args:
        cut: A filled layer.
        h_TD: Inputs of the dense network; the residual stream beside it is then the same, so that
            the paper's ratio of residual to output needs no other.
    """
    router, experts = cut.moe.router, cut.moe.experts
    assert router is not None
    assert experts is not None
    # Without noise, as the model will run.
    router.eval()
    dense = chosen = 0.0
    h_TD = h_TD[:: math.ceil(len(h_TD) / _TOKENS)]
    for piece_TD in h_TD.split(_CHUNK):
        h = piece_TD.to(cut.ffn.up_FD)
        dense += float(experts(h, None).float().norm(dim=1).sum())
        chosen += float(experts(h, router(h)).float().norm(dim=1).sum())
    return dense / chosen if chosen > 0 else 1.0


def _set_scales(model: PreTrainedModel, scales: list[float]) -> None:
    """Write the factors where the model runs, and where it is saved."""
    saved = model.config.moesaic["layers"]
    for layer, values, scale in zip(moe_layers(model), saved, scales, strict=True):
        assert isinstance(layer.router, NoisyTopK)
        values["router_options"]["scale"] = layer.router.scale = scale
        layer.config = dataclasses.replace(layer.config, router_options=values["router_options"])
