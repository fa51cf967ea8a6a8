"""The k most probable experts at a temperature, each weighing one with its probability's gradient.

Source: Hecto, arXiv 2506.22919: softmax of the scores over a temperature, the winner alone is
computed, in training too. How the gate learns is not known to us. Ours: the straight-through
estimator, whose weight is one, so that outputs keep their scale, and has the derivative of the
probability; `weight: probability` multiplies by it instead, as Switch Transformer does,
arXiv 2101.03961.

Shapes: T tokens, D model width, E experts, K experts per token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from moesaic._errors import InputError
from moesaic.nn.routers._base import LinearRouter, RouterState, check_top_k, linear_scores
from moesaic.nn.routing import Routing


@dataclass(frozen=True, slots=True, kw_only=True)
class StraightThroughTopKConfig:
    """Settings of the router.

    Attributes:
        top_k: Experts per token.
        temperature: What the scores are divided by: it flattens gradients and losses and changes
            no choice. 1.5 is the paper's.
        weight: `one`, with the gradient of the probability, or the `probability` itself.
    """

    top_k: int = 1
    temperature: float = 1.5
    weight: Literal["one", "probability"] = "one"

    def __post_init__(self) -> None:
        if self.top_k < 1:
            raise InputError(f"top_k must be at least 1, got {self.top_k}; choose 1 to num_experts")
        if not 0.0 < self.temperature < float("inf"):
            raise InputError(f"temperature must be above 0, got {self.temperature}; 1.5 is usual")


class StraightThroughTopK(LinearRouter):
    """Softmax at a temperature, of which the k highest count.

    Args:
        dim: D.
        num_experts: E.
        config: Settings.
    """

    def __init__(self, dim: int, num_experts: int, config: StraightThroughTopKConfig) -> None:
        check_top_k(config.top_k, num_experts)
        super().__init__(dim, num_experts)
        self.config = config

    def forward(self, h_TD: Tensor, state: RouterState | None = None) -> Routing:
        """Route each token to its top k.

        Args:
            h_TD: Inputs, [T, D].
            state: Ignored.

        Returns:
            K = top_k slots, most probable first; scores are the logits over the temperature, so
            that losses see the probabilities of the gate.
        """
        scores_TE = linear_scores(h_TD, self.weight) / self.config.temperature
        # By scores: probabilities tie at high temperatures.
        ids_TK = scores_TE.topk(self.config.top_k, dim=-1).indices
        weights_TK = scores_TE.softmax(-1).gather(1, ids_TK)
        if self.config.weight == "one":
            # The difference is exactly zero.
            weights_TK = 1 + (weights_TK - weights_TK.detach())
        return Routing(ids_TK, weights_TK, scores_TE, self.num_experts)

    def extra_repr(self) -> str:
        """Sizes and settings, for printing."""
        return (
            f"experts={self.num_experts}, top_k={self.config.top_k}, "
            f"temperature={self.config.temperature:g}, weight={self.config.weight}"
        )
