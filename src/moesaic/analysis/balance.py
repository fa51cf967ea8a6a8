"""The assignment problem behind a choice bias that moves: its dual, and an audit of one step.

Source: "A Theoretical Framework for Auxiliary-Loss-Free Load Balancing", arXiv 2512.03915. Choosing
x to gain most of sum s x, with k experts per token and T k / E tokens per expert, has the
multipliers b of the second constraint as its dual variables. Routing by the k highest of s + b
maximises the Lagrangian over x exactly, and moving b against the load is a subgradient step on the
dual. For scores that stay as they are, a step changes the Lagrangian by what the tokens that switch
gain less what the bias gains, and no token leaves an expert for one whose bias rose by less.

Shapes: T tokens, E experts, K experts per token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class StepAudit:
    """What one step of the bias did to fixed scores.

    Attributes:
        change: Lagrangian after the step less the one before.
        switching_benefit: What the tokens that chose anew gain at the new bias; never negative.
        bias_gain: Sum over experts of how far the bias moved against the excess load, times it;
            `change` is `switching_benefit` less this.
        switches: Pairs of an expert that a token left and one that it took.
        wrong_switches: Those in which the bias of the expert left rose by more; none in theory.
    """

    change: float
    switching_benefit: float
    bias_gain: float
    switches: int
    wrong_switches: int


def choose(scores_TE: Tensor, bias_E: Tensor, top_k: int) -> Tensor:
    """Choose the k highest of score plus bias, [T, E] bool."""
    ids_TK = (scores_TE + bias_E).topk(top_k, dim=1).indices
    return torch.zeros_like(scores_TE, dtype=torch.bool).scatter(1, ids_TK, True)


def excess_load(chosen_TE: Tensor) -> Tensor:
    """Tokens of every expert above the mean, [E]; the subgradient of the dual."""
    load_E = chosen_TE.double().sum(0)
    return load_E - load_E.mean()


def lagrangian(scores_TE: Tensor, chosen_TE: Tensor, bias_E: Tensor) -> float:
    """Score of a choice plus the bias times the excess load."""
    gain = scores_TE.double()[chosen_TE].sum()
    return float(gain + (bias_E.double() * excess_load(chosen_TE)).sum())


def dual_value(scores_TE: Tensor, bias_E: Tensor, top_k: int) -> float:
    """Highest Lagrangian of a bias: the k highest of score plus bias, less what balance costs."""
    best_TK = (scores_TE + bias_E).double().topk(top_k, dim=1).values
    mean_load = best_TK.numel() / scores_TE.shape[1]
    return float(best_TK.sum() - mean_load * bias_E.double().sum())


def audit_step(scores_TE: Tensor, before_E: Tensor, after_E: Tensor, top_k: int) -> StepAudit:
    """Hold one step of the bias to the theory.

    Args:
        scores_TE: Gates without the bias, [T, E]; float64 makes the identity exact.
        before_E: Bias before the step, [E].
        after_E: Bias after it, [E].
        top_k: K.

    Returns:
        The audit.
    """
    old_TE, new_TE = choose(scores_TE, before_E, top_k), choose(scores_TE, after_E, top_k)
    moved_E = after_E.double() - before_E.double()
    worth_TE = (scores_TE + after_E).double()
    left_TE, taken_TE = old_TE & ~new_TE, new_TE & ~old_TE
    # Experts that a token left against those that it took: at most k times k pairs of a token.
    pairs_TEE = left_TE.unsqueeze(2) & taken_TE.unsqueeze(1)
    rose_more_EE = moved_E.unsqueeze(1) > moved_E.unsqueeze(0) + 1e-12
    return StepAudit(
        change=lagrangian(scores_TE, new_TE, after_E) - lagrangian(scores_TE, old_TE, before_E),
        switching_benefit=float(worth_TE[taken_TE].sum() - worth_TE[left_TE].sum()),
        bias_gain=float(-(moved_E * excess_load(old_TE)).sum()),
        switches=int(pairs_TEE.sum()),
        wrong_switches=int((pairs_TEE & rose_more_EE).sum()),
    )
