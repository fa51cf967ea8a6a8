"""What one pass of a router decided, read from whatever its module returns.

Routers of transformers 5 return raw logits, weights and ids, ours a `Routing`. Whether a router is
a softmax or a sigmoid stands in no field that all of them have; the weights tell it.

Shapes: T tokens, K slots per token, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as nnf

from moesaic.nn.routing import Routing

Gate = Literal["softmax", "sigmoid"]
# Tokens that are looked at to tell the kind of gate.
_SAMPLE = 256
# Two readings closer than this, in nats, are one; a right one misses by rounding alone, which in
# bfloat16 is a few thousandths.
_APART, _MISS = 0.005, 0.02


@dataclass(frozen=True, slots=True)
class Decision:
    """One pass of a router.

    Attributes:
        ids_TK: Expert of each slot; an empty one has id E or -1.
        weights_TK: Weight of each slot; one of exactly 0 is not used.
        scores_TE: Raw scores of the experts, if the router gives them.
    """

    ids_TK: Tensor
    weights_TK: Tensor
    scores_TE: Tensor | None


def read(output: Any, num_experts: int) -> Decision | None:
    """Read what a router returned; none if there are no choices in it.

    Tensors are told apart by dtype and shape, because their order differs between models.
    """
    if isinstance(output, Routing):
        return Decision(
            output.ids_TK.detach(),
            output.weights_TK.detach(),
            output.scores_TE[:, :num_experts].detach(),
        )
    parts = [part.detach() for part in _tensors(output) if part.dim() == 2]
    ids = [part for part in parts if part.dtype in (torch.int64, torch.int32)]
    if not ids:
        return None
    chosen = ids[0].shape
    floats = [part for part in parts if part.is_floating_point()]
    scores_TE = next((p for p in floats if p.shape == (chosen[0], num_experts)), None)
    weights_TK = next((p for p in floats if p is not scores_TE and p.shape == chosen), None)
    if weights_TK is None:
        return None
    return Decision(ids[0], weights_TK, scores_TE)


def read_scores(output: Any, num_experts: int) -> Tensor | None:
    """Read raw scores [T, E] from a router that leaves the choice to its block."""
    for part in _tensors(output):
        if part.is_floating_point() and part.dim() >= 2 and part.shape[-1] == num_experts:
            return part.detach().reshape(-1, num_experts)
    return None


def _tensors(output: Any) -> list[Tensor]:
    parts = output if isinstance(output, (tuple, list)) else (output,)
    return [part for part in parts if isinstance(part, Tensor)]


def used(decision: Decision, num_experts: int) -> Tensor:
    """Slots that hold an expert which counts, [T, K] bool."""
    ids_TK = decision.ids_TK
    return (ids_TK >= 0) & (ids_TK < num_experts) & (decision.weights_TK != 0)


def gate_of(decision: Decision, num_experts: int) -> Gate | None:
    """Tell from its weights whether a router is a softmax or a sigmoid of its scores.

    Weights of a token are its gates times a factor: the sum they were divided by, or a scale. So
    the logarithm of weight over gate is one number for all slots of a token under the right
    reading, and under the wrong one it is not. Tokens with a single slot are held to each other.

    Returns:
        The reading that fits clearly better; none if neither does, as for scores that are all alike
        or weights that are all one.
    """
    if decision.scores_TE is None:
        return None
    scores_TE = decision.scores_TE[:_SAMPLE].float()
    ids_TK = decision.ids_TK[:_SAMPLE].clamp(0, num_experts - 1).long()
    used_TK = used(decision, num_experts)[:_SAMPLE]
    several_T = used_TK.sum(1) > 1
    log_weights_TK = decision.weights_TK[:_SAMPLE].float().clamp(min=1e-30).log()

    def misfit(log_gates_TE: Tensor) -> float:
        rest_TK = log_weights_TK - log_gates_TE.gather(1, ids_TK)
        if bool(several_T.any()):
            rest_TK, on_TK = rest_TK[several_T], used_TK[several_T]
        else:
            rest_TK, on_TK = rest_TK[used_TK].unsqueeze(0), used_TK[used_TK].unsqueeze(0)
        if on_TK.sum() < 2:
            return 0.0
        count_T1 = on_TK.sum(1, keepdim=True)
        mean_T1 = (rest_TK * on_TK).sum(1, keepdim=True) / count_T1
        return float(((rest_TK - mean_T1).abs() * on_TK).sum() / on_TK.sum())

    misfits: dict[Gate, float] = {
        "softmax": misfit(scores_TE.log_softmax(-1)),
        "sigmoid": misfit(nnf.logsigmoid(scores_TE)),
    }
    best, other = sorted(misfits, key=lambda gate: misfits[gate])
    clear = misfits[other] > _APART and misfits[best] < min(_MISS, misfits[other] / 4)
    return best if clear else None


def entropy_and_saturation(scores_TE: Tensor, ids_TK: Tensor, gate: Gate) -> tuple[Tensor, Tensor]:
    """How undecided a router is, and how many of its gates no longer move.

    Args:
        scores_TE: Raw scores.
        ids_TK: Chosen experts, clamped into [0, E).
        gate: What makes gates of scores.

    Returns:
        Entropy of each token's probabilities (of sigmoids: their shares) over its largest, the
        logarithm of E, [T]; and which gates are above 0.99, where their slope is under a hundredth:
        the largest of a softmax, [T, 1], or the chosen ones of a sigmoid, [T, K].
    """
    scores_TE = scores_TE.float()
    if gate == "softmax":
        log_probs_TE = scores_TE.log_softmax(-1)
        strong = log_probs_TE.amax(-1, keepdim=True).exp() > 0.99
    else:
        log_gates_TE = nnf.logsigmoid(scores_TE)
        log_probs_TE = log_gates_TE.log_softmax(-1)
        strong = log_gates_TE.gather(1, ids_TK).exp() > 0.99
    entropy_T = -(log_probs_TE.exp() * log_probs_TE).sum(-1)
    largest = torch.tensor(max(2, scores_TE.shape[1]), device=scores_TE.device).log()
    return entropy_T / largest, strong
