"""Load balance over real and null experts, the null ones as one averaged bucket.

Source: AdaMoE, arXiv 2406.13233, section 3.3. Balancing identical experts among themselves is
pointless, so each null expert gets the mean load of all. (The released Mixtral code slices the
wrong axis and averages nothing; this is the formula.)

Shapes: B sequences, S positions, T = B * S tokens, E real experts, M null experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moesaic.nn.losses._base import LossConfig
from moesaic.nn.routing import Routing


def null_balance_loss(routing: Routing, mask_BS: Tensor, config: LossConfig) -> Tensor:
    """(E + M) * sum_i F_i P_i; F counts slots per token, so balanced routing gives k.

    Args:
        routing: A routing with top-k slots, empty where a null expert was chosen, and E + M
            columns of scores.
        mask_BS: True where a token is not padding.
        config: No settings.

    Returns:
        The loss of one layer.
    """
    num_real, num_all = routing.num_experts, routing.scores_TE.shape[1]
    probs_TE = routing.scores_TE.softmax(-1)
    mask_T1 = mask_BS.flatten().unsqueeze(1).to(probs_TE.dtype)
    num_tokens = mask_T1.sum().clamp(min=1)
    real_TE = routing.active_TE().to(probs_TE.dtype)
    null_T1 = (routing.ids_TK == num_real).sum(1, keepdim=True).to(probs_TE.dtype)
    num_null = num_all - num_real
    null_TM = (null_T1 / max(1, num_null)).expand(-1, num_null)
    load_E = (torch.cat([real_TE, null_TM], dim=1) * mask_T1).sum(0) / num_tokens
    probs_E = (probs_TE * mask_T1).sum(0) / num_tokens
    return num_all * (load_E * probs_E).sum()
