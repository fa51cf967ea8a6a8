"""Importance: experts should weigh equally much over a batch.

Source: sparsely-gated MoE, arXiv 1701.06538, section 4.

Shapes: B sequences, S positions, T = B * S tokens, E experts.
"""

from __future__ import annotations

from torch import Tensor

from moesaic.nn.losses._base import LossConfig, squared_variation
from moesaic.nn.routing import Routing


def importance_loss(routing: Routing, mask_BS: Tensor, config: LossConfig) -> Tensor:
    """Squared coefficient of variation of each expert's weights, summed over the batch.

    A factor on all weights changes nothing.

    Args:
        routing: Any routing.
        mask_BS: True where a token is not padding.
        config: No settings.

    Returns:
        The loss of one layer, in [0, E - 1].
    """
    weights_TE = routing.weights_TE()
    mask_T1 = mask_BS.flatten().unsqueeze(1).to(weights_TE.dtype)
    return squared_variation((weights_TE * mask_T1).sum(0))
