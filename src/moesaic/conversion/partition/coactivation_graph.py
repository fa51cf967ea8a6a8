"""The partition of MoEfication, arXiv:2110.01786: a graph of co-activation, cut by METIS.

The graph and the balancing are those of its released code: counts of co-activation over groups of 8
tokens (the calibration collector `adjacency`), divided by 0.99 of their first decile above zero,
edges below 1 dropped, weights rounded down, METIS k-way, then random surplus neurons moved to
blocks that lack some. Ours: weights are scaled down where their sum would overflow METIS.

Letters: F neurons, E experts.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array
from torch import Tensor

from moesaic._errors import InputError
from moesaic.conversion.partition._assignment import Ints
from moesaic.conversion.partition._base import PartitionInput, require_package
from moesaic.conversion.partition._common import number_blocks, order_by_block

# Sum of all weights that METIS can hold in 32 bits.
_MOST = 2**31 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class CoactivationGraphConfig:
    """Settings of the cut of the graph.

    Attributes:
        threshold: Part of the first decile above zero that an edge must reach. The paper's code has
            0.99, which keeps about nine edges in ten; a larger one makes a sparser graph.
    """

    threshold: float = 0.99

    def __post_init__(self) -> None:
        if not 0.0 < self.threshold < float("inf"):
            raise InputError(
                f"threshold must be above 0, got {self.threshold}; 0.99 is the paper's"
            )


def coactivation_graph(source: PartitionInput, config: CoactivationGraphConfig) -> Tensor:
    """Cut the graph of co-activation so that little of its weight lies between blocks.

    Needs the package pymetis.

    Returns:
        The permutation, (F,) int64; blocks are sorted by the activity of their neurons, largest
        first.

    Raises:
        InputError: If the statistic `adjacency_FF` is missing, not finite or without edges, or
            pymetis is not installed.
    """
    adjacency_FF = source.stat("adjacency_FF", "coactivation-graph").numpy()
    num_neurons, num_experts = source.num_neurons, source.num_experts
    if num_experts in (1, num_neurons):
        label_F: Ints = np.arange(num_neurons, dtype=np.int64) % num_experts
    else:
        label_F = cut_graph(edge_weights(adjacency_FF, config.threshold), num_experts, source.seed)
        label_F = balance(label_F, num_experts, source.seed)
    return order_by_block(number_blocks(label_F, np.diagonal(adjacency_FF)))


def edge_weights(adjacency_FF: NDArray[np.float32], threshold: float) -> Ints:
    """Turn counts of co-activation into integer weights; 0 is no edge.

    Args:
        adjacency_FF: Symmetric counts.
        threshold: Part of the first decile above zero that is one unit of weight.

    Returns:
        Symmetric weights with an empty diagonal, (F, F).

    Raises:
        InputError: If no two neurons are connected.
    """
    deciles = np.percentile(adjacency_FF, range(10, 101, 10))
    unit = threshold * float(deciles[deciles > 0].min(initial=np.inf))
    weight_FF = np.floor(adjacency_FF.astype(np.float64) / unit)
    weight_FF = np.minimum(weight_FF, weight_FF.T)
    np.fill_diagonal(weight_FF, 0.0)
    total = float(weight_FF.sum())
    if total == 0.0:
        raise InputError(
            "adjacency_FF has no edge that reaches the threshold; lower it or calibrate on text "
            "that reaches this layer"
        )
    if total > _MOST:
        weight_FF = np.floor(weight_FF * (_MOST / total))
    return weight_FF.astype(np.int64)


def cut_graph(weight_FF: Ints, num_experts: int, seed: int) -> Ints:
    """Cut a weighted graph into E nearly equal parts of little weight between them.

    Returns:
        The part of each neuron, (F,).
    """
    require_package("coactivation-graph", "pymetis")
    pymetis = importlib.import_module("pymetis")
    graph = csr_array(weight_FF)
    _, label_F = pymetis.part_graph(
        num_experts,
        pymetis.CSRAdjacency(graph.indptr.astype(np.int32), graph.indices.astype(np.int32)),
        eweights=graph.data.astype(np.int32),
        recursive=False,
        options=pymetis.Options(seed=seed % _MOST),
    )
    return np.asarray(label_F, dtype=np.int64)


def balance(label_F: Ints, num_experts: int, seed: int) -> Ints:
    """Move random neurons of blocks that are too full to blocks that lack some.

    Returns:
        The block of each neuron, (F,); all blocks are equally full.
    """
    rng = np.random.default_rng(seed)
    size = label_F.size // num_experts
    label_F = label_F.copy()
    surplus: list[int] = []
    for block in range(num_experts):
        member_M = rng.permutation(np.flatnonzero(label_F == block))
        surplus += member_M[size:].tolist()
    moved = rng.permutation(np.asarray(surplus, dtype=np.int64))
    lacking_E = size - np.bincount(np.delete(label_F, moved), minlength=num_experts)
    label_F[moved] = np.repeat(np.arange(num_experts), lacking_E)
    return label_F
