"""Routing: what a router decides, for any number of experts per token.

Shapes: T tokens, K slots per token, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from moesaic.ops.select import spread


@dataclass(frozen=True, slots=True)
class Routing:
    """The experts of every token.

    A slot holds an expert id and its weight; an empty slot has id E and weight 0. A token uses
    as many experts as it has slots of non-zero weight, so the number varies by token. The
    convention is that of transformers' experts interface.

    Attributes:
        ids_TK: Expert of each slot, [T, K] int64 in [0, E].
        weights_TK: Weight of each slot, [T, K]. A held slot of weight exactly 0 is computed in
            training, for its gradient, and counts as switched off.
        scores_TE: What the router scored before deciding, raw. Null and free experts add
            columns after E, as noise does in training.
        num_experts: E.
        aux: Scalar losses that only the router itself can compute, by name; where a routing is
            recorded, those of the experts that it drove, too.
        free_weights_TZ: Weights of the experts without neurons that stand beside the E, [T, Z],
            zero where not chosen; they take no slot. None where the router has none.
        memory_TM: What a router with a memory hands to that of the next layer, [T, M].
    """

    ids_TK: Tensor
    weights_TK: Tensor
    scores_TE: Tensor
    num_experts: int
    aux: Mapping[str, Tensor] = field(default_factory=dict)
    free_weights_TZ: Tensor | None = None
    memory_TM: Tensor | None = None

    def weights_TE(self) -> Tensor:
        """Weight of every expert for every token, [T, E]."""
        return spread(self.ids_TK, self.weights_TK, self.num_experts)

    def active_TE(self) -> Tensor:
        """Whether a token uses an expert, [T, E] bool."""
        on_TK = (self.ids_TK < self.num_experts) & (self.weights_TK != 0)
        return spread(self.ids_TK, on_TK.to(torch.int64), self.num_experts) > 0

    def charge(self, losses: Mapping[str, Tensor]) -> Routing:
        """The same with more scalar losses; those of one name add up."""
        aux = dict(self.aux)
        for name, loss in losses.items():
            aux[name] = aux[name] + loss if name in aux else loss
        return replace(self, aux=aux)

    def split(self, num_parts: int) -> list[Routing]:
        """The same slots for equal parts of the experts; each finds those of the others empty.

        Returns:
            One routing for each part, whose scores are those of all experts.
        """
        size = self.num_experts // num_parts
        parts = []
        for first in range(0, self.num_experts, size):
            held_TK = (self.ids_TK >= first) & (self.ids_TK < first + size)
            ids_TK = torch.where(held_TK, self.ids_TK - first, size)
            parts.append(
                replace(self, ids_TK=ids_TK, weights_TK=self.weights_TK * held_TK, num_experts=size)
            )
        return parts

    def counts_E(self, mask_T: Tensor | None = None) -> Tensor:
        """Tokens that use each expert, [E] int64; `mask_T` leaves padding out."""
        active_TE = self.active_TE()
        if mask_T is not None:
            active_TE = active_TE & mask_T.unsqueeze(1)
        return active_TE.sum(0)

    def active_T(self) -> Tensor:
        """Experts that each token uses, [T] int64."""
        return self.active_TE().sum(1)
