"""COMET, arXiv 2306.02824: soft trees that come to reach one expert each."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nn_cases import make_layer, make_router, tokens

from moesaic.nn.routers.soft_trees import leaves_in_order, smooth_step

SIZES = pytest.mark.parametrize("num_experts", [1, 2, 3, 5, 6, 9, 16])


@SIZES
def test_probabilities_sum_to_one_and_have_a_place_for_each_expert(num_experts):
    router, h_TD = make_router("soft-trees", num_experts, gamma=4.0), tokens(63)
    reach_TKE = router.reach(h_TD)
    assert reach_TKE.shape == (63, 2, num_experts)
    torch.testing.assert_close(reach_TKE.sum(-1), torch.ones(63, 2), rtol=0, atol=1e-6)
    torch.testing.assert_close(router(h_TD).weights_TE().sum(1), torch.ones(63))


@torch.no_grad()
def walk(router, tree, h_D, node=0):
    """Every leaf of a tree with its probability, from left to right, by recursion."""
    num_experts = router.num_experts
    if node >= num_experts - 1:
        return [1.0]
    row = tree * (num_experts - 1) + node
    score = router.split_weight[row] @ h_D + router.split_bias[row]
    left = float(smooth_step(score, router.config.gamma))
    return [
        *(left * p for p in walk(router, tree, h_D, 2 * node + 1)),
        *((1 - left) * p for p in walk(router, tree, h_D, 2 * node + 2)),
    ]


@SIZES
@torch.no_grad()
def test_weights_are_the_formula_walked_by_hand(num_experts):
    router = make_router("soft-trees", num_experts, gamma=2.0).double()
    h_TD = tokens(9, dtype=torch.float64)
    for t, h_D in enumerate(h_TD):
        mass_E = [0.0] * num_experts
        for tree in range(2):
            for leaf, reached in enumerate(walk(router, tree, h_D)):
                row = tree * num_experts + leaf
                score = float(router.weight[row] @ h_D + router.bias[row])
                mass_E[leaf] += reached * math.exp(score)
        expected = torch.tensor(mass_E, dtype=torch.float64) / sum(mass_E)
        torch.testing.assert_close(router(h_TD).weights_TE()[t], expected)


def test_leaves_are_in_the_order_of_a_walk():
    # Five leaves are nodes 4 to 8 of the heap: 7 and 8 below 3, then 4; 5 and 6 below 2.
    assert leaves_in_order(5) == [3, 4, 0, 1, 2]
    assert leaves_in_order(4) == [0, 1, 2, 3]
    assert leaves_in_order(1) == [0]


@SIZES
def test_decided_trees_reach_one_expert_each_and_their_splits_learn_nothing(num_experts):
    router, h_TD = make_router("soft-trees", num_experts), tokens(63)
    with torch.no_grad():
        router.split_weight *= 1e6
    reach_TKE = router.reach(h_TD)
    assert ((reach_TKE > 0).sum(-1) == 1).all()
    for t, h_D in enumerate(h_TD[:9]):
        for tree in range(2):
            assert walk(router, tree, h_D) == reach_TKE[t, tree].tolist()
    routing = router(h_TD)
    assert int(routing.active_T().max()) <= 2
    routing.weights_TK.square().sum().backward()
    for parameter in (router.split_weight, router.split_bias):
        # With one expert there are none.
        assert parameter.grad is not None or num_experts == 1
        assert parameter.grad is None or not parameter.grad.any()


@given(z=st.floats(-3, 3), gamma=st.floats(0.1, 4))
@settings(max_examples=50)
def test_smooth_step_is_the_cubic(z, gamma):
    if abs(z) >= gamma / 2:
        expected = float(z > 0)
    else:
        expected = -2 * z**3 / gamma**3 + 3 * z / (2 * gamma) + 0.5
    value = smooth_step(torch.tensor(z, dtype=torch.float64), gamma)
    assert value.item() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("gamma", [0.5, 1.0, 4.0])
def test_smooth_step_has_no_corner(gamma):
    z = torch.tensor([-gamma / 2, 0.0, gamma / 2], dtype=torch.float64, requires_grad=True)
    value = smooth_step(z, gamma)
    value.sum().backward()
    torch.testing.assert_close(value, torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64))
    # 3 / (2 gamma) in the middle, 0 where it ends.
    assert z.grad.tolist() == pytest.approx([0.0, 1.5 / gamma, 0.0])


def test_the_penalty_is_the_entropy_of_what_is_reached():
    router, h_TD = make_router("soft-trees", 6, gamma=4.0, entropy_coef=0.5), tokens(63)
    reach_TKE = router.reach(h_TD)
    expected = 0.5 * (-reach_TKE * (reach_TKE + 1e-6).log()).sum((1, 2)).mean()
    torch.testing.assert_close(router(h_TD).aux["tree-entropy"], expected)
    assert not make_router("soft-trees", 6, entropy_coef=0.0)(h_TD).aux
    assert router(tokens(0)).aux["tree-entropy"].item() == 0.0


def test_the_penalty_decides_the_splits():
    router, h_TD = make_router("soft-trees", 6, spread_out=0.1, entropy_coef=1.0), tokens(63)
    before = router(h_TD).active_T().double().mean()
    optimizer = torch.optim.Adam(router.parameters(), lr=0.05)
    for _ in range(60):
        optimizer.zero_grad()
        router(h_TD).aux["tree-entropy"].backward()
        optimizer.step()
    after = router(h_TD).active_T().double().mean()
    assert before > 5.0
    assert after < 2.5


def test_experts_that_no_tree_reaches_are_not_computed():
    layer = make_layer("soft-trees")
    with torch.no_grad():
        layer.router.split_weight *= 1e6
    h_TD = tokens(63, dtype=torch.float64)
    held_TK = layer.router(h_TD).ids_TK < 6
    assert held_TK.sum(1).max() <= 2
    assert held_TK.sum() < 2 * 63 + 1
