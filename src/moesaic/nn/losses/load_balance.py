"""Load balance: E times the sum over experts of their load times their mean probability.

Source: Switch Transformer, arXiv 2101.03961, equation 4; per sequence as in DeepSeek-V3,
arXiv 2412.19437, equation 17. Load counts tokens, so the loads of a token with k experts sum to k
(dynamic routing, arXiv 2403.07652); balanced routing gives k. Counted in choices, the loads sum to
one and balanced routing gives 1 (DeepSeekMoE, arXiv 2401.06066, equations 12 to 14; MoGE,
arXiv 2505.21411). Loads may be counted over all processes that train together (Sigma-MoE-Tiny,
arXiv 2512.16248, global-batch balance), which lets the batch of one process specialise.

Shapes: B sequences, S positions, T = B * S tokens, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from moesaic.nn.losses._base import load_and_probability, pooled_load, shares
from moesaic.nn.routing import Routing


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadBalanceConfig:
    """Settings of the load balance loss.

    Attributes:
        scope: `batch` balances all tokens together and lets a sequence specialise; `sequence`
            balances each sequence and averages; `global` is `batch` with the loads of all
            processes, whose mean probability stays their own.
        share_of: What a load is a share of: the `tokens`, or the `choices` that they made, which
            divides the loss by the mean number of experts per token.
    """

    scope: Literal["batch", "sequence", "global"] = "batch"
    share_of: Literal["tokens", "choices"] = "tokens"


def load_balance_loss(routing: Routing, mask_BS: Tensor, config: LoadBalanceConfig) -> Tensor:
    """E * sum_e F_e Q_e; the load F is a count without gradient, the probability Q learns.

    Args:
        routing: A routing whose scores are softmax logits.
        mask_BS: True where a token is not padding.
        config: Settings.

    Returns:
        The loss of one layer.
    """
    if config.scope != "sequence":
        mask_BS = mask_BS.reshape(1, -1)
    load_BE, probs_BE = load_and_probability(routing, mask_BS)
    if config.scope == "global":
        load_BE = pooled_load(load_BE[0], mask_BS).unsqueeze(0)
    if config.share_of == "choices":
        load_BE = shares(load_BE)
    loss_B = routing.num_experts * (load_BE * probs_BE).sum(1)
    # A sequence of padding alone has no load to balance.
    used_B = mask_BS.any(1).to(loss_B.dtype)
    return (loss_B * used_B).sum() / used_B.sum().clamp(min=1)
