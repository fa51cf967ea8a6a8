"""Top-k that uses more experts in the first part of training, then its own k.

Source: Sigma-MoE-Tiny, arXiv 2512.16248 (progressive sparsification): where one of very many
experts is active, the balance loss of a low layer is met by probabilities that are even while the
loads are not. Low layers therefore start with more experts per token, and from one step on use
the k of all other layers. Nothing else changes, and evaluation has always the final k.

Chosen experts weigh their probability among all experts in both stages: weights that sum to one
would jump at the switch, and at k = 1 would teach the router nothing.

Shapes: T tokens, D model width, E experts, K experts per token.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from moesaic._errors import InputError
from moesaic.nn.routers._base import LinearRouter, RouterState, check_top_k, linear_scores
from moesaic.nn.routing import Routing
from moesaic.nn.schedules._base import ScheduleConfig, StepClock


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgressiveTopKConfig:
    """Settings of the router.

    Attributes:
        top_k: Experts per token from the switch on and in evaluation.
        early_top_k: Experts per token before. The published model is said to have used 8, 8, 6, 6,
            4, 4, 2 and 2 in its first eight layers of over fifty; at `top_k`, which suits the
            other layers, the router is `topk-softmax` without `renormalize`.
        early_steps: Optimiser steps before the switch; about nine tenths of the training.
    """

    top_k: int = 1
    early_top_k: int = 2
    early_steps: int = 1000

    def __post_init__(self) -> None:
        if self.top_k < 1:
            raise InputError(f"top_k must be at least 1, got {self.top_k}; choose 1 to num_experts")
        if self.early_top_k < self.top_k:
            raise InputError(
                f"early_top_k must be at least top_k={self.top_k}, got {self.early_top_k}; equal "
                "is no early stage"
            )
        if self.early_steps < 0:
            raise InputError(
                f"early_steps must be at least 0, got {self.early_steps}; 0 is no early stage"
            )


class ProgressiveTopK(LinearRouter):
    """Softmax over all experts in float32, then the top k of the stage.

    Args:
        dim: D.
        num_experts: E.
        config: Settings.
    """

    def __init__(self, dim: int, num_experts: int, config: ProgressiveTopKConfig) -> None:
        check_top_k(config.early_top_k, num_experts, field="early_top_k")
        super().__init__(dim, num_experts)
        self.config = config
        self.clock = StepClock()
        self.schedule = ScheduleConfig(
            start=config.early_top_k, end=config.top_k, steps=config.early_steps, shape="switch"
        )

    def forward(self, h_TD: Tensor, state: RouterState | None = None) -> Routing:
        """Route each token to the top k of the stage.

        Args:
            h_TD: Inputs, [T, D].
            state: Ignored.

        Returns:
            K = early_top_k slots in the early stage of training, else top_k, most probable first;
            scores are the logits.
        """
        scores_TE = linear_scores(h_TD, self.weight)
        top_k = round(self.schedule.at(self.clock.step())) if self.training else self.config.top_k
        # By scores: probabilities tie where all scores are close to zero.
        ids_TK = scores_TE.topk(top_k, dim=-1).indices
        weights_TK = scores_TE.softmax(-1).gather(1, ids_TK)
        return Routing(ids_TK, weights_TK, scores_TE, self.num_experts)

    def end_step(self) -> None:
        """Come one step closer to the switch."""
        self.clock.end_step()

    def extra_repr(self) -> str:
        """Sizes and settings, for printing."""
        return (
            f"experts={self.num_experts}, top_k={self.config.top_k}, "
            f"early_top_k={self.config.early_top_k}, early_steps={self.config.early_steps}"
        )
