"""A fixed number of slots for tokens that use any number of blocks.

Shapes: T tokens, D model width, E experts, M experts of a process, K slots per token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moesaic.nn.routers._base import Router
from moesaic.nn.routing import Routing


def slots_of(weights_TE: Tensor, num_slots: int) -> tuple[Tensor, Tensor]:
    """Turn the weights of all blocks into slots, distinct blocks each.

    Args:
        weights_TE: Zero where a block is off.
        num_slots: K, at least as many as any token has blocks on.

    Returns:
        Weights and block ids, [T, K] each.
    """
    num_experts = weights_TE.shape[1]
    if num_slots == num_experts:
        return weights_TE, torch.arange(num_experts, device=weights_TE.device).expand_as(weights_TE)
    ids_TK = weights_TE.abs().topk(num_slots, dim=-1).indices
    return weights_TE.gather(1, ids_TK), ids_TK


class SlotRouting:
    """What vLLM asks of a routing function.

    Attributes:
        mine_M: Blocks of which this process alone computes slots, in the order in which it holds
            them, ids being places in that order; all blocks by their own ids if none.
    """

    def __init__(self) -> None:
        self.mine_M: Tensor | None = None

    def hold(self, place_E: Tensor) -> None:
        """Compute the slots of some blocks alone.

        Args:
            place_E: Where this process holds each block; negative if another one does.
        """
        order_E = place_E.argsort()
        self.mine_M = order_E[place_E[order_E] >= 0]

    def __call__(
        self, hidden_states: Tensor, gating_output: Tensor, topk: int, renormalize: bool
    ) -> tuple[Tensor, Tensor]:
        """Give weights and block ids, [T, K] each, under vLLM's names of arguments."""
        if self.mine_M is not None:
            gating_output = gating_output[:, self.mine_M]
            topk = min(topk, len(self.mine_M))
        return slots_of(gating_output, topk)


def num_slots(router: Router, dim: int) -> int:
    """Ask a router of width D for its number of slots, K: for one token, in evaluation mode."""
    weight = next(router.parameters())
    probe_TD = torch.zeros(1, dim, dtype=weight.dtype, device=weight.device)
    routing: Routing = router(probe_TD)
    return routing.ids_TK.shape[1]
