"""Consistency: how far the predictions of two passes with other experts are from each other.

Source: THOR, arXiv 2110.04260: half the sum of both Kullback-Leibler divergences, which gradients
leave through both passes. From log-probabilities alone: those of a probability that underflows are
not finite.

Shapes: B sequences, S positions, T = B * S tokens, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moesaic.nn.losses._base import LossConfig, Passes, token_mean


def consistency_loss(passes: Passes, mask_BS: Tensor, config: LossConfig) -> Tensor:
    """Mean over tokens of 1/2 sum_v (p - q) (log p - log q), in nats.

    Args:
        passes: Logits of both passes.
        mask_BS: True where a prediction counts.
        config: Without settings.

    Returns:
        A scalar, at least zero.
    """
    dtype = torch.promote_types(passes.first_TV.dtype, torch.float32)
    log_p_TV = passes.first_TV.to(dtype).log_softmax(-1)
    log_q_TV = passes.second_TV.to(dtype).log_softmax(-1)
    gaps_TV = (log_p_TV.exp() - log_q_TV.exp()) * (log_p_TV - log_q_TV)
    return token_mean(gaps_TV.sum(-1) / 2, mask_BS)
