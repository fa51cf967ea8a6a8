"""Entropy of the router: where the number of experts follows from the probabilities, flat is dear.

Source: "Harder Tasks Need More Experts", arXiv 2403.07652, section 3.3 (the dynamic loss).

Shapes: B sequences, S positions, T = B * S tokens, E experts.
"""

from __future__ import annotations

from torch import Tensor

from moesaic.nn.losses._base import LossConfig, token_mean
from moesaic.nn.routing import Routing


def entropy_loss(routing: Routing, mask_BS: Tensor, config: LossConfig) -> Tensor:
    """Mean over tokens of the entropy of the softmax of the scores, in nats.

    Args:
        routing: A routing whose scores are softmax logits.
        mask_BS: True where a token is not padding.
        config: No settings.

    Returns:
        The loss of one layer, in [0, log E].
    """
    logs_TE = routing.scores_TE.log_softmax(-1)
    return token_mean(-(logs_TE.exp() * logs_TE).sum(-1), mask_BS)
