"""Soft decision trees over the experts: a differentiable gate of at most k experts per token.

Source: COMET, arXiv 2306.02824. Each of k trees has the experts as its leaves; a smooth step, which
reaches exactly 0 and 1, sends a token left or right, so that in the end one leaf of a tree is
reached. Leaves have linear scores; one softmax over the leaves of all trees, in which trees
compete, weighs them by how far they are reached, and the trees' weights of an expert are summed. A
penalty on the entropy of what is reached makes the splits decide. The first training passes use
nearly all experts.

Splits and leaves have biases, as the paper's equations have. Ours: a leaf counts as not reached
where its probability is exactly 0. The learned permutation is the router `permutation-search`.

Shapes: T tokens, D model width, E experts, K trees, N = E - 1 splits of a tree.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moesaic._errors import InputError
from moesaic.nn.routers._base import Router, RouterState, linear_scores
from moesaic.nn.routing import Routing


@dataclass(frozen=True, slots=True, kw_only=True)
class SoftTreesConfig:
    """Settings of the router.

    Attributes:
        num_trees: K, most experts of a token once all splits have decided.
        gamma: Width of the smooth step: a split decides for good where its score is half of it from
            zero. The paper searched 0.001 to 10; small ones decide early.
        entropy_coef: Weight of the entropy of what is reached, which makes splits decide; it is
            part of the router and needs no loss beside it. The paper searched 0.001 to 100. Too
            large, it freezes trees before they are good.
    """

    num_trees: int = 2
    gamma: float = 1.0
    entropy_coef: float = 0.01

    def __post_init__(self) -> None:
        if self.num_trees < 1:
            raise InputError(f"num_trees must be at least 1, got {self.num_trees}; 2 is usual")
        if not 0.0 < self.gamma < float("inf"):
            raise InputError(f"gamma must be above 0, got {self.gamma}; 1 is usual")
        if not 0.0 <= self.entropy_coef < float("inf"):
            raise InputError(
                f"entropy_coef must be at least 0, got {self.entropy_coef}; 0.01 is usual"
            )


class SoftTrees(Router):
    """COMET's gate.

    Args:
        dim: D.
        num_experts: E, any number.
        config: Settings.
    """

    def __init__(self, dim: int, num_experts: int, config: SoftTreesConfig) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.config = config
        num_leaves = config.num_trees * num_experts
        num_splits = config.num_trees * (num_experts - 1)
        # Part of the checkpoint format: rows of the leaves and of the splits, tree by tree.
        self.weight = nn.Parameter(torch.empty(num_leaves, dim))
        self.bias = nn.Parameter(torch.empty(num_leaves))
        self.split_weight = nn.Parameter(torch.empty(num_splits, dim))
        self.split_bias = nn.Parameter(torch.empty(num_splits))
        self._walk = leaves_in_order(num_experts)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw as the paper does: splits close to undecided, small leaf scores."""
        for leaf in (self.weight, self.bias):
            nn.init.uniform_(leaf, -0.05, 0.05)
        for split in (self.split_weight, self.split_bias):
            nn.init.uniform_(split, -self.config.gamma / 100, self.config.gamma / 100)

    def forward(self, h_TD: Tensor, state: RouterState | None = None) -> Routing:
        """Route each token to the leaves that its trees reach.

        Args:
            h_TD: Inputs, [T, D].
            state: Ignored.

        Returns:
            E slots in falling weight, empty where no tree reaches; weights sum to one. Scores are
            how far each expert is reached, summed over trees.
        """
        shape = (-1, self.config.num_trees, self.num_experts)
        leaf_TKE = linear_scores(h_TD, self.weight, self.bias).reshape(shape)
        reach_TKE = self.reach(h_TD)
        tiny = torch.finfo(reach_TKE.dtype).tiny
        log_TKE = reach_TKE.clamp(min=tiny).log().masked_fill(reach_TKE <= 0, -torch.inf)
        both_TKE = (leaf_TKE + log_TKE).flatten(1).softmax(-1).reshape(shape)
        sorted_TE, order_TE = both_TKE.sum(1).sort(dim=-1, descending=True, stable=True)
        ids_TE = torch.where(sorted_TE > 0, order_TE, self.num_experts)
        aux = {}
        if self.config.entropy_coef > 0:
            entropy_TKE = -reach_TKE * (reach_TKE + 1e-6).log()
            mean = entropy_TKE.sum() / max(1, h_TD.shape[0])
            aux["tree-entropy"] = self.config.entropy_coef * mean
        return Routing(ids_TE, sorted_TE, reach_TKE.sum(1), self.num_experts, aux)

    def reach(self, h_TD: Tensor) -> Tensor:
        """Probability with which each tree reaches each expert, [T, K, E]."""
        num_splits = self.num_experts - 1
        scores_TN = linear_scores(h_TD, self.split_weight, self.split_bias)
        left_TKN = smooth_step(scores_TN, self.config.gamma).reshape(
            h_TD.shape[0], self.config.num_trees, num_splits
        )
        # Level by level; in a heap the nodes of a level are neighbours, its leaves the last ones.
        level = torch.ones_like(left_TKN[..., :0]).sum(-1, keepdim=True) + 1
        first, leaves = 0, []
        while level.shape[-1]:
            inner = min(level.shape[-1], max(0, num_splits - first))
            leaves.append(level[..., inner:])
            left = left_TKN[..., first : first + inner]
            first += level.shape[-1]
            above = level[..., :inner]
            level = torch.stack([above * left, above * (1 - left)], dim=-1).flatten(-2)
        return torch.cat(leaves, dim=-1)[..., self._walk]

    def extra_repr(self) -> str:
        """Sizes and settings, for printing."""
        return (
            f"experts={self.num_experts}, trees={self.config.num_trees}, "
            f"gamma={self.config.gamma:g}, entropy_coef={self.config.entropy_coef:g}"
        )


def smooth_step(z: Tensor, gamma: float) -> Tensor:
    """Rise from exactly 0 at -gamma / 2 to exactly 1 at gamma / 2, with a slope everywhere."""
    # A cubic of the position in between; its slope is 0 at both ends.
    x = (z / gamma + 0.5).clamp(0.0, 1.0)
    return x * x * (3 - 2 * x)


def leaves_in_order(num_experts: int) -> list[int]:
    """Leaves of the heap from left to right, each by its place among the leaves in heap order."""
    order: list[int] = []
    nodes = [0]
    while nodes:
        node = nodes.pop()
        if node >= num_experts - 1:
            order.append(node - (num_experts - 1))
        else:
            nodes += [2 * node + 2, 2 * node + 1]
    return order
