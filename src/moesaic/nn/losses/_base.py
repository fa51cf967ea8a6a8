"""What losses share: means over the tokens that are not padding, and how uneven experts are.

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


def squared_variation(sum_E: Tensor) -> Tensor:
    """Variance over squared mean of one value per expert; zero where all are zero.

    The variance is that of these values, not the estimate for a larger population.
    """
    mean = sum_E.mean()
    return (sum_E - mean).square().mean() / mean.square().clamp(min=1e-10)
