"""Tokens ask for experts, and each expert takes its share of every sequence.

Source: Union of Experts, arXiv 2503.02495, "data selection": softmax over experts, a token asks for
its top k, and an expert takes those of a sequence that score it highest, up to a fixed part of the
sequence. The experts are parts of one network, so their outputs are summed.

Where we differ from the released code: it sums outputs at weight one, so that nothing ever trains
the gate (`weight` of `none`; ours weighs by the score). It divides scores by their sum over the
batch, which makes a token's experts depend on other sequences; and it fills the share of an expert
that few tokens ask for with tokens that did not. We do neither.

Below a capacity of 1 a token's experts depend on the tokens of its sequence that come later: a
causal language model then sees the future in training and in evaluation by whole windows, and does
not when it writes. At 1 every token has the experts that it asks for, and this is causal.

Shapes: T tokens, B sequences, S positions, D model width, E experts, K experts per token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from moesaic._errors import InputError
from moesaic.nn.routers._base import LinearRouter, RouterState, check_top_k, linear_scores
from moesaic.nn.routing import Routing


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSelectionConfig:
    """Settings of the router.

    Attributes:
        top_k: Experts that a token asks for.
        capacity: Part of a sequence that an expert takes at most; the paper's language models use
            0.5. Only 1 is causal.
        weight: `score` weighs an expert by its probability; `none` by one, as in the released code,
            whose gate stays as it was drawn.
    """

    top_k: int = 2
    capacity: float = 0.5
    weight: Literal["score", "none"] = "score"

    def __post_init__(self) -> None:
        if self.top_k < 1:
            raise InputError(f"top_k must be at least 1, got {self.top_k}; choose 1 to num_experts")
        if not 0.0 < self.capacity <= 1.0:
            raise InputError(f"capacity must be in (0, 1], got {self.capacity}; 1 is causal")


class DataSelection(LinearRouter):
    """The router of Union of Experts.

    Args:
        dim: D.
        num_experts: E.
        config: Settings.
    """

    def __init__(self, dim: int, num_experts: int, config: DataSelectionConfig) -> None:
        check_top_k(config.top_k, num_experts)
        super().__init__(dim, num_experts)
        self.config = config
        self.reads_sequences = config.capacity < 1.0

    def forward(self, h_TD: Tensor, state: RouterState | None = None) -> Routing:
        """Let tokens ask and experts take; ties go to the lower expert and the earlier token.

        Args:
            h_TD: Inputs, [T, D], the tokens of a sequence one after another.
            state: Its `num_sequences` says how many the tokens make; one if it does not.

        Returns:
            K = top_k slots, highest first, empty where an expert had no room; scores are logits.
        """
        scores_TE = linear_scores(h_TD, self.weight)
        gates_TE = scores_TE.softmax(-1)
        order_TE = scores_TE.argsort(dim=-1, descending=True, stable=True)
        ids_TK = order_TE[:, : self.config.top_k]
        weights_TK = gates_TE.gather(1, ids_TK)
        if self.config.weight == "none":
            weights_TK = torch.ones_like(weights_TK)
        if self.reads_sequences and h_TD.shape[0]:
            num_sequences = (None if state is None else state.num_sequences) or 1
            taken_TK = self._taken(gates_TE.detach(), ids_TK, len(h_TD) // num_sequences)
            ids_TK = torch.where(taken_TK, ids_TK, self.num_experts)
            weights_TK = weights_TK.masked_fill(~taken_TK, 0.0)
        return Routing(ids_TK, weights_TK, scores_TE, self.num_experts)

    def _taken(self, gates_TE: Tensor, ids_TK: Tensor, length: int) -> Tensor:
        """Whether the expert of a slot has room for the token, [T, K] bool."""
        asked_TE = torch.zeros_like(gates_TE, dtype=torch.bool).scatter(1, ids_TK, True)
        bids_BSE = gates_TE.masked_fill(~asked_TE, -1.0).unflatten(0, (-1, length))
        order_BSE = bids_BSE.argsort(dim=1, descending=True, stable=True)
        # The inverse of an order is everybody's place in it.
        place_TE = order_BSE.argsort(dim=1).flatten(0, 1)
        room = max(1, int(self.config.capacity * length))
        taken_TK: Tensor = (place_TE < room).gather(1, ids_TK)
        return taken_TK

    def extra_repr(self) -> str:
        """Sizes and settings, for printing."""
        return (
            f"experts={self.num_experts}, top_k={self.config.top_k}, "
            f"capacity={self.config.capacity:g}, weight={self.config.weight}"
        )
