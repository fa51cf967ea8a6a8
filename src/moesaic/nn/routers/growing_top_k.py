"""Top-k of a pool that grows in training from the experts of one layer to those of a group.

Source: ReXMoE, arXiv 2510.17483, progressive scaling routing: at step t a random part of N_t of the
candidates may be chosen; N_t is N up to step t_s, grows by the same amount at every step, and is
all from step t_e on. Scores of the others are set to zero after the softmax, as the paper writes,
so that their probability is missing from the weights; set before it, on request, it goes to the
rest. The paper leaves open whether each token has a part of its own; here a step has one.

Shapes: T tokens, D model width, E experts, K experts per token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from moesaic._errors import InputError
from moesaic.nn.routers._base import (
    LinearRouter,
    Router,
    RouterState,
    check_top_k,
    linear_scores,
)
from moesaic.nn.routing import Routing
from moesaic.nn.schedules._base import ScheduleConfig, StepClock


@dataclass(frozen=True, slots=True, kw_only=True)
class GrowingTopKConfig:
    """Settings of the growing pool.

    Attributes:
        top_k: Experts per token.
        initial: Candidates in the beginning, at least top_k; the paper's are the experts of one
            layer. At the number of all candidates nothing is ever masked.
        start_step: Optimiser steps before the pool grows.
        end_step: Step from which on it is whole; the paper's are 10,000 and 30,000 of 50,000.
        shape: How it grows; `linear` is the paper's best.
        mask: Where the others are masked: their `probabilities` (the paper), or their `logits`.
        seed: Of the choice of candidates, with the step and the layer: all processes choose alike.
    """

    top_k: int = 2
    initial: int = 4
    start_step: int = 10_000
    end_step: int = 30_000
    shape: str = "linear"
    mask: Literal["probabilities", "logits"] = "probabilities"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.top_k < 1:
            raise InputError(f"top_k must be at least 1, got {self.top_k}; choose 1 to num_experts")
        if self.initial < self.top_k:
            raise InputError(
                f"initial must be at least top_k={self.top_k}, got {self.initial}; the experts of "
                "one layer are usual"
            )
        if not 0 <= self.start_step <= self.end_step:
            raise InputError(
                f"start_step must be in [0, end_step={self.end_step}], got {self.start_step}; "
                "a fifth and three fifths of the training are the paper's"
            )
        if self.seed < 0:
            raise InputError(f"seed must be at least 0, got {self.seed}; each gives other choices")


class GrowingTopK(LinearRouter):
    """ReXMoE's router.

    Args:
        dim: D.
        num_experts: E, all candidates.
        config: Settings.
    """

    def __init__(self, dim: int, num_experts: int, config: GrowingTopKConfig) -> None:
        check_top_k(config.initial, num_experts, field="initial")
        super().__init__(dim, num_experts)
        self.config = config
        # Number of the layer, so that each has a choice of its own.
        self.position = 0
        self.clock = StepClock()
        self.schedule = ScheduleConfig(
            start=config.initial,
            end=num_experts,
            steps=config.end_step - config.start_step,
            shape=config.shape,
        )

    def link(self, routers: Sequence[Router]) -> None:
        """Learn which layer it is in."""
        self.position = [router is self for router in routers].index(True)

    def num_candidates(self) -> int:
        """How many experts may be chosen in training at this step."""
        step = self.clock.step()
        if step <= self.config.start_step and step < self.config.end_step:
            return self.config.initial
        return math.floor(self.schedule.at(step - self.config.start_step))

    def forward(self, h_TD: Tensor, state: RouterState | None = None) -> Routing:
        """Route each token to the top k of the candidates; in evaluation all are.

        Args:
            h_TD: Inputs, [T, D].
            state: Ignored.

        Returns:
            K = top_k slots, most probable first, not renormalised; scores are the logits of all.
        """
        scores_TE = linear_scores(h_TD, self.weight)
        open_TE = scores_TE
        if self.training and self.num_candidates() < self.num_experts:
            # By logits of minus infinity: probabilities of zero tie with those that underflow.
            open_TE = scores_TE.masked_fill(self._masked_E().to(h_TD.device), -torch.inf)
        ids_TK = open_TE.topk(self.config.top_k, dim=-1).indices
        weighed_TE = scores_TE if self.config.mask == "probabilities" else open_TE
        weights_TK = weighed_TE.softmax(-1).gather(1, ids_TK)
        return Routing(ids_TK, weights_TK, scores_TE, self.num_experts)

    def _masked_E(self) -> Tensor:
        """Which experts are no candidates at this step, [E] bool."""
        seed = (self.config.seed * 1_000_003 + self.position) * 1_000_003 + self.clock.step()
        draw = torch.Generator().manual_seed(seed % 2**63)
        order_E = torch.randperm(self.num_experts, generator=draw)
        return order_E >= self.num_candidates()

    def end_step(self) -> None:
        """Come one step closer to the whole pool."""
        self.clock.end_step()

    def extra_repr(self) -> str:
        """Sizes and settings, for printing."""
        return (
            f"experts={self.num_experts}, top_k={self.config.top_k}, initial={self.config.initial}"
        )
