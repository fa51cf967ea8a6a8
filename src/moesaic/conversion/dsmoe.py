"""DSMoE: a pretrained feed-forward network cut into blocks that each token switches on or off.

Source: DSMoE, arXiv 2502.12455, section 3. Ours, each its own setting: the order of neurons before
the cut (a permutation, which changes nothing), routers fitted to the Grams of block outputs, and
weights of one without the count normalisation, with which an open router is the dense model.

Shapes: F neurons of the network, D model width, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from moesaic._config import build_config, to_plain
from moesaic._errors import InputError
from moesaic._files import atomic_write
from moesaic._progress import SILENT, Progress
from moesaic.calibration.stats import CalibrationStats
from moesaic.conversion.allocation import allocate
from moesaic.conversion.gram_router import FRACTIONS, RouterFit, fit_router
from moesaic.conversion.partition._base import PartitionInput, validate_num_experts
from moesaic.conversion.partition._table import PARTITIONS
from moesaic.models.architectures import ARCHITECTURES, architecture_of
from moesaic.models.ffn import FFN, decoder_layers, fill_experts, put_layer, read_ffn
from moesaic.models.modeling import adopt
from moesaic.nn.layer import LayerConfig, MoELayer, moe_layers
from moesaic.nn.routers.sigmoid_threshold import SigmoidThreshold, SigmoidThresholdConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class DSMoE:
    """Settings of the conversion; `PRESETS["paper"]` has the paper's.

    Attributes:
        experts: Blocks E of every layer; must divide the width of the network. Smaller blocks lose
            less at the same active fraction and are slower to gather.
        partition: Which neurons share a block; a name of `moesaic ls partitions`.
        partition_options: Its settings.
        init: How routers start: `random` (the paper), `open` (all gates on: the dense model) or
            `gram` (fitted to the calibration inputs at the fraction `active`).
        active: Active fraction that the routers are fitted to, in (0, 1].
        allocation: How fitted layers share it: by `sensitivity` (insensitive layers run fewer
            blocks) or `uniform`.
        router: Threshold, estimator, value and normalisation of the gates.
        sparse_coef: Weight of the sparsity loss in training; 1 is the paper's.
        sparse_of: What the sparsity loss sums: `gates` (the paper) or `straight-through`.
        fit_steps: Adam steps of the Gram fit of each layer.
        seed: Of the partition, the random routers and the fit.
    """

    experts: int = 64
    partition: str = "coactivation"
    partition_options: Mapping[str, Any] = field(default_factory=dict)
    init: Literal["random", "open", "gram"] = "gram"
    active: float = 0.7
    allocation: Literal["sensitivity", "uniform"] = "sensitivity"
    router: SigmoidThresholdConfig = field(
        default_factory=lambda: SigmoidThresholdConfig(value="one", normalize="none", bias=True)
    )
    sparse_coef: float = 1.0
    sparse_of: Literal["gates", "straight-through"] = "gates"
    fit_steps: int = 300
    seed: int = 0

    def __post_init__(self) -> None:
        PARTITIONS[self.partition]
        if self.partition_options:
            self.options_of_partition()
        if not 0.0 < self.active <= 1.0:
            raise InputError(f"active must be in (0, 1], got {self.active}; 0.7 keeps 70%")
        if self.sparse_coef < 0 or self.fit_steps < 1:
            raise InputError(
                f"sparse_coef must be at least 0 and fit_steps at least 1, got {self.sparse_coef} "
                f"and {self.fit_steps}"
            )
        if self.init != "random" and not self.router.bias:
            raise InputError(f"init {self.init!r} needs router.bias; set it, or use init 'random'")
        if self.init == "gram" and self.router.threshold == 0:
            raise InputError("init 'gram' needs a router.threshold above 0, got 0; 0.5 is usual")
        if self.init == "gram" and self.active < FRACTIONS[0]:
            raise InputError(
                f"init 'gram' needs active of at least {FRACTIONS[0]}, got {self.active}; raise it "
                "or use init 'open'"
            )
        if self.seed < 0:
            raise InputError(f"seed must be at least 0, got {self.seed}")

    @classmethod
    def presets(cls) -> dict[str, DSMoE]:
        """Named settings."""
        return PRESETS

    def options_of_partition(self) -> Any:
        """Settings of the partition, checked."""
        return build_config(
            PARTITIONS.load_config(self.partition),
            self.partition_options,
            where=f"partition {self.partition}",
        )

    def collectors(self) -> tuple[str, ...]:
        """Names of the calibration collectors that these settings need."""
        needs = {
            ability.removeprefix("needs:")
            for ability in PARTITIONS[self.partition].abilities
            if ability.startswith("needs:") and ability != "needs:weights"
        }
        if self.init == "gram" and self.active < 1.0:
            needs.add("inputs")
            if self.allocation == "sensitivity":
                needs.add("sensitivity")
        return tuple(sorted(needs))


PRESETS: dict[str, DSMoE] = {
    "default": DSMoE(),
    "paper": DSMoE(
        experts=8,
        partition="contiguous",
        init="random",
        router=SigmoidThresholdConfig(),
        sparse_coef=1.0,
    ),
}


@torch.no_grad()
def convert_dsmoe(
    model: PreTrainedModel,
    stats: CalibrationStats | None,
    config: DSMoE,
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
        The converted model in evaluation mode, and what was measured: per layer, the active
        fraction that a fitted router was moved to and its relative error there.

    Raises:
        InputError: Before any work, if the settings do not fit the model or the statistics.
    """
    row = architecture_of(model.config.model_type)
    if model.config.model_type not in ARCHITECTURES:
        raise InputError("the model is converted already; give its dense parent")
    layers = decoder_layers(model)
    activation = getattr(model.config, row.activation)
    for layer in layers:
        validate_num_experts(read_ffn(layer, row, activation).width, config.experts)
    if needed := config.collectors():
        if stats is None:
            raise InputError(f"dsmoe with these settings needs calibration of {', '.join(needed)}")
        stats.require(*needed, by="dsmoe", num_layers=len(layers))

    dim = model.config.hidden_size
    plain_layers: list[Any] = []
    adopt(
        model,
        {
            "layers": plain_layers,
            "losses": {"sparsity": {"coef": config.sparse_coef, "of": config.sparse_of}},
            "dense_width": read_ffn(layers[0], row, activation).width,
        },
    )
    fits: list[RouterFit] = []
    with progress.stage("convert", len(layers), "layers") as stage:
        for index, layer in enumerate(layers):
            ffn = read_ffn(layer, row, activation)
            spec = _layer_config(ffn, config, gated=row.gated)
            moe = MoELayer(dim, spec).to(ffn.up_FD.dtype)
            fit = _convert_layer(moe, ffn, stats, index, config, store)
            put_layer(layer, row, moe.to(ffn.up_FD.device).eval())
            plain_layers.append(to_plain(spec))
            if fit is not None:
                fits.append(fit)
            stage.advance()
    model.config.moesaic["layers"] = plain_layers
    return model.eval(), _share_budget(model, fits, stats, config) if fits else {}


