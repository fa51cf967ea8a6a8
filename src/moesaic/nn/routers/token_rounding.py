"""Top-k whose count of every expert is rounded to whole tiles, so that products have no padding.

Source: SonicMoE's token rounding, arXiv 2512.14080: tokens choose their top k, then each expert
drops the weakest of them or takes the strongest others until it holds whole tiles of M tokens; one
tile at most changes hands. Chosen experts weigh their probability renormalised over the top k,
added ones their probability itself. A column of the batch decides, which is not causal: in
evaluation the router is plain top-k, as in the paper.

Shapes: T tokens, D model width, E experts, K slots (in training as many as any token needs).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from moesaic._errors import InputError
from moesaic.nn.routers._base import LinearRouter, RouterState, check_top_k, linear_scores
from moesaic.nn.routing import Routing

Rounding = Literal["nearest", "up", "down"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenRoundingConfig:
    """Settings of the router.

    Attributes:
        top_k: Experts that a token chooses before rounding.
        tile_rows: M, tokens of one tile of the kernel that computes the experts. Far more tokens
            than M * E / top_k should be in a batch: `nearest` and `down` drop an expert that is
            chosen by too few.
        rounding: `nearest` changes least, `up` only adds experts to tokens, `down` only drops.
    """

    top_k: int = 2
    tile_rows: int = 128
    rounding: Rounding = "nearest"

    def __post_init__(self) -> None:
        if self.top_k < 1:
            raise InputError(f"top_k must be at least 1, got {self.top_k}; choose 1 to num_experts")
        if self.tile_rows < 1:
            raise InputError(
                f"tile_rows must be at least 1, got {self.tile_rows}; 128 is the paper's"
            )


class TokenRounding(LinearRouter):
    """Softmax top-k with rounding in training; its weights are those of `topk-softmax`.

    Args:
        dim: D.
        num_experts: E.
        config: Settings.
    """

    def __init__(self, dim: int, num_experts: int, config: TokenRoundingConfig) -> None:
        check_top_k(config.top_k, num_experts)
        super().__init__(dim, num_experts)
        self.config = config

    def forward(self, h_TD: Tensor, state: RouterState | None = None) -> Routing:
        """Route each token to its top k; in training, round what each expert gets.

        Args:
            h_TD: Inputs, [T, D].
            state: Ignored.

        Returns:
            Slots in falling weight; scores are the logits. In training a token may hold fewer or
            more than top_k experts, and finding the largest number waits for the device once.
        """
        scores_TE = linear_scores(h_TD, self.weight)
        probs_TE = scores_TE.softmax(-1)
        weights_TK, ids_TK = probs_TE.topk(self.config.top_k, dim=-1)
        sum_T1 = weights_TK.sum(-1, keepdim=True)
        if not self.training:
            return Routing(ids_TK, weights_TK / sum_T1, scores_TE, self.num_experts)
        chosen_TE = torch.zeros_like(probs_TE, dtype=torch.bool).scatter(1, ids_TK, True)
        weights_TE = torch.where(chosen_TE, probs_TE / sum_T1, probs_TE)
        keep_TE = self._round(chosen_TE, weights_TE.detach())
        weights_TE, order_TE = torch.where(keep_TE, weights_TE, -1.0).sort(
            dim=-1, descending=True, stable=True
        )
        most = int(keep_TE.sum(1).max()) if h_TD.shape[0] else 0
        num_slots = max(most, self.config.top_k)
        weights_TK, ids_TK = weights_TE[:, :num_slots], order_TE[:, :num_slots]
        held_TK = weights_TK >= 0
        return Routing(
            torch.where(held_TK, ids_TK, self.num_experts),
            torch.where(held_TK, weights_TK, 0.0),
            scores_TE,
            self.num_experts,
        )

    def _round(self, chosen_TE: Tensor, weights_TE: Tensor) -> Tensor:
        """Say which tokens each expert keeps: as many as make whole tiles, or all T."""
        tiles_E = chosen_TE.sum(0) / self.config.tile_rows
        match self.config.rounding:
            case "up":
                tiles_E = tiles_E.ceil()
            case "down":
                tiles_E = tiles_E.floor()
            case "nearest":
                tiles_E = tiles_E.round()
        # Chosen tokens come before all others, whose keys are negative.
        keys_TE = torch.where(chosen_TE, weights_TE, weights_TE - 1.0)
        order_TE = keys_TE.argsort(dim=0, descending=True, stable=True)
        place_T1 = torch.arange(len(order_TE), device=order_TE.device).unsqueeze(1)
        rank_TE = torch.empty_like(order_TE).scatter(0, order_TE, place_T1.expand_as(order_TE))
        return rank_TE < tiles_E * self.config.tile_rows

    def extra_repr(self) -> str:
        """Sizes and settings, for printing."""
        return (
            f"experts={self.num_experts}, top_k={self.config.top_k}, "
            f"tile_rows={self.config.tile_rows}, rounding={self.config.rounding}"
        )
