"""Which row does what: slots sorted by expert once, and the row tiles of every kernel.

All on the device and without asking it anything: sizes are bounds that the host knows, so nothing
waits for the router.

Shapes: T tokens, K slots per token, N = T * K rows, E experts, M row tiles at most.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Plan(NamedTuple):
    """The slots of one call in the order of their experts; int32.

    Attributes:
        slot_N: Slot of each row, t * K + k. Rows are sorted by expert, empty slots last.
        row_TK: Row of each slot; -1 where it is empty.
        bounds: [E + 1]; rows bounds[e] to bounds[e + 1] are those of expert e.
        tile_expert_M: Expert of each row tile; E where the tile is not needed.
        tile_row_M: First row of each row tile.
    """

    slot_N: Tensor
    row_TK: Tensor
    bounds: Tensor
    tile_expert_M: Tensor
    tile_row_M: Tensor


def make_plan(ids_TK: Tensor, num_experts: int, tile_rows: int) -> Plan:
    """Sort the slots by expert and cut each expert's rows into tiles.

    Args:
        ids_TK: Expert of each slot, [T, K]; an id outside [0, E) is an empty slot.
        num_experts: E.
        tile_rows: Rows of a tile.
    """
    # The layout of the ids would be that of row_TK, which kernels read in order.
    ids_TK = ids_TK.contiguous()
    device, N = ids_TK.device, ids_TK.numel()
    held_TK = (ids_TK >= 0) & (ids_TK < num_experts)
    ids_N = torch.where(held_TK, ids_TK, num_experts).flatten()
    sorted_N, slot_N = ids_N.sort(stable=True)
    bounds = torch.searchsorted(sorted_N, torch.arange(num_experts + 1, device=device))
    row_N = torch.empty_like(slot_N).scatter_(0, slot_N, torch.arange(N, device=device))
    row_TK = torch.where(held_TK, row_N.view_as(ids_TK), -1)
    tiles_E = (bounds.diff() + tile_rows - 1) // tile_rows
    ends_E = tiles_E.cumsum(0)
    # Every expert wastes less than one tile, and every tile has a row.
    tile_M = torch.arange(min(N, N // tile_rows + num_experts), device=device)
    expert_M = torch.searchsorted(ends_E, tile_M, right=True)
    real_M = expert_M.clamp(max=num_experts - 1)
    tile_row_M = bounds[real_M] + (tile_M - (ends_E - tiles_E)[real_M]) * tile_rows
    return Plan(*(x.to(torch.int32) for x in (slot_N, row_TK, bounds, expert_M, tile_row_M)))
