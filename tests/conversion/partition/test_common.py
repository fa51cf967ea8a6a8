import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesaic.conversion.partition._common import balanced_kmeans, number_blocks, order_by_block


def test_order_by_block():
    assert order_by_block(np.array([1, 0, 1, 0, 2, 2])).tolist() == [1, 3, 0, 2, 4, 5]


def test_blocks_are_numbered_by_weight_then_by_lowest_neuron():
    label_F = np.array([2, 0, 1, 2, 0, 1])
    assert number_blocks(label_F, np.array([1, 5, 2, 1, 5, 2.0])).tolist() == [2, 0, 1, 2, 0, 1]
    assert number_blocks(label_F, np.zeros(6)).tolist() == [0, 1, 2, 0, 1, 2]


@pytest.mark.parametrize("seed", range(3))
def test_kmeans_finds_separate_groups(seed):
    rng = np.random.default_rng(seed)
    truth_F = rng.permutation(np.arange(60) % 4)
    points_FK = (10.0 * np.eye(4)[truth_F] + rng.normal(size=(60, 4))).astype(np.float32)
    label_F = balanced_kmeans(points_FK, 4, max_iterations=20, seed=seed)
    assert len(set(zip(truth_F.tolist(), label_F.tolist(), strict=True))) == 4


@settings(max_examples=40, deadline=None)
@given(num_experts=st.integers(1, 6), size=st.integers(1, 8), alike=st.booleans())
def test_kmeans_is_balanced_whatever_the_points(num_experts, size, alike):
    rng = np.random.default_rng(size)
    points_FK = rng.normal(size=(num_experts * size, 3)).astype(np.float32)
    if alike:
        points_FK[:] = points_FK[0]
    label_F = balanced_kmeans(points_FK, num_experts, max_iterations=5, seed=0)
    assert np.bincount(label_F, minlength=num_experts).tolist() == [size] * num_experts


def test_more_iterations_never_cost_more():
    points_FK = np.random.default_rng(0).normal(size=(90, 5)).astype(np.float32)

    def spread(iterations):
        label_F = balanced_kmeans(points_FK, 9, max_iterations=iterations, seed=1)
        return sum(
            ((g - g.mean(0)) ** 2).sum() for g in (points_FK[label_F == e] for e in range(9))
        )

    costs = [spread(iterations) for iterations in (1, 2, 4, 16)]
    assert all(later <= earlier + 1e-4 for earlier, later in itertools.pairwise(costs))
