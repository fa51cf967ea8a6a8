"""CMoE: neurons that are strong for most tokens are shared, the rest is clustered; no training.

Source: CMoE, arXiv 2502.04416 (also published as "Analytical FFN-to-MoE Restructuring"). Per token
the K largest neurons are marked, with inputs and weight rows scaled to unit length. The neurons
with the most marks are the shared expert; of the rest, the most marked are the seeds of the routed
experts, and one balanced assignment at the least L1 distance between columns of marks fills these.
The neuron nearest to the mean column of its expert is its representative and scores it
(`moesaic.nn.routers.cmoe`).

Ours: marks are kept as indices, 4 K bytes a token, and distances counted from them; the assignment
is solved on the graph of experts instead of a matrix of neurons by neurons, which is as exact and
needs seconds where that needs minutes; ties go to the neuron that comes first. Biases take no part
in marks and scores.

Shapes: T tokens, D model width, F neurons, K marks of a token, E routed experts, R neurons that are
not shared, M neurons of an expert.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

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
from moesaic.conversion.partition._assignment import balanced_assignment
from moesaic.conversion.partition._base import validate_num_experts
from moesaic.models.ffn import FFN
from moesaic.nn.layer import LayerConfig
from moesaic.nn.routers.cmoe import CMoERouter
from moesaic.ops.weights import activation

_CHUNK = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class CMoE:
    """Settings of the conversion; `presets()["paper"]` has the paper's S2A2E16.

    Attributes:
        experts: Equal experts that the network is cut into, shared ones included; must divide its
            width. More follow the tokens more closely and are slower to gather.
        active: Fraction of the network that a token uses: shared and chosen experts over all. The
            untrained model is of use at 0.75 and hardly below; the paper's 0.25 needs training.
        shared: Experts that are always on; none for half of those active, rounded down, which is
            the paper's proportion.
        marks: Largest neurons of a token that count as active for it; 10 is the paper's.
        bias_step: How far a training step moves the bias that balances the experts.
        seed: Has no effect, since nothing here is drawn; every conversion has one.
    """

    experts: int = 16
    active: float = 0.75
    shared: int | None = None
    marks: int = 10
    bias_step: float = 0.001
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("experts", 1), ("marks", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise InputError(f"{name} must be at least {least}, got {getattr(self, name)}")
        active = whole_experts(self.active, self.experts)
        if self.shared is not None and not 0 <= self.shared < active:
            raise InputError(
                f"shared must be in [0, {active}), below the {active} of {self.experts} experts "
                f"that active={self.active} makes, got {self.shared}; lower it or raise active"
            )
        if not 0.0 <= self.bias_step < float("inf"):
            raise InputError(f"bias_step must be at least 0, got {self.bias_step}; 0.001 is usual")

    @classmethod
    def presets(cls) -> dict[str, CMoE]:
        """Named settings."""
        return {"default": cls(), "paper": cls(experts=16, active=0.25, shared=2, marks=10)}

    @property
    def num_shared(self) -> int:
        """Experts that are always on."""
        if self.shared is not None:
            return self.shared
        return whole_experts(self.active, self.experts) // 2

    @property
    def top_k(self) -> int:
        """Routed experts per token."""
        return whole_experts(self.active, self.experts) - self.num_shared

    def collectors(self) -> tuple[str, ...]:
        """Names of the calibration collectors that these settings need."""
        return ("inputs",)


def convert_cmoe(
    model: PreTrainedModel,
    stats: CalibrationStats | None,
    config: CMoE,
    *,
    store: Path | None = None,
    progress: Progress = SILENT,
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Convert a dense model; it is consumed, layer by layer, so that no second copy exists.

    Args:
        model: A dense model of a known architecture with gated networks.
        stats: Its calibration with the collector `inputs`.
        config: Settings.
        store: Directory for finished layers; an interrupted conversion goes on after them.
        progress: Told of every layer.

    Returns:
        The converted model in evaluation mode, and `error_per_layer`: the relative squared error of
        each layer on its calibration inputs.

    Raises:
        InputError: Before any work, if the settings do not fit the model or the statistics.
    """
    kept = convert_layers(
        model,
        stats,
        method="cmoe",
        collectors=config.collectors(),
        describe=partial(_describe, config=config),
        convert=partial(_convert_layer, config=config),
        store=store,
        progress=progress,
    )
    return model, error_results(kept)


class MarkedCut(NamedTuple):
    """How marks cut a network.

    Attributes:
        order_F: The shared neurons, then those of each expert, [F].
        representative_E: The neuron that stands for each routed expert, [E].
    """

    order_F: Tensor
    representative_E: Tensor


