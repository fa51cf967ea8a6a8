"""DSMoE: a pretrained feed-forward network cut into blocks that each token switches on or off.

Source: DSMoE, arXiv 2502.12455, section 3. Ours, each its own setting: the order of neurons before
the cut (a permutation, which changes nothing), routers fitted to the Grams of block outputs, down
products fitted to the blocks that are on, a linear bypass for what is off, and weights of one
without the count normalisation, with which an open router is the dense model.

Shapes: F neurons of the network, D model width, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moesaic._config import to_plain
from moesaic._errors import InputError
from moesaic._progress import SILENT, Progress
from moesaic.calibration.stats import CalibrationStats
from moesaic.calibration.walk import walk_layers
from moesaic.conversion._layers import Cut, convert_layers, expert_layer
from moesaic.conversion.allocation import allocate
from moesaic.conversion.bypass_fit import fit_bypass
from moesaic.conversion.down_fit import fit_down
from moesaic.conversion.gram_router import (
    FRACTIONS,
    BlockErrors,
    Sample,
    fit_router,
    move_bias,
    rounds,
    token_scale,
)
from moesaic.conversion.partition._base import validate_num_experts
from moesaic.conversion.partition._settings import partition_collectors, partition_settings
from moesaic.conversion.partition._table import PARTITIONS
from moesaic.conversion.threshold_fit import fit_thresholds
from moesaic.models.architectures import dense_architecture
from moesaic.models.ffn import FFN, decoder_layers, dense_ffn_width, read_ffn
from moesaic.nn.experts.thresholded import Thresholded
from moesaic.nn.layer import LayerConfig, MoELayer, moe_layers
from moesaic.nn.routers.sigmoid_threshold import (
    SigmoidThreshold,
    SigmoidThresholdConfig,
    check_rank,
)
from moesaic.nn.shape import layer_shape, layer_shapes

# Tokens by which blocks that are always on are chosen.
_LOUD_TOKENS = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class DSMoE:
    """Settings of the conversion; `PRESETS["paper"]` has the paper's.

    `PRESETS["thresholds"]` loses least at a count of weights, and saves no time on a CPU.

    Attributes:
        experts: Blocks E of every layer; must divide the width of the network. Smaller blocks lose
            less at the same active fraction and are slower to gather.
        shared: Blocks that are always on, without a gate: those that add most to the output on the
            calibration text. They count into `active`.
        partition: Which neurons share a block; a name of `moesaic ls partitions`.
        partition_options: Its settings.
        init: How routers start: `random` (the paper), `open` (all gates on: the dense model) or
            `gram` (fitted to the calibration inputs at the fraction `active`).
        active: Active fraction that the routers are fitted to, in (0, 1].
        allocation: How fitted layers share it: by `sensitivity` (insensitive layers run fewer
            blocks) or `uniform`.
        router: Threshold, estimator, value and normalisation of the gates.
        bypass: Rank of a linear map of the layer's input that every token takes, fitted to what the
            blocks that are off leave out; 0 for none. If not given, a 48th of the layer's width
            where routers are fitted. Its weights count into `active`.
        kept: Part of the weights of a block that is on which a token uses: gates and neurons under
            thresholds, fitted to the calibration inputs, count as zero, so that more blocks can be
            on. 1 is all of them (the paper); none leaves it to `active`. It loses much less at the
            same count of weights, and saves no time: what is left out is a mask on the blocks.
        inputs: Part of the inputs that gate and up read, likewise; none leaves it to `kept`.
        refit: Whether the down products of fitted layers are moved, by least squares, to where what
            is used makes up for what is not. All gates on is then no longer the dense network.
        compensate: Whether a block that is off leaves its mean output over the calibration text,
            as FLAP leaves that of removed neurons: each block gets minus its mean as a bias, the
            layer the sum of all means, which changes nothing with all gates on.
        sparse_coef: Weight of the sparsity loss in training; 1 is the paper's.
        sparse_of: What the sparsity loss sums: `gates` (the paper) or `straight-through`.
        fit_steps: Adam steps of the Gram fit of each layer.
        seed: Of the partition, the random routers and the fit.
    """

    experts: int = 64
    shared: int = 0
    partition: str = "coactivation"
    partition_options: Mapping[str, Any] = field(default_factory=dict)
    init: Literal["random", "open", "gram"] = "gram"
    active: float = 0.7
    allocation: Literal["sensitivity", "uniform"] = "sensitivity"
    router: SigmoidThresholdConfig = field(
        default_factory=lambda: SigmoidThresholdConfig(value="one", normalize="none", bias=True)
    )
    bypass: int | None = None
    kept: float | None = 1.0
    inputs: float | None = 1.0
    refit: bool = True
    compensate: bool = False
    sparse_coef: float = 1.0
    sparse_of: Literal["gates", "straight-through"] = "gates"
    fit_steps: int = 150
    seed: int = 0

    def __post_init__(self) -> None:
        PARTITIONS[self.partition]
        if self.partition_options:
            self.options_of_partition()
        if not 0.0 < self.active <= 1.0:
            raise InputError(f"active must be in (0, 1], got {self.active}; 0.7 keeps 70%")
        if not 0 <= self.shared < self.experts * self.active:
            raise InputError(
                f"shared must be in [0, experts * active = {self.experts * self.active:g}), got "
                f"{self.shared}; lower it"
            )
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
        if self.bypass is not None and (
            self.bypass < 0 or (self.bypass > 0 and self.init != "gram")
        ):
            raise InputError(
                f"bypass must be at least 0, and 0 unless init is 'gram', got {self.bypass} with "
                f"init {self.init!r}"
            )
        if (self.kept != 1.0 or self.inputs != 1.0) and (self.init != "gram" or self.compensate):
            raise InputError(
                "kept and inputs must be 1 unless init is 'gram' and compensate false, got "
                f"{self.kept} and {self.inputs} with init {self.init!r}"
            )
        if self.active == 1.0 and not {self.kept, self.inputs} <= {None, 1.0}:
            raise InputError(
                "kept and inputs must be 1 where active is 1, which leaves nothing out, got "
                f"{self.kept} and {self.inputs}; lower active"
            )
        kept, inputs = self._kept_and_inputs()
        if not 0.0 < inputs <= 1.0 or not _least_kept(inputs) <= kept <= 1.0:
            raise InputError(
                "inputs must be in (0, 1] and kept in [0.2 + 0.4 * inputs, 1], got "
                f"{self.inputs} and {self.kept}; 1 keeps all"
            )
        if self.compensate and self.router.normalize != "none":
            raise InputError(
                "compensate needs router.normalize 'none', got 'count', which would scale the "
                "means of blocks that are on; set it to 'none' or compensate to false"
            )
        if self.seed < 0:
            raise InputError(f"seed must be at least 0, got {self.seed}")

    @classmethod
    def presets(cls) -> dict[str, DSMoE]:
        """Named settings."""
        return PRESETS

    def bypass_rank(self, width: int) -> int:
        """Rank of the bypass of a layer of so many neurons."""
        if self.bypass is not None:
            return self.bypass
        return width // 48 if self.init == "gram" and self.active < 1.0 else 0

    def kept_parts(self, *, gated: bool) -> dict[str, float]:
        """Parts of the inputs, and of a block's gates and neurons, that thresholds are to keep.

        What a gate decides is a guess, so more of the gates are kept than of the neurons.

        Args:
            gated: Whether there are gates.

        Returns:
            Options of thresholded experts; empty where nothing is ever left out.
        """
        if self.active == 1.0 or self.kept == self.inputs == 1.0:
            return {}
        kept, inputs = self._kept_and_inputs()
        if not gated:
            return {"inputs": inputs, "neurons": min(1.0, 2 * kept - inputs)}
        rest = (3 * kept - inputs) / (0.57 * inputs + 0.43)
        gates = min(1.0, 0.57 * rest)
        neurons = min(gates, 3 * kept - inputs * (1 + gates))
        return {"inputs": inputs, "gates": gates, "neurons": neurons}

    def _kept_and_inputs(self) -> tuple[float, float]:
        """By rules of thumb where they are left open: more of a block where more of all is used."""
        kept = self.kept
        if kept is None:
            least = _least_kept(0.5 if self.inputs is None else self.inputs)
            kept = max(0.2 + 0.8 * self.active, least)
        return kept, min(1.0, 1.2 * kept) if self.inputs is None else self.inputs

    def options_of_partition(self) -> Any:
        """Settings of the partition, checked."""
        return partition_settings(self.partition, self.partition_options)

    def collectors(self) -> tuple[str, ...]:
        """Names of the calibration collectors that these settings need."""
        needs = partition_collectors(self.partition)
        if self.init == "gram" and self.active < 1.0:
            needs |= {"inputs", "tokens"}
            if self.allocation == "sensitivity":
                needs.add("sensitivity")
        if self.compensate:
            needs.add("neurons")
        if self.shared:
            needs.add("inputs")
        return tuple(sorted(needs))


def _least_kept(inputs: float) -> float:
    """Below, a block that is on would use little more than what its inputs meet."""
    return round(0.2 + 0.4 * inputs, 6)


PRESETS: dict[str, DSMoE] = {
    "default": DSMoE(),
    "paper": DSMoE(
        experts=8,
        partition="contiguous",
        init="random",
        refit=False,
        router=SigmoidThresholdConfig(),
        sparse_coef=1.0,
    ),
    "thresholds": DSMoE(kept=None, inputs=None),
}


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
    fits = fit_dsmoe(model, stats, config, store=store, progress=progress)
    if not fits:
        return model, {}
    assert stats is not None
    # An interrupted conversion does this part again from the first layer.
    return model, settle(model, fits, stats, config, progress)


def fit_dsmoe(
    model: PreTrainedModel,
    stats: CalibrationStats | None,
    config: DSMoE,
    *,
    store: Path | None = None,
    progress: Progress = SILENT,
) -> list[tuple[float, ...]]:
    """Convert as `convert_dsmoe` does, and leave every router at the fraction it was fitted to.

    Returns:
        Per layer, its error with each of `FRACTIONS` on; none if routers are not fitted.
    """
    kept = convert_layers(
        model,
        stats,
        method="dsmoe",
        collectors=config.collectors(),
        describe=partial(_describe, config=config),
        convert=partial(_convert_layer, config=config),
        losses={"sparsity": {"coef": config.sparse_coef, "of": config.sparse_of}},
        store=store,
        progress=progress,
    )
    return [tuple(tensors["errors"].tolist()) for tensors in kept if tensors]


def settle(
    model: PreTrainedModel,
    fits: list[tuple[float, ...]],
    stats: CalibrationStats,
    config: DSMoE,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Share the budget among the layers, and fit each to its part on what the ones before it give.

    What it writes is the bias of the routers, the thresholds, the bypass and, with `refit`, the
    down products. With these put back, one fitted model can be settled on one budget after the
    other.

    Args:
        model: What `fit_dsmoe` made.
        fits: What it gave.
        stats: Calibration of the dense parent.
        config: Its settings, with the budget.
        progress: Told of every token.

    Returns:
        Per layer, the active fraction and the error that is left there.
    """
    width = dense_ffn_width(model.config)
    layers = moe_layers(model)
    for layer, plain in zip(layers, model.config.moesaic["layers"], strict=True):
        if isinstance(layer.experts, Thresholded):
            _keep_parts(layer.experts, config)
            plain["experts_options"] = layer.experts.kept_options()
    shares = [shape.experts_on(config.active) for shape in layer_shapes(model, width)]
    if config.allocation == "sensitivity":
        shares = allocate(stats.sensitivity, fits, FRACTIONS, sum(shares) / len(shares))
    ids_NS = stats.whole()["tokens.ids_NS"].long()
    left = [
        _settle_layer(layers[visit.index], visit.h_TD, shares[visit.index], config)
        for visit in walk_layers(model, ids_NS, sequential=True, progress=progress, name="settle")
    ]
    if config.refit or any(isinstance(layer.experts, Thresholded) for layer in layers):
        model.config.moesaic["exact"] = False
    return {
        "active_per_layer": [
            round(shape.expected_fraction(shape.num_experts * share), 4)
            for shape, share in zip(layer_shapes(model, width), shares, strict=True)
        ],
        "error_per_layer": [round(error, 5) for error in left],
    }


