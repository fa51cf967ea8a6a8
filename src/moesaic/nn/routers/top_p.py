"""Experts are added, most probable first, until their probability reaches a threshold.

Source: "Harder Tasks Need More Experts", arXiv 2403.07652, section 3: the expert that crosses the
threshold is included and the weights are the probabilities themselves, not renormalised. Like its
authors' code, a prefix must exceed the threshold, where the paper's formula says reach.

Shapes: T tokens, D model width, E experts.
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
class TopPConfig:
    """Settings of the top-p router.

    Attributes:
        threshold: Probability to gather; the paper uses 0.4 and tried 0.1 to 0.7. At 1 every
            expert runs.
    """

    threshold: float = 0.4

    def __post_init__(self) -> None:
        if not 0.0 <= self.threshold <= 1.0:
            raise InputError(
                f"threshold must be in [0, 1], got {self.threshold}; 0.4 is the paper's"
            )


class TopP(LinearRouter):
    """Dynamic routing by cumulative probability.

    Args:
        dim: D.
        num_experts: E.
        config: Settings.
    """

    def __init__(self, dim: int, num_experts: int, config: TopPConfig) -> None:
        super().__init__(dim, num_experts)
        self.config = config

    def forward(self, h_TD: Tensor, state: RouterState | None = None) -> Routing:
        """Route each token to as few experts as its confidence allows, and at least one.

        Args:
            h_TD: Inputs, [T, D].
            state: Ignored.

        Returns:
            K = E slots, most probable first, empty after the crossing one; scores are logits.
        """
        scores_TE = linear_scores(h_TD, self.weight)
        weights_TE, ids_TE = scores_TE.softmax(-1).sort(dim=-1, descending=True, stable=True)
        if self.config.threshold >= 1.0:
            # A rounded sum may pass 1 early; the rule at 1 is every expert.
            keep_TE = torch.ones_like(ids_TE, dtype=torch.bool)
        else:
            before_TE = weights_TE.detach().cumsum(-1).roll(1, -1)
            before_TE[:, :1] = 0.0
            keep_TE = before_TE <= self.config.threshold
        ids_TE = torch.where(keep_TE, ids_TE, self.num_experts)
        return Routing(ids_TE, weights_TE * keep_TE, scores_TE, self.num_experts)

    def choice(self) -> Choice:
        """As many as the threshold asks for."""
        return Choice("cumulated", "softmax", threshold=self.config.threshold)

    def extra_repr(self) -> str:
        """Sizes and settings, for printing."""
        return f"experts={self.num_experts}, threshold={self.config.threshold}"
