"""Experts drawn at random: nothing is learned, nothing needs balance.

Source: THOR, arXiv 2110.04260. In training one expert is drawn for the whole batch, anew in every
layer and pass; the loss `consistency` makes the experts interchangeable, so that any draw works in
evaluation: one for every token, or one for every sequence. The authors' code for the second draws
one for every position of all sequences; this is the paper. Ours: the mean over all experts, and the
draws of sequences, which follow a seed, so that one which is written token by token keeps its own.

Shapes: T tokens, B sequences, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from moesaic._errors import InputError
from moesaic.nn.routers._base import Router, RouterState
from moesaic.nn.routing import Routing


@dataclass(frozen=True, slots=True, kw_only=True)
class StochasticConfig:
    """Settings of the draw.

    Attributes:
        evaluation: What draws in evaluation: each `token`, from torch's global generator; each
            `sequence`, by its place in the batch, from `seed`; or `all` experts count as one mean.
        seed: Of the draws of sequences.
    """

    evaluation: Literal["token", "sequence", "all"] = "token"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise InputError(f"seed must be at least 0, got {self.seed}; each gives other draws")


class Stochastic(Router):
    """THOR's random choice.

    Args:
        dim: D, which the draw ignores.
        num_experts: E.
        config: Settings.
    """

    def __init__(self, dim: int, num_experts: int, config: StochasticConfig) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.config = config
        self.reads_sequences = config.evaluation == "sequence"
        # Number of the layer, so that each has draws of its own.
        self.position = 0

    def reset_parameters(self) -> None:
        """Do nothing: there are none."""

    def link(self, routers: Sequence[Router]) -> None:
        """Learn which layer it is in."""
        self.position = [router is self for router in routers].index(True)

    def forward(self, h_TD: Tensor, state: RouterState | None = None) -> Routing:
        """Draw one expert: for the batch in training, else for each token or sequence.

        Args:
            h_TD: Inputs, [T, D]; only their number matters.
            state: Holds the number of sequences, where each draws.

        Returns:
            One slot of weight one, or K = E slots of weight 1 / E; scores are zero.

        Raises:
            InputError: If sequences draw and their number is not known.
        """
        num_tokens, device = h_TD.shape[0], h_TD.device
        if self.training:
            ids_TK = torch.randint(self.num_experts, (1, 1), device=device).expand(num_tokens, 1)
        elif self.config.evaluation == "token":
            ids_TK = torch.randint(self.num_experts, (num_tokens, 1), device=device)
        elif self.config.evaluation == "sequence":
            ids_TK = self._by_sequence(num_tokens, state).to(device)
        else:
            ids_TK = torch.arange(self.num_experts, device=device).expand(num_tokens, -1)
        scores_TE = torch.zeros(
            num_tokens,
            self.num_experts,
            device=device,
            dtype=torch.promote_types(h_TD.dtype, torch.float32),
        )
        weights_TK = torch.full_like(ids_TK, 1 / ids_TK.shape[1], dtype=scores_TE.dtype)
        return Routing(ids_TK, weights_TK, scores_TE, self.num_experts)

    def _by_sequence(self, num_tokens: int, state: RouterState | None) -> Tensor:
        num_sequences = None if state is None else state.num_sequences
        if num_sequences is None or num_tokens % max(1, num_sequences):
            raise InputError(
                f"evaluation 'sequence' needs to know the sequences of {num_tokens} tokens, got "
                f"{num_sequences}; run the router in its MoELayer, on [B, S, D]"
            )
        seed = self.config.seed * 1_000_003 + self.position
        draw = torch.Generator().manual_seed(seed)
        ids_B1 = torch.randint(self.num_experts, (num_sequences, 1), generator=draw)
        return ids_B1.repeat_interleave(num_tokens // max(1, num_sequences), 0)

    def extra_repr(self) -> str:
        """Sizes and settings, for printing."""
        return f"experts={self.num_experts}, evaluation={self.config.evaluation}"
