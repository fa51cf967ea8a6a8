"""Load balance between groups of experts, each group the experts of one device.

Source: DeepSeekMoE, arXiv 2401.06066, equations 15 to 17 (device-level balance loss): a small
`load-balance` keeps routing from collapsing, and a larger loss on the groups evens what devices
compute without forcing each expert to be equal.

Shapes: B sequences, S positions, T = B * S tokens, E experts, G groups of N = E / G neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from moesaic._errors import InputError
from moesaic.nn.losses._base import load_and_probability, shares
from moesaic.nn.routing import Routing


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupBalanceConfig:
    """Settings of the balance between groups.

    Attributes:
        num_groups: G, the devices that hold the experts; it divides E.
    """

    num_groups: int = 2

    def __post_init__(self) -> None:
        if self.num_groups < 1:
            raise InputError(f"num_groups must be at least 1, got {self.num_groups}; 1 is no group")


def group_balance_loss(routing: Routing, mask_BS: Tensor, config: GroupBalanceConfig) -> Tensor:
    """Sum over groups of their experts' mean load times their summed probability.

    Loads are shares of all choices times E, so balanced groups give 1; one expert per group gives
    `load-balance` as a share of choices.

    Args:
        routing: A routing whose scores are softmax logits.
        mask_BS: True where a token is not padding.
        config: Settings.

    Returns:
        The loss of one layer.

    Raises:
        InputError: If the groups do not divide the experts.
    """
    num_experts, num_groups = routing.num_experts, config.num_groups
    if num_experts % num_groups:
        raise InputError(
            f"num_groups must divide num_experts={num_experts}, got {num_groups}; choose a divisor"
        )
    load_BE, probs_BE = load_and_probability(routing, mask_BS.reshape(1, -1))
    load_GN = num_experts * shares(load_BE)[0].unflatten(0, (num_groups, -1))
    probs_GN = probs_BE[0].unflatten(0, (num_groups, -1))
    loss: Tensor = (load_GN.mean(1) * probs_GN.sum(1)).sum()
    return loss
