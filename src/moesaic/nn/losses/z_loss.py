"""Router z-loss: keeps the scores small, so that their softmax stays precise.

Source: ST-MoE, arXiv 2202.08906, equation 5.

Shapes: B sequences, S positions, T = B * S tokens, E experts.
"""

from __future__ import annotations

from torch import Tensor

from moesaic.nn.losses._base import LossConfig, token_mean
from moesaic.nn.routing import Routing


def z_loss(routing: Routing, mask_BS: Tensor, config: LossConfig) -> Tensor:
    """Mean over tokens of the squared log-sum-exp of the scores.

    Args:
        routing: Any routing.
        mask_BS: True where a token is not padding.
        config: No settings.

    Returns:
        The loss of one layer.
    """
    return token_mean(routing.scores_TE.logsumexp(-1).square(), mask_BS)