def _share_budget(
    model: PreTrainedModel, fits: list[RouterFit], stats: CalibrationStats | None, config: DSMoE
) -> dict[str, Any]:
    """Move every fitted router to its layer's part of the budget."""
    assert stats is not None
    actives = [fit.active for fit in fits]
    if config.allocation == "sensitivity":
        errors = [fit.errors for fit in fits]
        actives = allocate(stats.sensitivity, errors, FRACTIONS, config.active)
        for layer, fit, active in zip(moe_layers(model), fits, actives, strict=True):
            assert isinstance(layer.router, SigmoidThreshold)
            assert layer.router.bias is not None
            layer.router.bias.sub_(float(np.interp(active, FRACTIONS, fit.shifts)))
    return {
        "active_per_layer": [round(active, 4) for active in actives],
        "error_per_layer": [
            round(float(np.interp(active, FRACTIONS, fit.errors)), 5)
            for active, fit in zip(actives, fits, strict=True)
        ],
    }


def _layer_config(ffn: FFN, config: DSMoE, *, gated: bool) -> LayerConfig:
    return LayerConfig(
        num_experts=config.experts,
        width=ffn.width // config.experts,
        output_bias=ffn.down_bias_D is not None,
        router="sigmoid-threshold",
        router_options=to_plain(config.router),
        experts="gated" if gated else "plain",
        activation=ffn.activation,
        bias=ffn.up_bias_F is not None,
    )


def _convert_layer(
    moe: MoELayer,
    ffn: FFN,
    stats: CalibrationStats | None,
    index: int,
    config: DSMoE,
    store: Path | None,
) -> RouterFit | None:
    """Fill one layer from its network, or from what an interrupted run left."""
    router, experts = moe.router, moe.experts
    assert isinstance(router, SigmoidThreshold)
    assert experts is not None
    file = None if store is None else store / f"layer_{index:03d}.safetensors"
    if file is not None and file.is_file():
        saved = load_file(file)
        fill_experts(moe, ffn.keep(saved["permutation_F"]))
        router.weight.copy_(saved["weight"])
        if router.bias is not None:
            router.bias.copy_(saved["bias"])
        if "active" not in saved:
            return None
        return RouterFit(
            float(saved["active"]), tuple(saved["shifts"].tolist()), tuple(saved["errors"].tolist())
        )

    measured = stats.layer(index) if stats is not None and config.collectors() else {}
    neurons = {
        name.removeprefix("neurons."): value
        for name, value in measured.items()
        if name.startswith("neurons.")
    }
    source = PartitionInput(
        num_experts=config.experts,
        num_neurons=ffn.width,
        up_FD=ffn.up_FD,
        gate_FD=ffn.gate_FD,
        stats=neurons,
        seed=config.seed + index,
    )
    permutation_F: Tensor = PARTITIONS.load(config.partition)(source, config.options_of_partition())
    fill_experts(moe, ffn.keep(permutation_F))
    fit = _start_router(router, moe, measured, index, config)
    if file is not None:
        tensors = {
            "permutation_F": permutation_F,
            "weight": router.weight.detach(),
        }
        if fit is not None:
            for name in ("active", "shifts", "errors"):
                tensors[name] = torch.tensor(getattr(fit, name), dtype=torch.float64)
        if router.bias is not None:
            tensors["bias"] = router.bias.detach()
        with atomic_write(file) as temporary:
            save_file(tensors, temporary)
    return fit


def _start_router(
    router: SigmoidThreshold,
    moe: MoELayer,
    measured: Mapping[str, Tensor],
    index: int,
    config: DSMoE,
) -> RouterFit | None:
    """Give a router its first weights."""
    generator = torch.Generator().manual_seed(config.seed + index)
    router.weight.copy_(torch.randn(router.weight.shape, generator=generator) * 0.02)
    if config.init == "random":
        return None
    assert router.bias is not None
    if config.init == "open" or config.active == 1.0:
        # The gate of every token is the same, so all are on whatever the input. A gate that weighs
        # nothing may stay where its gradient is alive; one that weighs must be near one.
        router.weight.zero_()
        router.bias.fill_(4.0 if config.router.value == "one" else 12.0)
        return None
    assert moe.experts is not None
    with torch.enable_grad():
        return fit_router(
            router,
            moe.experts,
            measured["inputs.h_TD"],
            config.active,
            steps=config.fit_steps,
            seed=config.seed + index,
        )