def cut_by_marks(
    marks_TK: Tensor, num_neurons: int, *, shared_width: int, num_experts: int
) -> MarkedCut:
    """Cut a network by which neurons are active for the same tokens.

    Args:
        marks_TK: Neurons that are active for each token, distinct, [T, K] int64.
        num_neurons: F.
        shared_width: Neurons of the shared expert.
        num_experts: E; divides the rest.

    Returns:
        The cut.
    """
    marked = marks_TK.flatten()
    count_F = torch.bincount(marked, minlength=num_neurons)
    ranked_F = count_F.argsort(descending=True, stable=True)
    shared, rest_R = ranked_F[:shared_width].sort().values, ranked_F[shared_width:].sort().values
    seed_E = ranked_F[shared_width : shared_width + num_experts]

    # The L1 distance of two columns is their counts less twice the tokens they share. Every neuron
    # gets one expert and every expert as many neurons, so the counts sum to the same whatever goes
    # where: the tokens shared with the seeds decide.
    both_FE = torch.zeros(num_neurons, num_experts, dtype=torch.float64)
    seed_TE = torch.stack([(marks_TK == seed).any(1) for seed in seed_E], dim=1).double()
    for marks_T in marks_TK.T:
        both_FE.index_add_(0, marks_T, seed_TE)
    label_R = torch.from_numpy(balanced_assignment(-both_FE[rest_R].numpy()))

    members_EM = rest_R[label_R.argsort(stable=True)].reshape(num_experts, -1)
    label_F = torch.full((num_neurons,), num_experts)
    label_F[rest_R] = label_R
    # Mean column of each expert; the last one takes up the shared neurons.
    mean_TE = torch.zeros(len(marks_TK), num_experts + 1, dtype=torch.float64)
    share_TK = torch.full(marks_TK.shape, 1 / members_EM.shape[1], dtype=torch.float64)
    mean_TE.scatter_add_(1, label_F[marks_TK], share_TK)
    # A mark changes its neuron's distance from |0 - mean| to |1 - mean|; the rest is the same for
    # all neurons of an expert.
    change_TK = 1 - 2 * mean_TE.gather(1, label_F[marks_TK])
    distance_F = torch.zeros(num_neurons, dtype=torch.float64)
    distance_F.index_add_(0, marked, change_TK.flatten())
    nearest_E1 = distance_F[members_EM].argmin(1, keepdim=True)
    representative_E = members_EM.gather(1, nearest_E1).squeeze(1)
    return MarkedCut(torch.cat([shared, members_EM.flatten()]), representative_E)


def strongest_neurons(ffn: FFN, h_TD: Tensor, count: int) -> Tensor:
    """Find the largest neurons of each token, inputs and weight rows scaled to unit length.

    Args:
        ffn: A gated network.
        h_TD: Its inputs.
        count: K.

    Returns:
        Neurons, [T, K] int64 on the CPU.
    """
    assert ffn.gate_FD is not None
    act = activation(ffn.activation)
    gate_FD, up_FD = (normalize(rows.float(), dim=1) for rows in (ffn.gate_FD, ffn.up_FD))
    marks = []
    for piece in h_TD.split(_CHUNK):
        h = normalize(piece.to(gate_FD.device).float(), dim=1)
        neurons_TF = act(h @ gate_FD.T) * (h @ up_FD.T)
        marks.append(neurons_TF.abs().topk(count, dim=1).indices.cpu())
    return torch.cat(marks)


def _describe(ffn: FFN, config: CMoE) -> LayerConfig:
    if ffn.gate_FD is None:
        raise InputError("cmoe needs a gated network, this one is plain; moefication converts it")
    validate_num_experts(ffn.width, config.experts)
    if config.marks > ffn.width:
        raise InputError(
            f"marks must be at most the FFN width {ffn.width}, got {config.marks}; 10 is usual"
        )
    size = ffn.width // config.experts
    return expert_layer(
        ffn,
        num_experts=config.experts - config.num_shared,
        width=size,
        shared_width=config.num_shared * size,
        router="cmoe",
        router_options={
            "top_k": config.top_k,
            "activation": ffn.activation,
            "bias_step": config.bias_step,
        },
    )


def _convert_layer(cut: Cut, config: CMoE) -> dict[str, Tensor]:
    """Cut one network and start its router."""
    router, layer, ffn = cut.moe.router, cut.moe.config, cut.ffn
    assert isinstance(router, CMoERouter)
    assert ffn.gate_FD is not None
    marks_TK = strongest_neurons(ffn, cut.measured["inputs.h_TD"], config.marks)
    parts = cut_by_marks(
        marks_TK, ffn.width, shared_width=layer.shared_width, num_experts=layer.num_experts
    )
    cut.fill(parts.order_F)
    for parameter, rows_FD in ((router.weight, ffn.up_FD), (router.gate, ffn.gate_FD)):
        parameter.copy_(normalize(rows_FD[parts.representative_E].float(), dim=1))
    return {"error": layer_error(cut)}
