"""Load balance in which a free expert counts less, so that it gets more tokens.

Source: MoE++, arXiv 2410.07348, section 3.3: sum over all experts of eta f P with eta 1 for experts
with neurons and tau for free ones; f is the share of tokens, without the factor of other balance
losses, so their coefficients do not carry over. At balance a free expert has 1 / tau times the
tokens of another, and experts with neurons take tau E / (tau E + Z) of the choices.

Shapes: B sequences, S positions, T = B * S tokens, E experts, Z free experts, N = E + Z.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moesaic._errors import InputError
from moesaic.nn.routing import Routing


@dataclass(frozen=True, slots=True, kw_only=True)
class HeterogeneousBalanceConfig:
    """Settings of the loss.

    Attributes:
        tau: How much a free expert counts; the paper uses 0.75, and 0.1 where speed matters most.
    """

    tau: float = 0.75

    def __post_init__(self) -> None:
        if not 0.0 < self.tau < float("inf"):
            raise InputError(f"tau must be above 0, got {self.tau}; 0.75 is the paper's")


def heterogeneous_balance_loss(
    routing: Routing, mask_BS: Tensor, config: HeterogeneousBalanceConfig
) -> Tensor:
    """Sum of eta f P over experts and free experts.

    Args:
        routing: A routing with free experts, whose scores are softmax logits of all.
        mask_BS: True where a token is not padding.
        config: Settings.

    Returns:
        The loss of one layer.

    Raises:
        InputError: If the router has no free experts.
    """
    if routing.free_weights_TZ is None:
        raise InputError(
            "heterogeneous-balance needs a router with free experts, got one without; use "
            "load-balance"
        )
    probs_TN = routing.scores_TE.softmax(-1)
    chosen_TN = torch.cat([routing.active_TE(), routing.free_weights_TZ != 0], dim=1)
    mask_T1 = mask_BS.flatten().unsqueeze(1).to(probs_TN.dtype)
    num_tokens = mask_T1.sum().clamp(min=1)
    load_N = (chosen_TN * mask_T1).sum(0) / num_tokens
    probs_N = (probs_TN * mask_T1).sum(0) / num_tokens
    eta_N = torch.ones_like(probs_N)
    eta_N[routing.num_experts :] = config.tau
    return (eta_N * load_N * probs_N).sum()
