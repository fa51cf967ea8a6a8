"""A gate that starts dense and ends with one expert: noise at a falling temperature, a threshold.

Source: EvoMoE, arXiv 2112.14397 (the DTS gate): in training p = softmax((scores + Gumbel noise) /
temperature), and every expert whose p exceeds a small threshold counts, so that a token uses as
many as it is unsure of. The temperature falls; after a number of steps only the expert of the
highest p is left. Evaluation has no noise and uses the best expert alone. No token is dropped.

Weights are not divided by their sum. Ours: in evaluation an expert chosen by noisy weights weighs
its probability at the last temperature; at temperature one, which belongs to `weight: softmax`,
outputs would shrink by as much as training had sharpened them.

Shapes: T tokens, D model width, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from moesaic._errors import InputError
from moesaic.nn.routers._base import LinearRouter, RouterState, linear_scores
from moesaic.nn.routing import Routing
from moesaic.nn.schedules._base import ScheduleConfig, StepClock

_TEMPERATURE = ScheduleConfig(start=2.0, end=0.3, steps=1000)


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseToSparseConfig:
    """Settings of the gate.

    Attributes:
        temperature: How the temperature falls; linear or exponential, from 2 to 0.3 is said to be
            the paper's.
        soft_steps: Optimiser steps in which all experts above the threshold count; from then on the
            best of the noisy ones alone. Leave a good part of the training to those, which are like
            evaluation.
        threshold: Probability above which an expert counts, below 1 / E; the paper has 0.001.
        weight: Experts weigh the noisy probability that chose them (`gumbel`), or the `softmax` of
            their scores, with neither noise nor temperature.
    """

    temperature: ScheduleConfig = _TEMPERATURE
    soft_steps: int = 1000
    threshold: float = 0.001
    weight: Literal["gumbel", "softmax"] = "gumbel"

    def __post_init__(self) -> None:
        if min(self.temperature.start, self.temperature.end) <= 0:
            raise InputError(
                f"temperature must start and end above 0, got {self.temperature.start} and "
                f"{self.temperature.end}; 2 and 0.3 are usual"
            )
        if self.soft_steps < 0:
            raise InputError(f"soft_steps must be at least 0, got {self.soft_steps}; 0 is none")
        if not 0.0 <= self.threshold < 1.0:
            raise InputError(f"threshold must be in [0, 1), got {self.threshold}; 0.001 is usual")


class DenseToSparse(LinearRouter):
    """EvoMoE's gate.

    Args:
        dim: D.
        num_experts: E.
        config: Settings.
    """

    def __init__(self, dim: int, num_experts: int, config: DenseToSparseConfig) -> None:
        if config.threshold * num_experts >= 1.0 and num_experts > 1:
            raise InputError(
                f"threshold must be below 1 / num_experts={1 / num_experts:.4g}, got "
                f"{config.threshold}; else a token may have no expert"
            )
        super().__init__(dim, num_experts)
        self.config = config
        self.clock = StepClock()

    def forward(self, h_TD: Tensor, state: RouterState | None = None) -> Routing:
        """Route each token to the experts of the stage.

        The noise is torch's global generator's, as dropout's is.

        Args:
            h_TD: Inputs, [T, D].
            state: Ignored.

        Returns:
            In the soft steps of training E slots, most probable first, empty below the threshold;
            else one. The softmax of the scores is what experts weigh, noisy with `gumbel` in
            training.
        """
        scores_TE = linear_scores(h_TD, self.weight)
        gumbel = self.config.weight == "gumbel"
        if not self.training:
            if gumbel:
                scores_TE = scores_TE / self.config.temperature.end
            return self._choose(scores_TE, scores_TE, soft=False)
        step = self.clock.step()
        noise_TE = -torch.empty_like(scores_TE).exponential_().log()
        noisy_TE = (scores_TE + noise_TE) / self.config.temperature.at(step)
        weighing_TE = noisy_TE if gumbel else scores_TE
        return self._choose(noisy_TE, weighing_TE, soft=step < self.config.soft_steps)

    def _choose(self, choosing_TE: Tensor, weighing_TE: Tensor, *, soft: bool) -> Routing:
        num_slots = self.num_experts if soft else 1
        probs_TK, ids_TK = choosing_TE.softmax(-1).topk(num_slots, dim=-1)
        weights_TK = weighing_TE.softmax(-1).gather(1, ids_TK)
        if soft:
            held_TK = probs_TK > self.config.threshold
            ids_TK = torch.where(held_TK, ids_TK, self.num_experts)
            weights_TK = torch.where(held_TK, weights_TK, 0.0)
        return Routing(ids_TK, weights_TK, weighing_TE, self.num_experts)

    def end_step(self) -> None:
        """Come one step closer to one expert per token."""
        self.clock.end_step()

    def extra_repr(self) -> str:
        """Sizes and settings, for printing."""
        schedule = self.config.temperature
        return (
            f"experts={self.num_experts}, temperature={schedule.start:g} to {schedule.end:g} in "
            f"{schedule.steps} steps, soft_steps={self.config.soft_steps}"
        )
