"""Sizes of the tiles and the dtypes of the sums; this module needs triton.

A small table instead of a search: a search costs the first calls of every new shape, and its
choices were once wrong for one device (SonicMoE's issue 63).

Shapes: N rows, E experts.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor


class Tiles(NamedTuple):
    """Sizes of the tiles of one call.

    Attributes:
        rows: Rows of a product's tile; no tile crosses an expert.
        columns: Columns of a tile.
        backward_columns: Columns of a tile of the down product's backward pass, whose end holds
            several tiles in registers at once.
        inner: Length multiplied at a time.
        tokens: Tokens of a program that sums rows.
        features: Features of a program that sums rows.
        num_warps: Warps of a program that multiplies.
        num_stages: Tiles in flight.
    """

    rows: int
    columns: int
    backward_columns: int
    inner: int
    tokens: int = 1
    features: int = 1024
    num_warps: int = 4
    num_stages: int = 3

    def product(self, columns: int) -> dict[str, int]:
        """Options of the kernels that make rows, so many columns at a time."""
        return {
            "BLOCK_R": self.rows,
            "BLOCK_C": columns,
            "BLOCK_I": self.inner,
            "GROUP": 8,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }

    def gradient(self) -> dict[str, int]:
        """Options of the kernel that sums over rows; both sides of its tile are of weights."""
        return {
            "BLOCK_C": self.columns,
            "BLOCK_I": self.columns,
            "BLOCK_R": self.inner,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }


def choose_tiles(x: Tensor, num_rows: int, num_experts: int) -> Tiles:
    """Choose tiles from what the host knows: device, dtype and the mean rows of an expert."""
    if x.device.type != "cuda":
        # The interpreter: small, so that small tests have several tiles of each kind.
        return Tiles(rows=64, columns=16, backward_columns=16, inner=32, tokens=64, features=16)
    if x.itemsize == 8:
        return Tiles(rows=32, columns=32, backward_columns=32, inner=16)
    if x.itemsize == 4:
        return Tiles(rows=64, columns=64, backward_columns=32, inner=32)
    # A tile taller than the rows of an expert multiplies padding.
    mean_rows = num_rows // num_experts
    if mean_rows < 32:
        return Tiles(rows=16, columns=128, backward_columns=64, inner=64)
    if mean_rows < 256:
        return Tiles(rows=64, columns=128, backward_columns=64, inner=64)
    return Tiles(rows=128, columns=128, backward_columns=64, inner=64, num_warps=8)


def arithmetic(x: Tensor) -> dict[str, Any]:
    """Dtypes of sums and of multiplied tiles, and the precision of float32 products."""
    wide = tl.float64 if x.dtype == torch.float64 else tl.float32
    operands = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
    exact = torch.get_float32_matmul_precision() == "highest"
    return {
        "ACC": wide,
        # numpy, which is what the interpreter multiplies with, has no bfloat16.
        "OPERAND": operands.get(x.dtype, wide) if x.device.type == "cuda" else wide,
        "PRECISION": "ieee" if exact else "tf32",
    }
