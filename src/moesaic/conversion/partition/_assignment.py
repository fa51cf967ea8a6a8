"""Exact balanced assignment: every neuron to one block, every block equally full, least cost.

A transportation problem with F neurons of supply 1 and E blocks of capacity F / E. Repeating each
block F / E times and calling a general assignment solver costs O(F^3); here the search runs on a
graph of the E blocks only (measured on one core: 0.1 s instead of 0.5 s for F=1536 and E=96, and
seconds instead of minutes for F=11008).

Letters: F neurons, E experts (blocks), M members of a block, A blocks of the search frontier.
"""

from __future__ import annotations

import itertools

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

_LEVELS = 12
_STEPS_PER_LEVEL = 3


def balanced_assignment(cost_FE: Floats, price_E: Floats | None = None) -> Ints:
    """Assign F neurons to E blocks of F / E neurons each at the least total cost.

    Successive shortest paths (Ahuja, Magnanti and Orlin 1993, section 9.7) from a pseudoflow that
    is optimal but unbalanced: each neuron first takes the block with the least cost less price,
    then one neuron at a time moves along the cheapest chain of blocks from an overfull block to one
    with room. Any prices give an optimal answer; good ones leave few chains. Our departure: chains
    are searched among blocks, a hop between two blocks costing what its cheapest neuron costs.

    Args:
        cost_FE: Finite cost of neuron f in block e; E divides F.
        price_E: Prices to start from where they are known, as those of Sinkhorn's iterations at a
            temperature of 1; found by annealing where not.

    Returns:
        The block of each neuron, (F,).
    """
    num_neurons, num_experts = cost_FE.shape
    size = num_neurons // num_experts
    assert size * num_experts == num_neurons
    price_E = _annealed_prices(cost_FE) if price_E is None else price_E.copy()
    label_F: Ints = (cost_FE - price_E).argmin(1).astype(np.int64)
    count_E = np.bincount(label_F, minlength=num_experts)
    hops = _Hops(cost_FE, label_F)
    for source in np.flatnonzero(count_E > size).tolist():
        for _ in range(count_E[source] - size):
            dist_E, parent_E, target = _cheapest_chain(hops, price_E, source, count_E < size)
            price_E += np.minimum(dist_E, dist_E[target])
            chain = [target]
            while chain[-1] != source:
                chain.append(int(parent_E[chain[-1]]))
            hops.move(chain)
            count_E[target] += 1
    return label_F


def _annealed_prices(cost_FE: Floats) -> Floats:
    """Find prices at which the blocks are nearly balanced.

    Neurons spread over blocks by a softmax that cools by half at each level, and prices move until
    the loads are equal (Sinkhorn's iteration, Cuturi 2013).
    """
    num_neurons, num_experts = cost_FE.shape
    price_E = np.zeros(num_experts)
    temperature = float(np.ptp(cost_FE)) / 4
    if temperature == 0.0:
        return price_E
    for _ in range(_LEVELS):
        for _ in range(_STEPS_PER_LEVEL):
            share_FE = (price_E - cost_FE) / temperature
            share_FE -= share_FE.max(1, keepdims=True)
            np.exp(share_FE, out=share_FE)
            share_FE /= share_FE.sum(1, keepdims=True)
            load_E = share_FE.sum(0) * (num_experts / num_neurons)
            price_E -= temperature * np.log(np.maximum(load_E, 1e-9))
        temperature /= 2
    return price_E


class _Hops:
    """The cheapest neuron to move between each pair of blocks, kept up to date."""

    def __init__(self, cost_FE: Floats, label_F: Ints) -> None:
        num_experts = cost_FE.shape[1]
        self.cost_FE = cost_FE
        self.label_F = label_F
        self.cost_EE = np.full((num_experts, num_experts), np.inf)
        self.neuron_EE = np.zeros((num_experts, num_experts), dtype=np.int64)
        for block in range(num_experts):
            self._refresh(block)

    def _refresh(self, block: int) -> None:
        member_M = np.flatnonzero(self.label_F == block)
        if member_M.size == 0:
            self.cost_EE[block] = np.inf
            return
        rise_ME = self.cost_FE[member_M] - self.cost_FE[member_M, block][:, None]
        best_E = rise_ME.argmin(0)
        self.neuron_EE[block] = member_M[best_E]
        self.cost_EE[block] = rise_ME[best_E, np.arange(best_E.size)]
        self.cost_EE[block, block] = np.inf

    def move(self, chain: list[int]) -> None:
        """Move one neuron along each hop; `chain` lists blocks from the last to the first."""
        moved = [self.neuron_EE[a, b] for b, a in itertools.pairwise(chain)]
        self.label_F[moved] = chain[:-1]
        for block in chain:
            self._refresh(block)


def _cheapest_chain(
    hops: _Hops, price_E: Floats, source: int, room_E: NDArray[np.bool_]
) -> tuple[Floats, Ints, int]:
    """Find the cheapest chain from one block to any with room.

    Returns:
        Reduced distance of each block (exact below that of the target), its predecessor, and the
        target.
    """
    num_experts = price_E.size
    dist_E = np.full(num_experts, np.inf)
    dist_E[source] = 0.0
    parent_E = np.full(num_experts, source)
    bound = np.inf
    frontier = np.array([source])
    while frontier.size:
        # Rounding may leave a reduced cost a hair below zero; a zero keeps chains free of cycles.
        step_AE = np.maximum(
            hops.cost_EE[frontier] + price_E[frontier][:, None] - price_E[None, :], 0.0
        )
        step_AE += dist_E[frontier][:, None]
        via_E = step_AE.argmin(0)
        reach_E = step_AE[via_E, np.arange(num_experts)]
        closer_E = reach_E < np.minimum(dist_E, bound)
        dist_E[closer_E] = reach_E[closer_E]
        parent_E[closer_E] = frontier[via_E[closer_E]]
        bound = dist_E[room_E].min()
        frontier = np.flatnonzero(closer_E & (dist_E < bound))
    target = int(np.where(room_E, dist_E, np.inf).argmin())
    return dist_E, parent_E, target
