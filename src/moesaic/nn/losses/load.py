"""Load: experts should be chosen by equally many tokens, counted by a chance that has a gradient.

Source: sparsely-gated MoE, arXiv 1701.06538, section 4 and appendix A. The router says how far
inside the top k each expert is, since only it knows its noise; without noise, as in evaluation, the
tokens themselves are counted and nothing is taught.

Shapes: B sequences, S positions, T = B * S tokens, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moesaic.nn.losses._base import LossConfig, squared_variation
from moesaic.nn.routing import Routing


def load_loss(routing: Routing, mask_BS: Tensor, config: LossConfig) -> Tensor:
    """Squared coefficient of variation of the number of tokens expected at each expert.

    Args:
        routing: A routing by noisy scores, which holds E more columns of scores in training.
        mask_BS: True where a token is not padding.
        config: No settings.

    Returns:
        The loss of one layer, in [0, E - 1].
    """
    inside_TE = routing.scores_TE[:, routing.num_experts :]
    if inside_TE.shape[1]:
        chance_TE = torch.special.ndtr(inside_TE)
    else:
        chance_TE = routing.active_TE().to(routing.scores_TE.dtype)
    mask_T1 = mask_BS.flatten().unsqueeze(1).to(chance_TE.dtype)
    return squared_variation((chance_TE * mask_T1).sum(0))
