"""Every expert picks its tokens, so that all carry equal load by construction.

Source: "Mixture-of-Experts with Expert Choice Routing", arXiv 2202.09368, section 3.1: softmax over
experts, then each expert takes the k tokens that give it the highest probability, weighing it, with
k = T c / E for a capacity factor c, the mean number of experts per token. Left out: the bound on
experts per token of section 3.2.

A decision depends on all tokens of the pass: those of other sequences and, in a language model,
those that come later. Losses measured so are of a model that looked ahead, and decoding one token
at a time gives that token to every expert. It suits encoders and vision.

Shapes: T tokens, D model width, E experts, C tokens per expert.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moesaic._errors import InputError
from moesaic.nn.routers._base import LinearRouter, RouterState, linear_scores
from moesaic.nn.routing import Routing


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertChoiceConfig:
    """Settings of the router.

    Attributes:
        capacity: Experts that a token has on average, at most E; 2 costs what top-2 costs.
    """

    capacity: float = 2.0

    def __post_init__(self) -> None:
        if not 0.0 < self.capacity < float("inf"):
            raise InputError(
                f"capacity must be above 0, got {self.capacity}; 2 gives a token 2 experts on "
                "average"
            )


class ExpertChoice(LinearRouter):
    """Routing in which experts choose.

    Args:
        dim: D.
        num_experts: E.
        config: Settings.
    """

    def __init__(self, dim: int, num_experts: int, config: ExpertChoiceConfig) -> None:
        if config.capacity > num_experts:
            raise InputError(
                f"capacity must be in (0, num_experts={num_experts}], got {config.capacity:g}; "
                "lower it"
            )
        super().__init__(dim, num_experts)
        self.config = config

    def forward(self, h_TD: Tensor, state: RouterState | None = None) -> Routing:
        """Let each expert take its tokens; ties go to the earlier token.

        Args:
            h_TD: Inputs, [T, D], all tokens of a pass.
            state: Ignored.

        Returns:
            K = E slots, expert by expert, empty where an expert did not take the token; scores are
            the logits.
        """
        scores_TE = linear_scores(h_TD, self.weight)
        probs_TE = scores_TE.softmax(-1)
        num_tokens = probs_TE.shape[0]
        # Fewer tokens than an expert's share still get an expert.
        per_expert = min(
            num_tokens, max(1, round(num_tokens * self.config.capacity / self.num_experts))
        )
        # Of tied tokens a sort keeps the order, top-k does not.
        order_TE = probs_TE.detach().argsort(dim=0, descending=True, stable=True)
        taken_CE = order_TE[:per_expert]
        chosen_TE = torch.zeros_like(probs_TE, dtype=torch.bool).scatter(0, taken_CE, True)
        ids_E = torch.arange(self.num_experts, device=h_TD.device)
        ids_TK = torch.where(chosen_TE, ids_E, self.num_experts)
        return Routing(ids_TK, probs_TE * chosen_TE, scores_TE, self.num_experts)

    def extra_repr(self) -> str:
        """Sizes and settings, for printing."""
        return f"experts={self.num_experts}, capacity={self.config.capacity:g}"
