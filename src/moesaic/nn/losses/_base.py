"""What losses share: means over the tokens that are not padding.

Shapes: B sequences, S positions, T = B * S tokens, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class LossConfig:
    """Settings of a loss that has none."""


def token_mean(values_T: Tensor, mask_BS: Tensor) -> Tensor:
    """Mean of a value per token over unmasked tokens; zero when all are masked."""
    mask_T = mask_BS.flatten().to(values_T.dtype)
    return (values_T * mask_T).sum() / mask_T.sum().clamp(min=1)
