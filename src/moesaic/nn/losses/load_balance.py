"""Load balance: E times the sum over experts of their load times their mean probability.

Source: Switch Transformer, arXiv 2101.03961, equation 4; per sequence as in DeepSeek-V3,
arXiv 2412.19437, equation 17. Load counts tokens, so the loads of a token with k experts sum to k
(dynamic routing, arXiv 2403.07652); balanced routing gives k.

Shapes: B sequences, S positions, T = B * S tokens, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from moesaic.nn.routing import Routing


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadBalanceConfig:
    """Settings of the load balance loss.

    Attributes:
        scope: `batch` balances all tokens together and lets a sequence specialise; `sequence`
            balances each sequence and averages.
    """

    scope: Literal["batch", "sequence"] = "batch"


def load_balance_loss(routing: Routing, mask_BS: Tensor, config: LoadBalanceConfig) -> Tensor:
    """E * sum_e F_e Q_e; the load F is a count without gradient, the probability Q learns.

    Args:
        routing: A routing whose scores are softmax logits.
        mask_BS: True where a token is not padding.
        config: Settings.

    Returns:
        The loss of one layer.
    """
    probs_TE = routing.scores_TE[:, : routing.num_experts].softmax(-1)
    num_sequences = 1 if config.scope == "batch" else mask_BS.shape[0]
    shape = (num_sequences, mask_BS.numel() // max(1, num_sequences))
    mask_BS1 = mask_BS.reshape(*shape, 1).to(probs_TE.dtype)
    load_BSE = routing.active_TE().reshape(*shape, routing.num_experts).to(probs_TE.dtype)
    probs_BSE = probs_TE.reshape(*shape, routing.num_experts)
    num_B1 = mask_BS1.sum(1).clamp(min=1)
    load_BE = (load_BSE * mask_BS1).sum(1) / num_B1
    probs_BE = (probs_BSE * mask_BS1).sum(1) / num_B1
    loss_B = routing.num_experts * (load_BE * probs_BE).sum(1)
    # A sequence of padding alone has no load to balance.
    used_B = (mask_BS1.sum((1, 2)) > 0).to(loss_B.dtype)
    return (loss_B * used_B).sum() / used_B.sum().clamp(min=1)
