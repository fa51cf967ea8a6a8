"""A linear map of low rank beside the experts of a layer, which every token takes.

Ours, in the place of the mean that other methods leave of what is off: what the experts that a
token does without would have added is partly a linear function of the token.

Shapes: D model width, R rank.
"""

from __future__ import annotations

from torch import Tensor, nn


class Bypass(nn.Module):
    """Maps [..., D] to [..., D] through R numbers.

    Args:
        dim: D.
        rank: R.
    """

    def __init__(self, dim: int, rank: int) -> None:
        super().__init__()
        self.rank = rank
        self.down_proj = nn.Linear(dim, rank, bias=False)
        self.up_proj = nn.Linear(rank, dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw what it reads and add nothing."""
        self.down_proj.reset_parameters()
        nn.init.zeros_(self.up_proj.weight)
        nn.init.zeros_(self.up_proj.bias)

    def forward(self, h: Tensor) -> Tensor:
        """Add this to the output of the experts."""
        out: Tensor = self.up_proj(self.down_proj(h))
        return out

    def num_weights(self) -> int:
        """Weights of its matrices."""
        return self.down_proj.weight.numel() + self.up_proj.weight.numel()
