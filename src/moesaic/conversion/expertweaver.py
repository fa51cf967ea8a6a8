"""ExpertWeaver-style: consistently active neurons are shared, in each layer as many as it has.

Source: ExpertWeaver, arXiv 2602.15521, from its abstract; neither its code nor its full text was at
hand. Known from the abstract: no training; neurons are split by the activation patterns of the gate
into universal ones, consistently activated, for a shared expert, and specialised ones, dynamically
activated, for routed experts; each layer has its own configuration. Known from descriptions of the
paper: the router is built from the gate weights, and the text of calibration has several tasks.

Our reading, which may differ from the paper's: a neuron is active for a token when its value
|act(gate) up| is among the token's largest; segments of the calibration text stand for tasks; a
neuron is universal when the coefficient of variation of its activity over the segments is low, by
one bound for all layers, so that a layer with many such neurons shares many, though by default only
half as far from the mean as the bound says; specialised neurons are grouped by balanced k-means of
their activity over the segments; a row of the router is the mean gate row of an expert's neurons;
chosen experts weigh one. Every layer runs the same fraction of its network: what is not shared is
routed.

Chosen by the error of layers on the calibration inputs of a 135M model at 75% active, means of five
or six layers: activity of |act(gate) up| (0.120) over that of |act(gate)| alone (0.171); with the
latter, the score h w (0.093) over |act(h w)| (0.163), groups by activity over segments (0.093) over
groups by tokens (0.110) or by gate rows (0.114), and sharing what varies least (0.093) over what is
active most often (0.107).

Shapes: T tokens, D model width, F neurons, G segments, E experts, R neurons that are not shared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers import PreTrainedModel

from moesaic._errors import InputError
from moesaic._progress import SILENT, Progress
from moesaic.calibration.stats import CalibrationStats
from moesaic.conversion._active import whole_experts
from moesaic.conversion._error import error_results, layer_error
from moesaic.conversion._layers import Cut, convert_layers, expert_layer
from moesaic.conversion.partition._base import validate_num_experts
from moesaic.conversion.partition._common import balanced_kmeans, order_by_block
from moesaic.models.ffn import FFN
from moesaic.nn.layer import LayerConfig
from moesaic.nn.routers.linear_top_k import LinearTopK

_CHUNK = 1024
_KMEANS_ITERATIONS = 30


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertWeaver:
    """Settings of the conversion.

    Attributes:
        experts: Equal parts that every network is cut into; must divide its width. A layer shares
            some and routes among the others.
        active: Fraction of the network that a token uses, in every layer: a whole number of parts.
        shared: Part of it that is always on, mean over layers, in [0, 1). At least one expert of
            each layer stays to be chosen.
        adapt: How far layers differ in what they share, in [0, 1]: at 0 all share the mean, at 1
            each has what one bound on variation gives it, which leaves early layers without a
            choice and late ones without a share.
        marked: Part of the neurons that count as active for a token, the largest, in (0, 1].
        segments: Pieces of the calibration text over which activity is compared, at least 2; many
            more than there are kinds of text.
        seed: Of the clustering.
    """

    experts: int = 16
    active: float = 0.75
    shared: float = 0.5
    adapt: float = 0.5
    marked: float = 0.1
    segments: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("experts", 1), ("segments", 2), ("seed", 0)):
            if getattr(self, name) < least:
                raise InputError(f"{name} must be at least {least}, got {getattr(self, name)}")
        whole_experts(self.active, self.experts)
        if not 0.0 <= self.shared < 1.0:
            raise InputError(f"shared must be in [0, 1), got {self.shared}; 0.5 is usual")
        if not 0.0 <= self.adapt <= 1.0:
            raise InputError(f"adapt must be in [0, 1], got {self.adapt}; 0.5 is usual")
        if not 0.0 < self.marked <= 1.0:
            raise InputError(f"marked must be in (0, 1], got {self.marked}; 0.1 is usual")

    def collectors(self) -> tuple[str, ...]:
        """Names of the calibration collectors that these settings need."""
        return ("inputs",)


def convert_expertweaver(
    model: PreTrainedModel,
    stats: CalibrationStats | None,
    config: ExpertWeaver,
    *,
    store: Path | None = None,
    progress: Progress = SILENT,
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Convert a dense model; it is consumed, layer by layer, so that no second copy exists.

    The activity of all neurons is kept until the end: 4 * G * F bytes for each layer.

    Args:
        model: A dense model of a known architecture with gated networks.
        stats: Its calibration with the collector `inputs`.
        config: Settings.
        store: Directory for finished layers; an interrupted conversion goes on after them, but
            looks at the activity of all layers again.
        progress: Told of every layer, first at the activity of its neurons, then at its cut.

    Returns:
        The converted model in evaluation mode, and per layer: `shared_per_layer`, the part of the
        network that is always on, and `error_per_layer`, the relative squared error on calibration
        inputs.

    Raises:
        InputError: Before any work, if the settings do not fit the model or the statistics.
    """
    activities: list[Tensor] = []

    def plan(networks: list[FFN]) -> list[LayerConfig]:
        assert stats is not None
        with progress.stage("activity", len(networks), "layers") as stage:
            for index, ffn in enumerate(networks):
                h_TD = stats.layer(index)["inputs.h_TD"]
                activities.append(activity(ffn, h_TD, config.marked, config.segments))
                stage.advance()
        num_active = whole_experts(config.active, config.experts)
        shares = share_parts(
            [variation(activity_GF) for activity_GF in activities],
            num_parts=config.experts,
            num_active=num_active,
            mean=config.shared * num_active,
            adapt=config.adapt,
        )
        return [_describe(ffn, config, share) for ffn, share in zip(networks, shares, strict=True)]

    kept = convert_layers(
        model,
        stats,
        method="expertweaver",
        collectors=config.collectors(),
        describe=partial(_describe, config=config, num_shared=0),
        plan=plan,
        convert=lambda cut: _convert_layer(cut, activities[cut.index], config.seed + cut.index),
        store=store,
        progress=progress,
    )
    parts = [
        layer["shared_width"] / (layer["shared_width"] + layer["num_experts"] * layer["width"])
        for layer in model.config.moesaic["layers"]
    ]
    return model, {"shared_per_layer": [round(part, 4) for part in parts], **error_results(kept)}


