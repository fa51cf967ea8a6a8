"""Top-k that now and then takes its choice from a balanced transport plan, instead of a loss.

Source: Selective Sinkhorn Routing, arXiv 2511.08972. With a small probability a training pass
solves an entropic transport problem: every token ships one unit, every expert receives T / E of
them. The k largest entries of a token's row are its experts and, renormalised, their weights. All
other passes and all of evaluation are the usual softmax top-k: a plan would make a token's experts
depend on its batch mates. What is even is the mass, not the count of tokens.

Ours: the duals of the plan are constants for the gradient (whether the paper differentiates the
rounds is not known to us); padding takes part in the plan, since the router does not know it; and a
batch with fewer tokens than experts is routed as usual.

Shapes: T tokens, D model width, E experts, K experts per token.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from moesaic._errors import InputError
from moesaic.nn.routers._base import LinearRouter, RouterState, check_top_k, linear_scores
from moesaic.nn.routing import Routing

_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectiveSinkhornConfig:
    """Settings of the router.

    Attributes:
        top_k: Experts per token.
        probability: Chance that a training pass solves the problem, drawn for each layer; the
            paper uses 0.001 to 0.01, at 0 the router is `topk-softmax`.
        temperature: Entropy weight of the plan. Small ones follow the gains closely and take more
            rounds. 0.5 and 1 are the paper's.
        gain: What a token gains at an expert: its `softmax` probability or its `linear` score.
        noise: Standard deviation of what is added to the gains; it also breaks ties.
        max_rounds: Rounds of scaling after which a plan that has not converged is used as it is,
            with a warning in the log.
        tolerance: Largest distance of what an expert receives from T / E, in units of it.
        gradient: `duals` teaches the router through the weights at constant duals; `none` leaves
            the passes with a plan to the experts alone.
    """

    top_k: int = 2
    probability: float = 0.01
    temperature: float = 0.5
    gain: Literal["softmax", "linear"] = "softmax"
    noise: float = 0.0
    max_rounds: int = 100
    tolerance: float = 1e-4
    gradient: Literal["duals", "none"] = "duals"

    def __post_init__(self) -> None:
        if self.top_k < 1:
            raise InputError(f"top_k must be at least 1, got {self.top_k}; choose 1 to num_experts")
        if not 0.0 <= self.probability <= 1.0:
            raise InputError(
                f"probability must be in [0, 1], got {self.probability}; 0.01 is usual"
            )
        if not 0.0 < self.temperature < float("inf"):
            raise InputError(f"temperature must be above 0, got {self.temperature}; 0.5 is usual")
        if not 0.0 <= self.noise < float("inf"):
            raise InputError(f"noise must be at least 0, got {self.noise}; 0 is none")
        if self.max_rounds < 1:
            raise InputError(f"max_rounds must be at least 1, got {self.max_rounds}; 100 is usual")
        if not 0.0 < self.tolerance < 1.0:
            raise InputError(f"tolerance must be in (0, 1), got {self.tolerance}; 1e-4 is usual")


class SelectiveSinkhorn(LinearRouter):
    """Selective Sinkhorn routing.

    Args:
        dim: D.
        num_experts: E.
        config: Settings.
    """

    def __init__(self, dim: int, num_experts: int, config: SelectiveSinkhornConfig) -> None:
        check_top_k(config.top_k, num_experts)
        super().__init__(dim, num_experts)
        self.config = config

    def forward(self, h_TD: Tensor, state: RouterState | None = None) -> Routing:
        """Route each token to its top k, by its probabilities or by its row of a plan.

        The draw is torch's global generator's, as dropout's is.

        Args:
            h_TD: Inputs, [T, D].
            state: Ignored.

        Returns:
            K = top_k slots, highest first, whose weights sum to one; scores are the logits.
        """
        scores_TE = linear_scores(h_TD, self.weight)
        logits_TE = self._planned(scores_TE) if self._draws(h_TD.shape[0]) else scores_TE
        weights_TK, ids_TK = logits_TE.softmax(-1).topk(self.config.top_k, dim=-1)
        weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
        return Routing(ids_TK, weights_TK, scores_TE, self.num_experts)

    def _draws(self, num_tokens: int) -> bool:
        if not self.training or self.config.probability == 0.0 or num_tokens < self.num_experts:
            return False
        return float(torch.rand(())) < self.config.probability

    def _planned(self, scores_TE: Tensor) -> Tensor:
        """Logits whose softmax is the plan: the row duals cancel in it."""
        gains_TE = scores_TE if self.config.gain == "linear" else scores_TE.softmax(-1)
        if self.config.noise > 0.0:
            gains_TE = gains_TE + self.config.noise * torch.randn_like(gains_TE)
        gains_TE = gains_TE / self.config.temperature
        if self.config.gradient == "none":
            gains_TE = gains_TE.detach()
        log_v_E, off = sinkhorn_duals(
            gains_TE.detach(), self.config.max_rounds, self.config.tolerance
        )
        if off > self.config.tolerance:
            _LOGGER.warning(
                "a plan is %.1e from balance after max_rounds=%d; raise it or temperature",
                off,
                self.config.max_rounds,
            )
        return gains_TE + log_v_E

    def extra_repr(self) -> str:
        """Sizes and settings, for printing."""
        return (
            f"experts={self.num_experts}, top_k={self.config.top_k}, "
            f"probability={self.config.probability}, temperature={self.config.temperature}"
        )


def sinkhorn_duals(gains_TE: Tensor, max_rounds: int, tolerance: float) -> tuple[Tensor, float]:
    """Find the duals of the plan in which tokens ship one unit and experts receive T / E.

    The plan is softmax(gains + log v) over experts, whose rows sum to one exactly. Computed from
    logarithms, because exp(gains) overflows where the temperature is small.

    Args:
        gains_TE: Gains over the temperature, [T, E], float32 or better, T at least 1.
        max_rounds: Most rounds of scaling.
        tolerance: Largest distance of a column sum from T / E, in units of it, to stop at.

    Returns:
        log v, [E], and the distance that was reached.
    """
    num_tokens, num_experts = gains_TE.shape
    log_v_E = torch.zeros_like(gains_TE[0])
    off = float("inf")
    for round_ in range(max_rounds + 1):
        log_plan_TE = (gains_TE + log_v_E).log_softmax(-1)
        # Logarithm of what each expert receives, in units of T / E.
        excess_E = log_plan_TE.logsumexp(0) + math.log(num_experts / num_tokens)
        off = float((excess_E.exp() - 1).abs().max())
        if off <= tolerance or round_ == max_rounds:
            break
        log_v_E = log_v_E - excess_E
    return log_v_E, off
