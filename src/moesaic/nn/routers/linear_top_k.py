"""The k highest linear scores, each chosen expert weighing one.

Source: ours, for experts cut out of one network, whose sum is that network; ExpertWeaver, arXiv
2602.15521, builds the rows of its router from the gate rows of the neurons.

Shapes: T tokens, D model width, E experts, K experts per token.
"""

from __future__ import annotations

from torch import Tensor

from moesaic.nn.routers._base import (
    LinearRouter,
    RouterState,
    TopKConfig,
    check_top_k,
    highest_at_one,
    linear_scores,
)
from moesaic.nn.routing import Routing
from moesaic.ops.choice import Choice


class LinearTopK(LinearRouter):
    """Top-k of a linear map.

    Args:
        dim: D.
        num_experts: E.
        config: Settings.
    """

    def __init__(self, dim: int, num_experts: int, config: TopKConfig) -> None:
        check_top_k(config.top_k, num_experts)
        super().__init__(dim, num_experts)
        self.config = config

    def forward(self, h_TD: Tensor, state: RouterState | None = None) -> Routing:
        """Route each token to its top k.

        Args:
            h_TD: Inputs, [T, D].
            state: Ignored.

        Returns:
            K = top_k slots, highest first, each of weight one.
        """
        return highest_at_one(linear_scores(h_TD, self.weight), self.config.top_k)

    def choice(self) -> Choice:
        """The highest scores, at one."""
        return Choice("highest", "one", top_k=self.config.top_k)

    def extra_repr(self) -> str:
        """Sizes and settings, for printing."""
        return f"experts={self.num_experts}, top_k={self.config.top_k}"
