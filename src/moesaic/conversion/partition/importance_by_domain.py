"""The gradient partitions of LLaMA-MoE, arXiv:2406.16554: each expert takes what one domain needs.

A neuron's importance for a domain is the mean over its tokens of |a_j dL/da_j|. Three variants of
the paper: independent (greedy), sharing inside (experts may overlap) and sharing between (residual:
what most experts want is always on). Ours: an expert's domain is one of the text's, where the paper
clusters text into E of them; when their numbers differ, expert e takes domain e modulo their number
and the domains beyond the last expert are averaged into it likewise. Ties, which the paper leaves
open, go to the expert with fewest neurons, and to the neuron that is important to all.

Letters: F neurons, E routed experts, C domains of the text.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moesaic._errors import InputError
from moesaic.conversion.partition._assignment import Floats, Ints
from moesaic.conversion.partition._base import PartitionInput


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportanceByDomainConfig:
    """Settings of the gradient partition.

    Attributes:
        sharing: `none` gives every neuron one place. `inner` lets every expert take the neurons
            that matter most to its domain, so that some are in several experts and some in none:
            no permutation, and the converted model with all experts on is not the dense one.
    """

    sharing: Literal["none", "inner"] = "none"


def importance_by_domain(source: PartitionInput, config: ImportanceByDomainConfig) -> Tensor:
    """Give each expert the neurons that matter to its domain.

    Blocks that are to be shared take the neurons that are among the best of most experts.

    Returns:
        The old neuron of each place, (F,) int64: shared blocks, then expert by expert, most
        important first; a permutation unless `sharing` is `inner`.

    Raises:
        InputError: If the statistic `activation_importance_CF` is missing, not finite or without
            domains, or has fewer domains than experts that could share.
    """
    value_CF = source.stat("activation_importance_CF", "importance-by-domain").numpy()
    num_routed, size = source.num_experts - source.num_shared, source.block_size
    if len(value_CF) == 0:
        raise InputError("activation_importance_CF has 0 domains; calibrate on text")
    if config.sharing == "inner" and len(value_CF) < num_routed:
        raise InputError(
            f"sharing 'inner' gives experts of one domain the same neurons: {num_routed} experts "
            f"need as many domains, the text has {len(value_CF)}; use sharing 'none'"
        )
    value_EF = expert_values(value_CF.astype(np.float64), num_routed)
    shared = shared_neurons(value_EF, size, source.num_shared * size)
    free_F = np.ones(source.num_neurons, dtype=bool)
    free_F[shared] = False
    if config.sharing == "inner":
        ranked_EF = np.argsort(np.where(free_F, -value_EF, np.inf), axis=1, kind="stable")
        experts = [ranked_F[:size] for ranked_F in ranked_EF]
    else:
        experts = greedy(value_EF, size, free_F)
    return torch.from_numpy(np.concatenate([shared, *experts]))


def expert_values(value_CF: Floats, num_experts: int) -> Floats:
    """Importance of every neuron for every expert, (E, F), from that for every domain."""
    num_domains = len(value_CF)
    if num_domains < num_experts:
        return value_CF[np.arange(num_experts) % num_domains]
    return np.stack([value_CF[e::num_experts].mean(0) for e in range(num_experts)])


def shared_neurons(value_EF: Floats, size: int, num_shared: int) -> Ints:
    """Choose the neurons that most experts would take, over and over until there are enough.

    Each round looks at the best `size` neurons left of every expert and takes those that the most
    experts hold.

    Args:
        value_EF: Importance for every expert.
        size: Neurons of one expert.
        num_shared: Neurons to choose.

    Returns:
        Their numbers, first chosen first.
    """
    value_EF = value_EF.copy()
    total_F = value_EF.sum(0)
    chosen: list[int] = []
    while len(chosen) < num_shared:
        wanted = np.argsort(-value_EF, axis=1, kind="stable")[:, :size]
        count_F = np.bincount(wanted.ravel(), minlength=value_EF.shape[1])
        most = np.flatnonzero(count_F == count_F.max())
        most = most[np.argsort(-total_F[most], kind="stable")][: num_shared - len(chosen)]
        chosen += most.tolist()
        value_EF[:, chosen] = -np.inf
    return np.asarray(chosen, dtype=np.int64)


def greedy(value_EF: Floats, size: int, free_F: NDArray[np.bool_]) -> list[Ints]:
    """Deal neurons one by one, each time the largest importance that any expert with room offers.

    Args:
        value_EF: Importance for every expert.
        size: Neurons of one expert.
        free_F: Neurons to deal, E * size of them.

    Returns:
        The neurons of each expert, most important first.
    """
    ranked = np.argsort(-value_EF, axis=1, kind="stable").tolist()
    free = free_F.tolist()
    place = [0] * len(ranked)
    members: list[list[int]] = [[] for _ in ranked]
    for _ in range(len(ranked) * size):
        offers = []
        for e, ranked_F in enumerate(ranked):
            if len(members[e]) == size:
                continue
            while not free[ranked_F[place[e]]]:
                place[e] += 1
            offers.append((-value_EF[e, ranked_F[place[e]]], len(members[e]), e))
        e = min(offers)[2]
        neuron = ranked[e][place[e]]
        members[e].append(neuron)
        free[neuron] = False
    return [np.asarray(member_M, dtype=np.int64) for member_M in members]
