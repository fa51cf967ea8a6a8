"""Balanced clustering of neurons that work for the same tokens (ours; the default).

The co-activation graph is that of MoEfication, arXiv:2110.01786, which cuts it with a
general graph partitioner. Ours: edges carry what neurons add to the output, blocks are exactly
equal, and the cut is found by balanced k-means on the leading eigenvectors and then improved on the
true objective.

Letters: F neurons, K eigenvectors, E experts.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from moesaic._errors import InputError
from moesaic.conversion.partition._assignment import Floats, Ints
from moesaic.conversion.partition._base import PartitionInput
from moesaic.conversion.partition._common import balanced_kmeans, number_blocks, order_by_block

logger = logging.getLogger(__name__)

_POWER_STEPS = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class CoactivationConfig:
    """Settings of the clustering on co-activation.

    Attributes:
        scale: `output` weighs neuron j by the length of its column in the down matrix, found from
            `energy_F`; `none` takes the matrix as it is, the right choice when it counts tokens for
            which both neurons are among the strongest.
        rank: Eigenvectors used to find the first blocks.
        max_iterations: Bound on the iterations of k-means for the first blocks.
        max_sweeps: Bound on the sweeps of exchanges over all neurons; 0 keeps the first blocks.
    """

    scale: Literal["output", "none"] = "output"
    rank: int = 32
    max_iterations: int = 4
    max_sweeps: int = 10

    def __post_init__(self) -> None:
        for name, least in (("rank", 1), ("max_iterations", 1), ("max_sweeps", 0)):
            value = getattr(self, name)
            if value < least:
                raise InputError(f"{name} must be at least {least}, got {value}")


def coactivation(source: PartitionInput, config: CoactivationConfig) -> Tensor:
    """Put neurons that are strong for the same tokens in one block.

    Maximises the sum, over all pairs of neurons in one block, of the mean over tokens of
    |a_i| d_i |a_j| d_j, with a the input of the down matrix and d the lengths of its columns. The
    means are not subtracted, so neurons that are strong for every token also find each other:
    measured on a real model, this drops less of the output than correlations do.

    Returns:
        The permutation, (F,) int64; blocks are sorted by their energy, largest first.

    Raises:
        InputError: If the statistic `coactivation_FF`, or `energy_F` with `scale=output`, is
            missing, not finite or zero.
    """
    affinity_FF = _affinity(source, config)
    points_FK = _spectral_points(affinity_FF, rank=config.rank, seed=source.seed)
    label_F = balanced_kmeans(
        points_FK, source.num_experts, max_iterations=config.max_iterations, seed=source.seed
    )
    label_F, gain, sweeps = exchange(affinity_FF, label_F, max_sweeps=config.max_sweeps)
    logger.debug("co-activation within blocks rose by %.2f%% in %d sweeps", 100 * gain, sweeps)
    return order_by_block(number_blocks(label_F, np.diagonal(affinity_FF)))


def _affinity(source: PartitionInput, config: CoactivationConfig) -> NDArray[np.float32]:
    """Build the symmetric matrix of edge weights, its mean diagonal scaled to 1."""
    given_FF = source.stat("coactivation_FF", "coactivation").numpy()
    affinity_FF: NDArray[np.float32] = (given_FF + given_FF.T) / 2
    diagonal_F = np.diagonal(affinity_FF).astype(np.float64)
    _check_energies("the diagonal of coactivation_FF", diagonal_F)
    scale_F = np.ones_like(diagonal_F)
    if config.scale == "output":
        energy_F = source.stat("energy_F", "coactivation").numpy().astype(np.float64)
        _check_energies("energy_F", energy_F)
        # energy_j = mean(a_j^2) d_j^2; a neuron that never fired has no edges whatever its d.
        scale_F = np.sqrt(energy_F / np.where(diagonal_F > 0, diagonal_F, np.inf))
        diagonal_F = diagonal_F * scale_F**2
        _check_energies("the overlap of energy_F and coactivation_FF", diagonal_F)
    scale_F = (scale_F / np.sqrt(diagonal_F.mean())).astype(np.float32)
    affinity_FF *= scale_F
    affinity_FF *= scale_F[:, None]
    return affinity_FF


def _check_energies(name: str, value_F: Floats) -> None:
    if value_F.min() < 0 or value_F.max() <= 0:
        raise InputError(
            f"{name} must be at least 0 for every neuron and above 0 for some; "
            f"calibrate on text that reaches this layer"
        )


def _spectral_points(
    affinity_FF: NDArray[np.float32], *, rank: int, seed: int
) -> NDArray[np.float32]:
    """Place each neuron at its row of the leading eigenvectors, scaled by root eigenvalues.

    Inner products of these points approximate the affinity, and with equal blocks k-means on them
    maximises the affinity within blocks (Dhillon, Guan and Kulis 2004, kernel k-means). Subspace
    iteration is enough: the exchanges that follow see the whole matrix.
    """
    num_neurons = len(affinity_FF)
    rng = np.random.default_rng(seed)
    start_FK = rng.standard_normal((num_neurons, min(rank, num_neurons)), dtype=np.float32)
    basis_FK = np.linalg.qr(start_FK)[0]
    for _ in range(_POWER_STEPS):
        basis_FK = np.linalg.qr(affinity_FF @ basis_FK)[0]
    value_K, vector_KK = np.linalg.eigh(basis_FK.T @ (affinity_FF @ basis_FK))
    points_FK: NDArray[np.float32] = (basis_FK @ vector_KK) * np.sqrt(np.maximum(value_K, 0.0))
    return points_FK


def exchange(
    affinity_FF: NDArray[np.float32], label_F: Ints, *, max_sweeps: int
) -> tuple[Ints, float, int]:
    """Exchange neurons between blocks while the affinity within blocks rises.

    Each neuron in turn changes places with the partner that gains most (after Kernighan and Lin
    1970), so sizes stay equal and the objective never falls. Ends when a sweep gains less than
    0.01 %.

    Returns:
        The block of each neuron, (F,); the gain relative to the start; the number of sweeps.
    """
    num_neurons, label_F = len(label_F), label_F.copy()
    num_experts = int(label_F.max()) + 1
    if num_experts in (1, num_neurons):
        return label_F, 0.0, 0
    diagonal_F = np.diagonal(affinity_FF)
    index_F = np.arange(num_neurons)
    # Affinity of every neuron to every block, itself included; float64 as it is updated in place.
    pull_EF: Floats = np.stack(
        [affinity_FF[label_F == e].sum(0, dtype=np.float64) for e in range(num_experts)]
    )
    own_F = pull_EF[label_F, index_F]
    start = float(own_F.sum())
    total, sweeps = start, 0
    while sweeps < max_sweeps:
        before, sweeps = total, sweeps + 1
        for i in range(num_neurons):
            here = label_F[i]
            gain_F = pull_EF[here] - own_F + diagonal_F - 2.0 * affinity_FF[i]
            gain_F += (pull_EF[:, i] - own_F[i] + diagonal_F[i])[label_F]
            gain_F[label_F == here] = 0.0
            j = int(gain_F.argmax())
            # Below this, rounding could make two neurons change places for ever.
            if gain_F[j] <= 1e-6:
                continue
            there = label_F[j]
            shift_F = affinity_FF[j] - affinity_FF[i]
            pull_EF[here] += shift_F
            pull_EF[there] -= shift_F
            label_F[i], label_F[j] = there, here
            own_F = pull_EF[label_F, index_F]
            total += 2.0 * float(gain_F[j])
        if total - before <= 1e-4 * abs(before):
            break
    return label_F, (total - start) / max(abs(start), 1e-12), sweeps
