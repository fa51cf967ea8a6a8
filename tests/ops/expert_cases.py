"""Cases that the tests of the expert paths share: sizes, patterns of ids, gradients by name.

Shapes: T tokens, K slots per token, E experts, F width of one expert, D model width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from moesaic.ops.weights import ExpertWeights


class Inputs(NamedTuple):
    """One call of an expert path."""

    h_TD: Tensor
    ids_TK: Tensor
    weights_TK: Tensor
    weights: ExpertWeights

    def to(self, dtype: torch.dtype) -> Inputs:
        """Cast all but the ids."""
        w = self.weights
        cast = w._replace(
            up=w.up.to(dtype),
            down=w.down.to(dtype),
            up_bias=None if w.up_bias is None else w.up_bias.to(dtype),
            down_bias=None if w.down_bias is None else w.down_bias.to(dtype),
        )
        return Inputs(self.h_TD.to(dtype), self.ids_TK, self.weights_TK.to(dtype), cast)


@dataclass(frozen=True, kw_only=True)
class Case:
    """Sizes of one call, and the pattern of its ids."""

    T: int = 63
    D: int = 17
    E: int = 6
    K: int = 3
    F: int = 5
    gated: bool = True
    bias: bool = False
    pattern: str = "mixed"

    def __str__(self) -> str:
        kind = ("gated" if self.gated else "plain") + ("-bias" if self.bias else "")
        return f"T{self.T}-D{self.D}-E{self.E}-K{self.K}-F{self.F}-{kind}-{self.pattern}"

    def inputs(self, dtype: torch.dtype, seed: int = 0) -> Inputs:
        """Draw the inputs; slot weights never reach zero and may be negative."""
        draw = torch.Generator().manual_seed(seed)

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(*shape, generator=draw, dtype=torch.float64) * scale).to(dtype)

        rows = 2 * self.F if self.gated else self.F
        weights = ExpertWeights(
            up=normal(self.E, rows, self.D, scale=self.D**-0.5),
            down=normal(self.E, self.D, self.F, scale=self.F**-0.5),
            activation="silu",
            gated=self.gated,
            up_bias=normal(self.E, rows, scale=0.3) if self.bias else None,
            down_bias=normal(self.E, self.D, scale=0.3) if self.bias else None,
        )
        ids_TK = torch.rand(self.T, self.E, generator=draw).argsort(1)[:, : self.K]
        weights_TK = normal(self.T, self.K)
        weights_TK = weights_TK + weights_TK.sign() * 0.1
        return Inputs(normal(self.T, self.D), self._arrange(ids_TK), weights_TK, weights)

    def _arrange(self, ids_TK: Tensor) -> Tensor:
        match self.pattern:
            case "one-idle":
                # The expert with the id 2 swaps with another that the token does not use.
                spare_T = torch.stack([(ids_TK == e).any(1) for e in range(self.E)], 1)
                spare_T = spare_T.to(torch.uint8).argmin(1, keepdim=True)
                return torch.where(ids_TK == 2, torch.where(spare_T == 2, self.E, spare_T), ids_TK)
            case "all-on-one":
                return torch.full_like(ids_TK, self.E).index_fill(1, torch.tensor([1]), 4)
            case "some-empty":
                ids_TK = ids_TK.clone()
                ids_TK[::2, 0] = self.E
                ids_TK[::3, -1] = -1
                ids_TK[4] = self.E
                return ids_TK
            case "all-empty":
                return torch.full_like(ids_TK, self.E)
            case _:
                return ids_TK


def run(
    path: Callable[[Tensor, Tensor, Tensor, ExpertWeights], Tensor], inputs: Inputs
) -> dict[str, Tensor]:
    """Run a path forward and backward; gives the output and every gradient by name."""
    h_TD, ids_TK, weights_TK, weights = inputs
    leaves = {"h": h_TD, "weights": weights_TK, "up": weights.up, "down": weights.down}
    if weights.up_bias is not None:
        leaves["up_bias"] = weights.up_bias
    if weights.down_bias is not None:
        leaves["down_bias"] = weights.down_bias
    leaves = {name: x.detach().clone().requires_grad_() for name, x in leaves.items()}
    weights = weights._replace(
        up=leaves["up"],
        down=leaves["down"],
        up_bias=leaves.get("up_bias"),
        down_bias=leaves.get("down_bias"),
    )
    out_TD = path(leaves["h"], ids_TK, leaves["weights"], weights)
    if out_TD.requires_grad:
        probe = torch.Generator().manual_seed(7)
        probe_TD = torch.randn(out_TD.shape, generator=probe, dtype=torch.float64)
        out_TD.backward(probe_TD.to(out_TD.dtype))
    # A path need not touch what no token uses: no gradient then means zero.
    grads = {n: torch.zeros_like(x) if x.grad is None else x.grad for n, x in leaves.items()}
    return {"out": out_TD.detach(), **grads}
