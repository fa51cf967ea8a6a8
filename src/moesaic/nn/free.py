"""Experts that have no neurons: zero, copy and constant ones cost next to nothing.

Source: MoE++, arXiv 2410.07348, section 3.1: a zero expert gives nothing, a copy expert its input,
a constant one a1 h + a2 v with [a1, a2] = softmax(W h) and a vector v of its own, which starts
normal with deviation one, as in the authors' code.

Shapes: T tokens, D model width, Z free experts, C constant ones.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

FreeKind = Literal["zero", "copy", "constant"]


class FreeExperts(nn.Module):
    """The free experts that a router chooses among beside those of the layer.

    Args:
        dim: D.
        kinds: Kind of each, Z of them, in the order of the router.
    """

    def __init__(self, dim: int, kinds: tuple[FreeKind, ...]) -> None:
        super().__init__()
        self.kinds = kinds
        num_constant = kinds.count("constant")
        # Part of the checkpoint format: [C, 2, D] and [C, D].
        self.mix = nn.Parameter(torch.empty(num_constant, 2, dim)) if num_constant else None
        self.vector = nn.Parameter(torch.empty(num_constant, dim)) if num_constant else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the constant experts: nearly half their input, and their vector."""
        if self.mix is not None and self.vector is not None:
            nn.init.normal_(self.mix, std=0.02)
            nn.init.normal_(self.vector)

    def forward(self, h_TD: Tensor, weights_TZ: Tensor) -> Tensor:
        """Sum the weighted outputs of each token's free experts.

        Args:
            h_TD: Inputs, [T, D].
            weights_TZ: Weight of each for every token, zero where it was not chosen, [T, Z].

        Returns:
            [T, D] in the dtype of h_TD.
        """
        share_T1 = weights_TZ[:, self._places("copy")].sum(1, keepdim=True)
        if self.mix is None or self.vector is None:
            return share_T1.to(h_TD.dtype) * h_TD
        logits_TC2 = torch.einsum("td,cad->tca", h_TD, self.mix)
        parts_TC2 = logits_TC2.softmax(-1) * weights_TZ[:, self._places("constant")].unsqueeze(2)
        share_T1 = share_T1 + parts_TC2[..., 0].sum(1, keepdim=True)
        constant_TD = parts_TC2[..., 1].to(h_TD.dtype) @ self.vector
        return share_T1.to(h_TD.dtype) * h_TD + constant_TD

    def _places(self, kind: FreeKind) -> list[int]:
        return [place for place, each in enumerate(self.kinds) if each == kind]

    def extra_repr(self) -> str:
        """Kinds, for printing."""
        return ", ".join(self.kinds)
