import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from moesaic.conversion.partition._assignment import balanced_assignment


def total(cost_FE, label_F):
    return cost_FE[np.arange(len(label_F)), label_F].sum()


def brute_force(cost_FE):
    num_neurons, num_experts = cost_FE.shape
    dealt = tuple(range(num_experts)) * (num_neurons // num_experts)
    return min(total(cost_FE, list(p)) for p in set(itertools.permutations(dealt)))


def solver(cost_FE):
    size = len(cost_FE) // cost_FE.shape[1]
    rows, columns = linear_sum_assignment(np.repeat(cost_FE, size, axis=1))
    return cost_FE[rows, columns // size].sum()


def test_worked_example():
    # Three neurons prefer block 0, which has room for two. Moving neuron 0, 1 or 2 to block 1 costs
    # 5, 1 or 3 more: neuron 1 moves, and the total is 0 + 1 + 0 + 0.
    cost_FE = np.array([[0.0, 5.0], [0.0, 1.0], [0.0, 3.0], [4.0, 0.0]])
    assert balanced_assignment(cost_FE).tolist() == [0, 1, 0, 1]


def test_a_chain_through_a_full_block_is_found():
    # Block 0 is overfull and block 2 has room, but only the neuron of block 1 likes block 2.
    cost_FE = np.array([[0.0, 1.0, 9.0], [0.0, 9.0, 9.0], [9.0, 0.0, 1.0]])
    assert balanced_assignment(cost_FE).tolist() == [1, 0, 2]


@pytest.mark.parametrize(("num_neurons", "num_experts"), [(4, 2), (6, 2), (6, 3), (8, 2), (5, 5)])
@pytest.mark.parametrize("seed", range(4))
def test_equals_brute_force(num_neurons, num_experts, seed):
    rng = np.random.default_rng(seed)
    cost_FE = rng.normal(size=(num_neurons, num_experts))
    assert total(cost_FE, balanced_assignment(cost_FE)) == pytest.approx(brute_force(cost_FE))


@settings(max_examples=80, deadline=None)
@given(
    num_experts=st.integers(1, 9),
    size=st.integers(1, 9),
    seed=st.integers(0, 2**32 - 1),
    kind=st.sampled_from(["normal", "ties", "alike", "one-favourite", "huge"]),
)
def test_equals_a_general_solver(num_experts, size, seed, kind):
    rng = np.random.default_rng(seed)
    cost_FE = rng.normal(size=(num_experts * size, num_experts))
    if kind == "ties":
        cost_FE = rng.integers(0, 3, size=cost_FE.shape).astype(float)
    elif kind == "alike":
        cost_FE = np.tile(cost_FE[:1], (len(cost_FE), 1))
    elif kind == "one-favourite":
        cost_FE[:, 0] -= 100.0
    elif kind == "huge":
        cost_FE *= 1e12
    label_F = balanced_assignment(cost_FE)
    assert np.bincount(label_F, minlength=num_experts).tolist() == [size] * num_experts
    assert total(cost_FE, label_F) == pytest.approx(solver(cost_FE), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("num_experts", [8, 64, 256])
def test_equals_a_general_solver_at_width_768(num_experts):
    rng = np.random.default_rng(0)
    point_FK, centre_EK = rng.normal(size=(768, 8)), rng.normal(size=(num_experts, 8))
    cost_FE = (centre_EK**2).sum(1) - 2 * point_FK @ centre_EK.T
    assert total(cost_FE, balanced_assignment(cost_FE)) == pytest.approx(solver(cost_FE))
