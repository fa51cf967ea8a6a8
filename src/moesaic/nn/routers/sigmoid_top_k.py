"""The k highest sigmoid gates; a bias takes part in the choice and not in the weight.

Source: DeepSeek-V3, arXiv 2412.19437, section 2.1.2 (equations 14 to 16), as GLM-4.5 and its
relatives use it: sigmoid gates, the highest of gate plus bias are chosen, each weighs its gate
times a factor. Left out: groups of experts, and the bias that moves in training; here it stays.

It is what a router with a threshold (`sigmoid-threshold`) becomes for software that knows a fixed
number of experts per token.

Shapes: T tokens, D model width, E experts, K experts per token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moesaic._errors import InputError
from moesaic.nn.routers._base import Router, RouterState, check_top_k, linear_scores
from moesaic.nn.routing import Routing


@dataclass(frozen=True, slots=True, kw_only=True)
class SigmoidTopKConfig:
    """Settings of the router.

    Attributes:
        top_k: Experts per token.
        scale: What every gate is multiplied by. E over `top_k` makes up for the experts that are
            off, as DSMoE does for as many.
    """

    top_k: int = 2
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.top_k < 1:
            raise InputError(f"top_k must be at least 1, got {self.top_k}; choose 1 to num_experts")
        if not 0.0 < self.scale < float("inf"):
            raise InputError(f"scale must be above 0, got {self.scale}; 1 leaves gates as they are")


class SigmoidTopK(Router):
    """Sigmoid gates, of which the k highest count.

    Args:
        dim: D.
        num_experts: E.
        config: Settings.

    Attributes:
        choice_bias: Added to the gates for the choice alone, [E] float32.
    """

    choice_bias: Tensor

    def __init__(self, dim: int, num_experts: int, config: SigmoidTopKConfig) -> None:
        check_top_k(config.top_k, num_experts)
        super().__init__()
        self.num_experts = num_experts
        self.config = config
        self.weight = nn.Parameter(torch.empty(num_experts, dim))
        self.register_buffer("choice_bias", torch.empty(num_experts, dtype=torch.float32))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw small random rows; no expert is preferred."""
        nn.init.normal_(self.weight, std=0.02)
        nn.init.zeros_(self.choice_bias)

    def forward(self, h_TD: Tensor, state: RouterState | None = None) -> Routing:
        """Route each token to its top k.

        Args:
            h_TD: Inputs, [T, D].
            state: Ignored.

        Returns:
            K = top_k slots, highest first; scores are the gate logits.
        """
        scores_TE = linear_scores(h_TD, self.weight)
        gates_TE = scores_TE.sigmoid()
        choice_TE = gates_TE.detach() + self.choice_bias.to(gates_TE.dtype)
        ids_TK = choice_TE.topk(self.config.top_k, dim=-1).indices
        weights_TK = gates_TE.gather(1, ids_TK) * self.config.scale
        return Routing(ids_TK, weights_TK, scores_TE, self.num_experts)

    def extra_repr(self) -> str:
        """Sizes and settings, for printing."""
        return f"experts={self.num_experts}, top_k={self.config.top_k}, scale={self.config.scale:g}"
