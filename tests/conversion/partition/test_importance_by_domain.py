"""LLaMA-MoE's gradient partitions, by hand and by their promises."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moesaic._errors import InputError
from moesaic.conversion.partition._base import PartitionInput
from moesaic.conversion.partition.importance_by_domain import (
    ImportanceByDomainConfig,
    expert_values,
    greedy,
    importance_by_domain,
    shared_neurons,
)

NONE, INNER = ImportanceByDomainConfig(), ImportanceByDomainConfig(sharing="inner")


def source_of(value_CF, num_experts, num_shared=0):
    value_CF = torch.as_tensor(value_CF, dtype=torch.float32)
    return PartitionInput(
        num_experts=num_experts,
        num_neurons=value_CF.shape[1],
        stats={"activation_importance_CF": value_CF},
        num_shared=num_shared,
    )


def test_greedy_by_hand():
    # Expert 0: 9 7 5 1; expert 1: 8 6 2 3. Offers in turn: 9 (neuron 0 to 0); then expert 0 offers
    # 7 (neuron 1) and expert 1 offers 6 (its 8 is taken): 7, and expert 0 is full. Expert 1 takes
    # what is left: neuron 3 at 3, then 2 at 2.
    order_F = importance_by_domain(source_of([[9, 7, 5, 1], [8, 6, 2, 3]], 2), NONE)
    assert order_F.tolist() == [0, 1, 3, 2]


def test_the_larger_importance_goes_first():
    # Neuron 0 is worth 5 to expert 0 and 6 to expert 1, which gets it.
    order_F = importance_by_domain(source_of([[5, 4, 1, 0], [6, 1, 0, 2]], 2), NONE)
    assert order_F.tolist() == [1, 2, 0, 3]


def test_inner_sharing_by_hand():
    # The best two of 9 7 5 1 are 0 and 1, of 8 6 2 3 too: both experts hold them, 2 and 3 are lost.
    order_F = importance_by_domain(source_of([[9, 7, 5, 1], [8, 6, 2, 3]], 2), INNER)
    assert order_F.tolist() == [0, 1, 0, 1]


def test_residual_sharing_by_hand():
    # Blocks of 2, one shared, two routed. Expert 0's best two: 4 and 0; expert 1's: 4 and 3. Both
    # want 4. Without it: 0 1 and 3 1: both want 1. The shared block is 4, 1.
    value_CF = [[8, 6, 1, 2, 9, 0], [3, 5, 1, 7, 9, 2]]
    order_F = importance_by_domain(source_of(value_CF, 3, num_shared=1), NONE)
    # Then greedily: 8 (neuron 0 to expert 0), 7 (3 to 1), 2 (5 to 1), and neuron 2 is left to 0.
    assert order_F.tolist() == [4, 1, 0, 2, 3, 5]


def test_residual_sharing_stops_when_it_is_full():
    # Both experts want 0 and 1 alike, one place is left: the one that matters more to all, 10 to 9.
    value_EF = np.array([[4.0, 5.0, 1.0, 0.0], [5.0, 5.0, 0.0, 1.0]])
    assert shared_neurons(value_EF, size=2, num_shared=1).tolist() == [1]
    assert shared_neurons(value_EF, size=2, num_shared=0).tolist() == []


def test_inner_and_residual_sharing_together():
    value_CF = [[8, 6, 1, 2, 9, 0], [3, 5, 1, 7, 9, 2]]
    order_F = importance_by_domain(source_of(value_CF, 3, num_shared=1), INNER)
    # Shared 4 and 1; of the rest expert 0 takes 0 and 3, expert 1 takes 3 and 0.
    assert order_F.tolist() == [4, 1, 0, 3, 3, 0]


def test_experts_take_turns_over_fewer_domains():
    value_CF = np.array([[1.0, 2.0], [3.0, 4.0]])
    assert expert_values(value_CF, 3).tolist() == [[1, 2], [3, 4], [1, 2]]


def test_more_domains_are_averaged():
    value_CF = np.array([[1.0], [2.0], [5.0]])
    # Experts 0: domains 0 and 2; 1: domain 1.
    assert expert_values(value_CF, 2).tolist() == [[3.0], [2.0]]


def test_experts_of_one_domain_share_its_best_neurons_evenly():
    order_F = importance_by_domain(source_of([[8, 7, 6, 5, 4, 3, 2, 1]], 2), NONE)
    assert order_F.tolist() == [0, 2, 4, 6, 1, 3, 5, 7]


def test_planted_domains_are_found():
    # Neuron f matters to domain f modulo 4 and hardly to others.
    rng = torch.Generator().manual_seed(0)
    value_CF = 0.1 * torch.rand(4, 48, generator=rng)
    for f in range(48):
        value_CF[f % 4, f] += 1.0
    order_EF = importance_by_domain(source_of(value_CF, 4), NONE).reshape(4, 12)
    for e in range(4):
        assert (order_EF[e] % 4 == e).all()


@settings(max_examples=40, deadline=None)
@given(
    num_experts=st.integers(2, 6),
    size=st.integers(1, 5),
    num_domains=st.integers(1, 8),
    shared=st.integers(0, 5),
    seed=st.integers(0, 2**31),
)
def test_promises(num_experts, size, num_domains, shared, seed):
    shared = min(shared, num_experts - 1)
    # Few different values, so that ties are common.
    value_CF = np.random.default_rng(seed).integers(0, 4, (num_domains, num_experts * size))
    source = source_of(value_CF, num_experts, shared)
    order_F = importance_by_domain(source, NONE)
    assert sorted(order_F.tolist()) == list(range(num_experts * size))
    if num_domains < num_experts - shared:
        return
    inner_EF = importance_by_domain(source, INNER).reshape(num_experts, size)
    assert torch.equal(inner_EF[:shared].flatten(), order_F[: shared * size])
    always = set(inner_EF[:shared].flatten().tolist())
    value_EF = expert_values(value_CF.astype(np.float64), num_experts - shared)
    for e, members in enumerate(inner_EF[shared:].tolist()):
        assert len(set(members)) == size
        assert not always & set(members)
        left = [f for f in range(num_experts * size) if f not in always and f not in members]
        assert not left or value_EF[e, members].min() >= value_EF[e, left].max()


def test_greedy_equals_a_plain_search():
    rng = np.random.default_rng(0)
    value_EF = rng.random((5, 30))
    got = greedy(value_EF, 6, np.ones(30, dtype=bool))
    left = value_EF.copy()
    want = [[] for _ in range(5)]
    for _ in range(30):
        e, f = np.unravel_index(left.argmax(), left.shape)
        want[e].append(int(f))
        left[:, f] = -1.0
        if len(want[e]) == 6:
            left[e] = -1.0
    assert [m.tolist() for m in got] == want


def test_what_cannot_be_shared_is_refused():
    with pytest.raises(
        InputError, match=r"3 experts need as many domains, the text has 2; use sharing 'none'"
    ):
        importance_by_domain(source_of(torch.rand(2, 6), 3), INNER)
    with pytest.raises(InputError, match="has 0 domains; calibrate on text"):
        importance_by_domain(source_of(torch.rand(0, 6), 3), NONE)
    with pytest.raises(InputError, match=r"shared must be in \[0, 3\).*got 3; leave some"):
        source_of(torch.rand(2, 6), 3, num_shared=3)
    with pytest.raises(InputError, match=r"activation_importance_CF must have the shape \(2, 6\)"):
        dataclasses.replace(
            source_of(torch.rand(2, 6), 3), stats={"activation_importance_CF": torch.rand(2, 5)}
        )
