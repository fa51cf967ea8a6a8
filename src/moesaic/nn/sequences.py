"""The sequences behind the tokens of a layer that routes whole inputs.

Shapes: T tokens, which are inputs here, S positions, D model width.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from moesaic._errors import InputError


@dataclass(frozen=True, slots=True)
class Sequences:
    """One sequence for each token of the layer; padding stands behind it.

    Attributes:
        values_TSD: Vectors of every position, [T, S, D]; those of padding are never read.
        lengths_T: Positions before the padding, [T] int64, each in [1, S].
    """

    values_TSD: Tensor
    lengths_T: Tensor

    def __post_init__(self) -> None:
        num_tokens, length = self.values_TSD.shape[:2]
        if self.lengths_T.shape != (num_tokens,):
            raise InputError(
                f"lengths must be one for each of the {num_tokens} sequences, got the shape "
                f"{list(self.lengths_T.shape)}; give [T]"
            )
        if num_tokens and not 1 <= int(self.lengths_T.min()) <= int(self.lengths_T.max()) <= length:
            raise InputError(
                f"lengths must be in [1, {length}], got {int(self.lengths_T.min())} to "
                f"{int(self.lengths_T.max())}; padding stands behind a sequence"
            )

    def take(self, tokens: Tensor) -> Sequences:
        """Those of some tokens, by their indices."""
        return Sequences(self.values_TSD[tokens], self.lengths_T[tokens])
