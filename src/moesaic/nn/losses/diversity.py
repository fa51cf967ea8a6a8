"""Diversity: over a batch the router should want its experts equally much.

Source: Hecto, arXiv 2506.22919, which has a diversity term beside an entropy term; its formula is
not known to us. Ours: log E less the entropy of the mean probability, which is its divergence from
even use. Unlike the balance losses it counts nothing, so that it has a gradient also where one
expert gets every token. The entropy of single tokens is the loss `entropy`: small is confident
there, even is diverse here.

Shapes: B sequences, S positions, T = B * S tokens, E experts.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from moesaic.nn.losses._base import LossConfig, load_and_probability
from moesaic.nn.routing import Routing


def diversity_loss(routing: Routing, mask_BS: Tensor, config: LossConfig) -> Tensor:
    """Divergence of the mean probability from the same for all experts, in nats.

    Args:
        routing: A routing whose scores are softmax logits.
        mask_BS: True where a token is not padding; with one token it works against `entropy`.
        config: No settings.

    Returns:
        The loss of one layer, in [0, log E].
    """
    _, probs_BE = load_and_probability(routing, mask_BS.reshape(1, -1))
    mean_E = probs_BE[0]
    # Without any token the mean is zero, and so is this.
    logs_E = mean_E.clamp(min=torch.finfo(mean_E.dtype).tiny).log()
    return (mean_E * (logs_E + math.log(routing.num_experts))).sum()