@torch.no_grad()
def settled_error(
    model: PreTrainedModel,
    index: int,
    stats: CalibrationStats,
    config: DSMoE,
    *,
    fitted: MoELayer | None = None,
) -> float:
    """What one layer alone loses, converted and settled on what reaches it in the dense model.

    Args:
        model: The dense model, which stays as it is.
        index: Of the layer.
        stats: Its calibration.
        config: Settings, whose `init` is `gram`; the layer uses the part `active`.
        fitted: The layer as `fit_dsmoe` made it from the same calibration, to be settled again, in
            place; it is fitted here if not given.

    Returns:
        The error that `settle` gives.
    """
    row = dense_architecture(model.config.model_type)
    ffn = read_ffn(decoder_layers(model)[index], row, getattr(model.config, row.activation))
    measured = stats.layer(index)
    if fitted is None:
        cut = Cut.begin(index, ffn, _describe(ffn, config))
        cut.measured = measured
        _convert_layer(cut, config)
        fitted = cut.moe
    if isinstance(fitted.experts, Thresholded):
        _keep_parts(fitted.experts, config)
    share = layer_shape(fitted, ffn.width).experts_on(config.active)
    h_TD = measured["inputs.h_TD"].to(ffn.up_FD.dtype)
    return _settle_layer(fitted.to(h_TD.device), h_TD, share, config)


