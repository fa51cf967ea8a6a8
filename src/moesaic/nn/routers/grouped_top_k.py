"""Every token takes equally many experts from each group, so that groups always carry equal work.

Source: MoGE, Pangu Pro MoE, arXiv 2505.21411, section 2: softmax over all experts, then the best of
each group of neighbours, weighing their probability, not renormalised. With a group on each device
no batch can load one device more than another; experts of one group still need a loss. The released
model also has a learned factor for each expert, `learn_scale` here. The order of experts is what
makes the groups: experts may be renumbered within a group and groups as a whole, and not otherwise.
Groups to choose from first, as in DeepSeek-V3, are the opposite.

Shapes: T tokens, D model width, E experts, G groups of N = E / G neighbours, K experts per token, J
of each group.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moesaic._errors import InputError
from moesaic.nn.routers._base import LinearRouter, RouterState, linear_scores
from moesaic.nn.routing import Routing
from moesaic.ops.choice import Choice, ScoreMap


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupedTopKConfig:
    """Settings of the router.

    Attributes:
        num_groups: G, as many as devices hold the experts; it divides E.
        per_group: J, experts that a token takes of each group; the model of the paper has 8 groups
            of 8 and takes 1 of each.
        learn_scale: Whether each expert's weight has a learned factor, which starts at one.
    """

    num_groups: int = 2
    per_group: int = 1
    learn_scale: bool = False

    def __post_init__(self) -> None:
        if self.num_groups < 1:
            raise InputError(f"num_groups must be at least 1, got {self.num_groups}; 1 is no group")
        if self.per_group < 1:
            raise InputError(f"per_group must be at least 1, got {self.per_group}; 1 is usual")

    @property
    def top_k(self) -> int:
        """Experts per token."""
        return self.num_groups * self.per_group


class GroupedTopK(LinearRouter):
    """MoGE's router.

    Args:
        dim: D.
        num_experts: E.
        config: Settings.
    """

    def __init__(self, dim: int, num_experts: int, config: GroupedTopKConfig) -> None:
        size, rest = divmod(num_experts, config.num_groups)
        if rest:
            raise InputError(
                f"num_groups must divide num_experts={num_experts}, got {config.num_groups}; "
                "choose a divisor"
            )
        if config.per_group > size:
            raise InputError(
                f"per_group must be in [1, num_experts / num_groups={size}], got "
                f"{config.per_group}; lower it or make fewer groups"
            )
        super().__init__(dim, num_experts)
        self.config = config
        self.scale = nn.Parameter(torch.ones(num_experts)) if config.learn_scale else None

    def reset_parameters(self) -> None:
        """Draw small random rows; factors start at one."""
        super().reset_parameters()
        # The base class draws before there are any.
        scale = getattr(self, "scale", None)
        if scale is not None:
            nn.init.ones_(scale)

    def forward(self, h_TD: Tensor, state: RouterState | None = None) -> Routing:
        """Route each token to the best of every group; ties go to the lower index.

        Args:
            h_TD: Inputs, [T, D].
            state: Ignored.

        Returns:
            K = G * J slots, group by group, best first in each; scores are the logits.
        """
        scores_TE = linear_scores(h_TD, self.weight)
        scores_TGN = scores_TE.unflatten(1, (self.config.num_groups, -1))
        # Sorted and not top-k, whose order of ties depends on the kernel; scores and not their
        # probabilities, which tie at zero where another group is far ahead.
        order_TGN = scores_TGN.argsort(dim=-1, descending=True, stable=True)
        size = scores_TGN.shape[2]
        first_G1 = size * torch.arange(self.config.num_groups, device=h_TD.device).unsqueeze(1)
        ids_TK = (order_TGN[..., : self.config.per_group] + first_G1).flatten(1)
        weights_TK = scores_TE.softmax(-1).gather(1, ids_TK)
        if self.scale is not None:
            weights_TK = weights_TK * self.scale.to(weights_TK.dtype)[ids_TK]
        return Routing(ids_TK, weights_TK, scores_TE, self.num_experts)

    def choice(self) -> Choice:
        """The highest scores of each group."""
        return Choice(
            "highest-of-each",
            "softmax",
            top_k=self.config.per_group,
            lowest_first=True,
            num_groups=self.config.num_groups,
            top_groups=self.config.num_groups,
        )

    def score_map(self) -> ScoreMap:
        """Its map and, if it has one, the factor of each expert."""
        return ScoreMap(self.weight, factor=self.scale)

    def extra_repr(self) -> str:
        """Sizes and settings, for printing."""
        return (
            f"experts={self.num_experts}, groups={self.config.num_groups}, "
            f"per_group={self.config.per_group}"
        )
