"""What several partitions share: labels to permutation, and balanced k-means.

Letters: F neurons, K coordinates of a point, E experts.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moesaic.conversion.partition._assignment import Floats, Ints, balanced_assignment


def order_by_block(label_F: Ints) -> Tensor:
    """Turn the block of each neuron into a permutation.

    Blocks come in the order of their labels; a block keeps its neurons in their old order.
    """
    return torch.from_numpy(np.argsort(label_F, kind="stable").astype(np.int64))


def number_blocks(label_F: Ints, weight_F: NDArray[np.floating]) -> Ints:
    """Renumber blocks so that block 0 has the largest total weight; the lowest neuron breaks ties.

    A numbering that depends on the blocks alone makes runs comparable.
    """
    total_E = np.bincount(label_F, weights=weight_F)
    _, first_E = np.unique(label_F, return_index=True)
    rank_E = np.empty_like(first_E)
    rank_E[np.lexsort((first_E, -total_E))] = np.arange(first_E.size)
    return rank_E[label_F].astype(np.int64)


def balanced_kmeans(
    points_FK: NDArray[np.float32], num_experts: int, *, max_iterations: int, seed: int
) -> Ints:
    """Cluster points into E groups of exactly equal size.

    Lloyd's iterations in which the assignment step is solved exactly (Bradley, Bennett and
    Demiriz 2000, "Constrained k-means clustering"), from k-means++ centres. Neither step can raise
    the sum of squared distances.

    Args:
        points_FK: One row per neuron; E divides F.
        num_experts: Groups E.
        max_iterations: Bound on the iterations; they end earlier when no point moves.
        seed: Seeds the choice of the first centres.

    Returns:
        The group of each point, (F,).
    """
    num_points = len(points_FK)
    if num_experts in (1, num_points):
        return np.arange(num_points, dtype=np.int64) % num_experts
    centre_EK = _spread_centres(points_FK, num_experts, seed)
    label_F = np.full(num_points, -1, dtype=np.int64)
    for _ in range(max_iterations):
        # The squared norm of a point is the same for every centre, so it is left out.
        cost_FE = (centre_EK**2).sum(1) - 2 * points_FK @ centre_EK.T
        previous_F = label_F
        label_F = balanced_assignment(cost_FE.astype(np.float64))
        if np.array_equal(label_F, previous_F):
            break
        members_F = np.argsort(label_F, kind="stable")
        centre_EK = points_FK[members_F].reshape(num_experts, -1, points_FK.shape[1]).mean(1)
    return label_F


def _spread_centres(
    points_FK: NDArray[np.float32], num_centres: int, seed: int
) -> NDArray[np.float32]:
    """Choose points far from each other (k-means++, Arthur and Vassilvitskii 2007)."""
    rng = np.random.default_rng(seed)
    square_F: Floats = (points_FK.astype(np.float64) ** 2).sum(1)
    chosen = [int(rng.integers(len(points_FK)))]
    distance_F = np.full(len(points_FK), np.inf)
    while len(chosen) < num_centres:
        last_K = points_FK[chosen[-1]]
        to_last_F = square_F + square_F[chosen[-1]] - 2.0 * (points_FK @ last_K)
        distance_F = np.minimum(distance_F, np.maximum(to_last_F, 0.0))
        distance_F[chosen] = 0.0
        total = distance_F.sum()
        if total > 0:
            chosen.append(int(rng.choice(len(points_FK), p=distance_F / total)))
        else:
            # Every other point coincides with a centre; any of them will do.
            chosen.append(int(np.setdiff1d(np.arange(len(points_FK)), chosen)[0]))
    return points_FK[chosen]