def _keep_parts(experts: Thresholded, config: DSMoE) -> None:
    gated = experts.gate_threshold is not None
    experts.keep(**config.kept_parts(gated=gated))


@torch.no_grad()
def _settle_layer(moe: MoELayer, h_TD: Tensor, share: float, config: DSMoE) -> float:
    """Put a share of a layer's blocks on and fit the rest to that; gives the error left."""
    assert isinstance(moe.router, SigmoidThreshold)
    assert moe.experts is not None
    num_neurons = moe.experts.num_experts * moe.experts.width
    sample = Sample.draw(h_TD, num_neurons, config.seed)
    scores_TE = move_bias(moe.router, sample.h_TD, share)
    if isinstance(moe.experts, Thresholded):
        moe.experts.set_thresholds(0.0, 0.0)
    errors = BlockErrors(sample.h_TD, moe.experts, shared=moe.shared, rounded=rounds())
    weights_TE = moe.router.decide(scores_TE).weights_TE()
    train = torch.arange(sample.num_train)
    if isinstance(moe.experts, Thresholded):
        fit_thresholds(moe.experts, sample.h_TD, train, weights_TE[train])
        errors.see(sample.h_TD, moe.experts)
    if config.refit:
        fit_down(moe.experts, errors, train, weights_TE[train])
    added_BD = None
    if moe.bypass is not None:
        missing_BD = errors.missing(train, weights_TE[train])
        fit_bypass(moe.bypass, sample.h_TD[train], missing_BD, errors.scale_T1[train])
        added_BD = moe.bypass(sample.h_TD[sample.held_B].to(h_TD.dtype)).float()
    return errors.error(sample.held_B, weights_TE[sample.held_B], added_BD)


