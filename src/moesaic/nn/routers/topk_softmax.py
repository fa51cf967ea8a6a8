"""The k most probable experts of each token.

Source: sparsely-gated MoE, arXiv 1701.06538, section 2.1, without its noise; with
renormalisation it is Mixtral's router, arXiv 2401.04088, without it Qwen-MoE's.

Shapes: T tokens, D model width, E experts, K experts per token.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from moesaic._errors import InputError
from moesaic.nn.routers._base import LinearRouter, RouterState, check_top_k, linear_scores
from moesaic.nn.routing import Routing
from moesaic.ops.choice import Choice, Normalize


@dataclass(frozen=True, slots=True, kw_only=True)
class TopKSoftmaxConfig:
    """Settings of the top-k router.

    Attributes:
        top_k: Experts per token.
        renormalize: Whether the chosen weights sum to one.
    """

    top_k: int = 2
    renormalize: bool = True

    def __post_init__(self) -> None:
        if self.top_k < 1:
            raise InputError(f"top_k must be at least 1, got {self.top_k}; choose 1 to num_experts")


class TopKSoftmax(LinearRouter):
    """Softmax over all experts in float32, then the top k.

    Args:
        dim: D.
        num_experts: E.
        config: Settings.
    """

    def __init__(self, dim: int, num_experts: int, config: TopKSoftmaxConfig) -> None:
        check_top_k(config.top_k, num_experts)
        super().__init__(dim, num_experts)
        self.config = config

    def forward(self, h_TD: Tensor, state: RouterState | None = None) -> Routing:
        """Route each token to its top k.

        Args:
            h_TD: Inputs, [T, D].
            state: Ignored.

        Returns:
            K = top_k slots, most probable first; scores are the logits.
        """
        scores_TE = linear_scores(h_TD, self.weight)
        weights_TK, ids_TK = scores_TE.softmax(-1).topk(self.config.top_k, dim=-1)
        if self.config.renormalize:
            weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
        return Routing(ids_TK, weights_TK, scores_TE, self.num_experts)

    def choice(self) -> Choice:
        """The highest scores, which are the most probable experts."""
        normalize: Normalize = "sum" if self.config.renormalize else "none"
        return Choice("highest", "softmax", top_k=self.config.top_k, normalize=normalize)

    def extra_repr(self) -> str:
        """Sizes and settings, for printing."""
        return f"experts={self.num_experts}, top_k={self.config.top_k}"
