"""MoEfication's router without training: the experts whose centres are nearest to the token.

Source: MoEfication, arXiv 2110.01786, section 3.3 and its released code: the distance between the
input, scaled to unit length, and the centre of an expert, the mean of its neurons' unit rows; the
k nearest run unscaled. Ours: the gradient of the weights (`highest_at_one`).

Shapes: T tokens, D model width, E experts, K experts per token.
"""

from __future__ import annotations

import torch
import torch.nn.functional as nnf
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


class NearestTopK(LinearRouter):
    """The k nearest centres; `weight` holds them.

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
        """Route each token to its k nearest experts.

        Args:
            h_TD: Inputs, [T, D].
            state: Ignored.

        Returns:
            K = top_k slots, nearest first, each of weight one; a score is half of one less the
            squared distance.
        """
        dtype = torch.promote_types(h_TD.dtype, torch.float32)
        unit_TD = nnf.normalize(h_TD.to(dtype), dim=-1)
        # |x - c|^2 = 1 - 2 x c + |c|^2 for x of unit length.
        half_E = self.weight.to(dtype).square().sum(1) / 2
        scores_TE = linear_scores(unit_TD, self.weight, -half_E)
        return highest_at_one(scores_TE, self.config.top_k)

    def extra_repr(self) -> str:
        """Sizes and settings, for printing."""
        return f"experts={self.num_experts}, top_k={self.config.top_k}"