def _describe(ffn: FFN, config: DSMoE) -> LayerConfig:
    validate_num_experts(ffn.width, config.experts)
    dim = ffn.up_FD.shape[1]
    # Of the weights of one neuron.
    neuron = (2 if ffn.gate_FD is None else 3) * dim
    check_rank(config.router.rank, config.experts - config.shared, dim)
    width = ffn.width // config.experts
    shared_width = config.shared * width
    # With the least that routers are fitted to.
    least = shared_width + FRACTIONS[0] * (ffn.width - shared_width)
    room = config.active * ffn.width - least
    if config.init == "gram" and room < -1e-6:
        raise InputError(
            f"shared={config.shared} of {config.experts} blocks leaves less than {FRACTIONS[0]} of "
            f"the others on at active={config.active}; lower it or raise active"
        )
    most = min(dim, int(max(0.0, room) * neuron / (2 * dim)))
    rank = config.bypass_rank(ffn.width)
    if rank > most:
        raise InputError(
            f"bypass must be at most {most} for layers of {dim} x {ffn.width} with active="
            f"{config.active}, got {rank}; lower it or raise active"
        )
    kept = config.kept_parts(gated=ffn.gate_FD is not None)
    return expert_layer(
        ffn,
        prefix="thresholded-" if kept else "",
        experts_options=kept,
        num_experts=config.experts - config.shared,
        width=width,
        shared_width=shared_width,
        output_bias=config.compensate or ffn.down_bias_D is not None,
        expert_bias=config.compensate,
        bypass_rank=rank,
        router="sigmoid-threshold",
        router_options=to_plain(config.router),
    )


