"""MoEfication's router: a small network scores the experts, and the chosen ones weigh one.

Source: MoEfication, arXiv 2110.01786, section 3.3: inputs of unit length, a linear map to E values,
their tanh and a map of these, no bias; the k highest run unscaled. Ours: the gradient of the
weights (`highest_at_one`); the paper trains the router beforehand and never with the model.

Shapes: T tokens, D model width, E experts, K experts per token.
"""

from __future__ import annotations

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from moesaic.nn.routers._base import (
    Router,
    RouterState,
    TopKConfig,
    check_top_k,
    highest_at_one,
    linear_scores,
)
from moesaic.nn.routing import Routing


class MlpTopK(Router):
    """MoEfication's learned router.

    Args:
        dim: D.
        num_experts: E.
        config: Settings.
    """

    def __init__(self, dim: int, num_experts: int, config: TopKConfig) -> None:
        check_top_k(config.top_k, num_experts)
        super().__init__()
        self.num_experts = num_experts
        self.config = config
        self.weight = nn.Parameter(torch.empty(num_experts, dim))
        self.mix = nn.Parameter(torch.empty(num_experts, num_experts))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw a small random first map; the second starts as the identity."""
        nn.init.normal_(self.weight, std=0.02)
        nn.init.eye_(self.mix)

    def forward(self, h_TD: Tensor, state: RouterState | None = None) -> Routing:
        """Route each token to its top k.

        Args:
            h_TD: Inputs, [T, D].
            state: Ignored.

        Returns:
            K = top_k slots, highest first, each of weight one.
        """
        return highest_at_one(self.scores(h_TD), self.config.top_k)

    def scores(self, h_TD: Tensor) -> Tensor:
        """Score every expert, [T, E], in float32 or better."""
        unit_TD = nnf.normalize(h_TD.to(torch.promote_types(h_TD.dtype, torch.float32)), dim=-1)
        return linear_scores(linear_scores(unit_TD, self.weight).tanh(), self.mix)

    def extra_repr(self) -> str:
        """Sizes and settings, for printing."""
        return f"experts={self.num_experts}, top_k={self.config.top_k}"
