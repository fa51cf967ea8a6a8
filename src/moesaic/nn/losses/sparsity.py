"""DSMoE's sparsity loss: the L1 norm of the gates that are on.

Source: DSMoE, arXiv 2502.12455, section 3.3. Only active gates feel it, because it holds G and
not the straight-through S; S is a named variant, since third-party write-ups use it.

Shapes: B sequences, S positions, T = B * S tokens, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from moesaic.nn.losses._base import token_mean
from moesaic.nn.routing import Routing


@dataclass(frozen=True, slots=True, kw_only=True)
class SparsityConfig:
    """Settings of the sparsity loss.

    Attributes:
        of: `gates` (G, the paper) pushes active gates alone; `straight-through` (S) pushes all.
    """

    of: Literal["gates", "straight-through"] = "gates"


def sparsity_loss(routing: Routing, mask_BS: Tensor, config: SparsityConfig) -> Tensor:
    """Mean over tokens and experts of the gate where it is on, in [0, 1).

    Args:
        routing: A routing whose scores are gate logits.
        mask_BS: True where a token is not padding.
        config: Settings.

    Returns:
        The loss of one layer; a model averages its layers, which gives the paper's 1 / (L n).
    """
    gates_TE = routing.scores_TE.sigmoid()
    on_TE = routing.active_TE()
    loss_TE = gates_TE * on_TE
    if config.of == "straight-through":
        loss_TE = loss_TE.detach() + (gates_TE - gates_TE.detach())
    return token_mean(loss_TE.mean(1), mask_BS)