@torch.no_grad()
def activity(ffn: FFN, h_TD: Tensor, marked: float, segments: int) -> Tensor:
    """Measure how often each neuron is among the largest of a token, by segment of the text.

    Args:
        ffn: A network.
        h_TD: Its inputs, in the order of the text.
        adapt: How far layers differ in what they share, in [0, 1]: at 0 all share the mean, at 1
            each has what one bound on variation gives it, which leaves early layers without a
            choice and late ones without a share.
        marked: Part of the neurons that count as active for a token.
        segments: G; no more than there are tokens are used.

    Returns:
        Frequencies in [0, 1], [G, F] float32 on the CPU.
    """
    count = max(1, round(marked * ffn.width))
    rows = []
    for segment_TD in h_TD.tensor_split(min(segments, len(h_TD))):
        marks_F = torch.zeros(ffn.width, dtype=torch.int64)
        for piece in segment_TD.split(_CHUNK):
            size_TF = ffn.neurons(piece.to(ffn.up_FD.device, ffn.up_FD.dtype)).abs()
            marks_TK = size_TF.topk(count, dim=1).indices.cpu()
            marks_F += torch.bincount(marks_TK.flatten(), minlength=ffn.width)
        rows.append(marks_F / len(segment_TD))
    return torch.stack(rows)


def variation(activity_GF: Tensor) -> Tensor:
    """Coefficient of variation of each neuron's activity over the segments, [F].

    Infinite for a neuron that was never active: nothing says that it is universal.
    """
    mean_F = activity_GF.mean(0)
    return torch.where(mean_F > 0, activity_GF.std(0, correction=0) / mean_F, torch.inf)


def share_parts(
    variations: Sequence[Tensor], *, num_parts: int, num_active: int, mean: float, adapt: float
) -> list[int]:
    """Decide how many parts of each layer are always on.

    A part is shared for as many neurons as it holds below one bound on their variation, counted by
    the middle one; the bound is where the mean over layers is met.

    Args:
        variations: Of every neuron, [F] for each layer.
        num_parts: Parts of a layer.
        num_active: Parts of a layer that a token uses; at least one of them is routed.
        mean: Shared parts, mean over layers.
        adapt: Part of the way from the mean to what the bound gives, in [0, 1].

    Returns:
        Parts for each layer, in [0, num_active - 1].
    """
    most = num_active - 1
    total = min(round(mean * len(variations)), most * len(variations))
    middle_LP = torch.stack(
        [
            v_F.sort().values[len(v_F) // num_parts // 2 :: len(v_F) // num_parts][:most]
            for v_F in variations
        ]
    )
    # Ascending within a layer, so the lowest are the first parts of their layers.
    chosen = middle_LP.flatten().argsort(stable=True)[:total]
    bound_L = torch.bincount(chosen // max(1, most), minlength=len(variations)).double()
    share_L = bound_L * adapt + total / len(variations) * (1 - adapt)
    # Rounding must not make a whole number a little less than it is.
    whole_L = (share_L + 1e-9).floor()
    left_L = (share_L - whole_L).argsort(descending=True, stable=True)
    whole_L[left_L[: total - int(whole_L.sum())]] += 1
    return [int(share) for share in whole_L]


def _describe(ffn: FFN, config: ExpertWeaver, num_shared: int) -> LayerConfig:
    if ffn.gate_FD is None:
        raise InputError(
            "expertweaver needs a gated network, this one is plain; moefication converts it"
        )
    validate_num_experts(ffn.width, config.experts)
    size = ffn.width // config.experts
    return expert_layer(
        ffn,
        num_experts=config.experts - num_shared,
        width=size,
        shared_width=num_shared * size,
        router="linear-top-k",
        router_options={"top_k": whole_experts(config.active, config.experts) - num_shared},
    )


def _convert_layer(cut: Cut, activity_GF: Tensor, seed: int) -> dict[str, Tensor]:
    """Cut one network and start its router."""
    router, layer, ffn = cut.moe.router, cut.moe.config, cut.ffn
    assert isinstance(router, LinearTopK)
    assert ffn.gate_FD is not None
    ranked_F = variation(activity_GF).argsort(stable=True)
    shared = ranked_F[: layer.shared_width].sort().values
    rest_R = ranked_F[layer.shared_width :].sort().values
    # Of unit length: which segments a neuron is active in, not how often it is.
    profile_RG = normalize(activity_GF[:, rest_R].T, dim=1)
    label_R = balanced_kmeans(
        profile_RG.numpy(),
        layer.num_experts,
        max_iterations=_KMEANS_ITERATIONS,
        seed=seed,
    )
    routed_R = rest_R[order_by_block(label_R)]
    cut.fill(torch.cat([shared, routed_R]))
    rows_RD = ffn.gate_FD[routed_R].float()
    router.weight.copy_(rows_RD.unflatten(0, (layer.num_experts, -1)).mean(1))
    return {"error": layer_error(cut)}
