"""MoEfication's graph: its weights by hand, its balancing, and what METIS makes of it."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moesaic._errors import InputError
from moesaic.conversion.partition import _base
from moesaic.conversion.partition.coactivation_graph import (
    CoactivationGraphConfig,
    balance,
    coactivation_graph,
    edge_weights,
)

from .planted import blocks, planted_source, random_source, within


def test_weights_by_hand():
    # 4 x 4, sorted: 0 0 0 0 1 1 2 2 4 4 8 8 9 9 9 9; the first decile, at 1.5, and the second, at
    # 3, are 0; the third, at 4.5, is 1: the unit is 0.99.
    adjacency_FF = np.array([[9, 8, 4, 0], [8, 9, 2, 1], [4, 2, 9, 0], [0, 1, 0, 9]], np.float32)
    weight_FF = edge_weights(adjacency_FF, 0.99)
    # 8 / 0.99 = 8.08, 4 / 0.99 = 4.04, 2 / 0.99 = 2.02, 1 / 0.99 = 1.01.
    assert weight_FF.tolist() == [[0, 8, 4, 0], [8, 0, 2, 1], [4, 2, 0, 0], [0, 1, 0, 0]]


def test_edges_below_one_are_dropped():
    # Unit 2 * 1: the edge of 1 is half a unit, that of 4 two.
    adjacency_FF = np.array([[9, 8, 4, 0], [8, 9, 2, 1], [4, 2, 9, 0], [0, 1, 0, 9]], np.float32)
    assert edge_weights(adjacency_FF, 2.0)[1].tolist() == [4, 0, 1, 0]


def test_weights_fit_in_the_integers_of_metis():
    adjacency_FF = np.full((6, 6), 1.0, np.float32)
    adjacency_FF[0, 1] = adjacency_FF[1, 0] = 1e12
    weight_FF = edge_weights(adjacency_FF, 0.99)
    assert 2**30 < weight_FF.sum() < 2**31
    assert (weight_FF == weight_FF.T).all()


def test_a_graph_without_edges_is_refused():
    for adjacency_FF in (np.zeros((4, 4), np.float32), np.eye(4, dtype=np.float32)):
        with pytest.raises(InputError, match=r"no edge that reaches the threshold; lower it or"):
            edge_weights(adjacency_FF, 0.99)


@settings(max_examples=50, deadline=None)
@given(num_experts=st.integers(1, 6), size=st.integers(1, 6), seed=st.integers(0, 2**31))
def test_balancing_moves_the_surplus_alone(num_experts, size, seed):
    rng = np.random.default_rng(seed)
    label_F = rng.integers(0, num_experts, num_experts * size)
    before = label_F.copy()
    balanced_F = balance(label_F, num_experts, seed)
    assert (np.bincount(balanced_F, minlength=num_experts) == size).all()
    assert (label_F == before).all()
    moved = balanced_F != before
    surplus = np.maximum(np.bincount(before, minlength=num_experts) - size, 0).sum()
    assert moved.sum() == surplus
    # None came from a block that had room.
    assert all((before == block).sum() > size for block in before[moved])


def test_planted_groups_are_found():
    pytest.importorskip("pymetis")
    source, group_F = planted_source(96, 8)
    # Neurons of a group are strong together in most groups of tokens, others in few.
    noise_FF = torch.rand(96, 96, generator=torch.Generator().manual_seed(0))
    same_FF = group_F == group_F[:, None]
    adjacency_FF = torch.where(same_FF, 8.0, 1.0) + (noise_FF + noise_FF.T)
    source = dataclasses.replace(source, stats={"adjacency_FF": adjacency_FF})
    permutation_F = coactivation_graph(source, CoactivationGraphConfig())
    for block in blocks(permutation_F, 8):
        assert len({int(group_F[f]) for f in block}) == 1


def test_it_keeps_more_weight_within_blocks_than_chance():
    pytest.importorskip("pymetis")
    source = random_source(240, 8)
    weight_FF = torch.from_numpy(edge_weights(source.stats["adjacency_FF"].numpy(), 0.99)).float()
    cut_F = coactivation_graph(source, CoactivationGraphConfig())
    chance = [
        within(weight_FF, torch.randperm(240, generator=torch.Generator().manual_seed(s)), 8)
        for s in range(20)
    ]
    assert within(weight_FF, cut_F, 8) > max(chance)


def test_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(_base.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"'coactivation-graph' needs pymetis.*pip install pymet"):
        coactivation_graph(random_source(24, 4), CoactivationGraphConfig())


def test_wrong_threshold():
    with pytest.raises(InputError, match=r"threshold must be above 0, got 0.0; 0.99 is the paper"):
        CoactivationGraphConfig(threshold=0.0)
    source = dataclasses.replace(random_source(24, 4), stats={})
    with pytest.raises(InputError, match=r"statistic adjacency_FF; add the collector 'adjacency'"):
        coactivation_graph(source, CoactivationGraphConfig())