def _convert_layer(cut: Cut, config: DSMoE) -> dict[str, Tensor]:
    """Cut one network and start its router; gives the fit of a fitted one."""
    seed = config.seed + cut.index
    options = config.options_of_partition()
    order_F = cut.partition(config.partition, options, config.experts, seed)
    if config.shared:
        order_F = _loudest_first(cut, order_F.view(config.experts, -1), config.shared)
    cut.fill(order_F)
    if config.compensate:
        _compensate(cut)
    errors = _start_router(cut, seed, config)
    return {} if errors is None else {"errors": torch.tensor(errors, dtype=torch.float64)}


def _loudest_first(cut: Cut, order_EF: Tensor, count: int) -> Tensor:
    """Put the blocks that add most, as an error counts them, in front of the others, [E * F]."""
    h_TD = cut.measured["inputs.h_TD"]
    h_TD = h_TD[:: -(-len(h_TD) // _LOUD_TOKENS)].to(cut.ffn.up_FD)
    a_TF, down_DF = cut.ffn.neurons(h_TD).float(), cut.ffn.down_DF.float()
    scale_T1 = token_scale((a_TF @ down_DF.T).square().sum(1))
    outputs = (a_TF[:, order_F] @ down_DF[:, order_F].T for order_F in order_EF)
    energy_E = torch.stack([(o_TD.square() * scale_T1).sum() for o_TD in outputs]).cpu()
    by_energy_E = energy_E.argsort(descending=True, stable=True)
    first, rest = by_energy_E[:count].sort().values, by_energy_E[count:].sort().values
    return order_EF[torch.cat([first, rest])].flatten()


def _compensate(cut: Cut) -> None:
    """Move the mean output of every block from the block to the layer."""
    assert cut.order_N is not None
    assert cut.moe.experts is not None
    assert cut.moe.output_bias is not None
    weights = cut.moe.experts.weights()
    assert weights.down_bias is not None
    routed_N = cut.order_N[cut.moe.config.shared_width :]
    mean_N = cut.measured["neurons.mean_F"][routed_N]
    mean_EF = mean_N.unflatten(0, (weights.num_experts, weights.width)).to(weights.down.device)
    mean_ED = torch.einsum("ef,edf->ed", mean_EF.float(), weights.down.float())
    weights.down_bias.copy_(-mean_ED)
    total_D = mean_ED.sum(0)
    if cut.ffn.down_bias_D is not None:
        total_D = total_D + cut.ffn.down_bias_D.float()
    # Summed in float32: a bias of half precision would swallow small contributions.
    cut.moe.output_bias.copy_(total_D)


def _start_router(cut: Cut, seed: int, config: DSMoE) -> tuple[float, ...] | None:
    """Give a router its first weights; what a fitted one loses with each of `FRACTIONS` on."""
    router, experts = cut.moe.router, cut.moe.experts
    assert isinstance(router, SigmoidThreshold)
    assert experts is not None
    generator = torch.Generator().manual_seed(seed)
    router.weight.copy_(torch.randn(router.weight.shape, generator=generator) * 0.02)
    if router.down is not None:
        drawn_RD = torch.randn(router.down.shape, generator=generator)
        router.down.copy_(drawn_RD * config.router.rank**-0.5)
    if config.init == "random":
        return None
    assert router.bias is not None
    if config.init == "open" or config.active == 1.0:
        # The gate of every token is the same, so all are on whatever the input. A gate that weighs
        # nothing may stay where its gradient is alive; one that weighs must be near one.
        router.weight.zero_()
        router.bias.fill_(4.0 if config.router.value == "one" else 12.0)
        return None
    with torch.enable_grad():
        return fit_router(
            router,
            experts,
            cut.measured["inputs.h_TD"],
            layer_shape(cut.moe, cut.ffn.width).experts_on(config.active),
            shared=cut.moe.shared,
            steps=config.fit_steps,
            seed=seed,
        )
