"""Top-k over real and null experts: a null expert does nothing, so k becomes an upper bound.

Source: AdaMoE, arXiv 2406.13233, section 3. Ties go to the lower index, real experts first, so
that the count does not depend on the kernel.

Shapes: T tokens, D model width, E real experts, M null experts, K slots.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moesaic._errors import InputError
from moesaic.nn.routers._base import LinearRouter, RouterState, linear_scores
from moesaic.nn.routing import Routing
from moesaic.ops.choice import Choice


@dataclass(frozen=True, slots=True, kw_only=True)
class NullExpertsConfig:
    """Settings of the router with null experts.

    Attributes:
        num_null: Null experts M. At balance a token uses top_k * E / (E + M) real experts.
        top_k: Slots among real and null experts.
    """

    num_null: int = 8
    top_k: int = 3

    def __post_init__(self) -> None:
        if self.num_null < 0:
            raise InputError(f"num_null must be at least 0, got {self.num_null}; 8 is usual")
        if self.top_k < 1:
            raise InputError(f"top_k must be at least 1, got {self.top_k}; 3 is usual")


class NullExperts(LinearRouter):
    """AdaMoE's router.

    Args:
        dim: D.
        num_experts: E, the real experts.
        config: Settings.
    """

    def __init__(self, dim: int, num_experts: int, config: NullExpertsConfig) -> None:
        total = num_experts + config.num_null
        if config.top_k > total:
            raise InputError(
                f"top_k must be in [1, num_experts + num_null={total}], got {config.top_k}; "
                "lower it or add null experts"
            )
        super().__init__(dim, num_experts, num_scores=total)
        self.config = config

    def forward(self, h_TD: Tensor, state: RouterState | None = None) -> Routing:
        """Route each token to at most top_k real experts, possibly none.

        Args:
            h_TD: Inputs, [T, D].
            state: Ignored.

        Returns:
            K = top_k slots, empty where a null expert was chosen; the weights of a token's real
            experts sum to one. scores_TE has M more columns, those of the null experts.
        """
        scores_TE = linear_scores(h_TD, self.weight)
        sorted_TE, order_TE = scores_TE.sort(dim=-1, descending=True, stable=True)
        scores_TK, ids_TK = sorted_TE[:, : self.config.top_k], order_TE[:, : self.config.top_k]
        real_TK = ids_TK < self.num_experts
        # The softmax of the chosen real scores is the renormalised softmax of all, and does not
        # vanish where null scores are far above; a finite floor keeps the gradient finite.
        floor = torch.finfo(scores_TK.dtype).min
        weights_TK = torch.where(real_TK, scores_TK, floor).softmax(-1) * real_TK
        ids_TK = torch.where(real_TK, ids_TK, self.num_experts)
        return Routing(ids_TK, weights_TK, scores_TE, self.num_experts)

    def choice(self) -> Choice:
        """The highest scores; those of null experts stand for none."""
        return Choice(
            "highest", "softmax", top_k=self.config.top_k, normalize="sum", lowest_first=True
        )

    def extra_repr(self) -> str:
        """Sizes and settings, for printing."""
        return f"experts={self.num_experts}, null={self.config.num_null}, top_k={self.config.top_k}"
