"""CMoE's router, arXiv 2502.04416: scores of representative neurons, and the bias that balances."""

from __future__ import annotations

import math

import pytest
import torch
from nn_cases import make_layer, make_router, tokens
from torch.utils.checkpoint import checkpoint

from moesaic.nn.layer import end_step

E = 6


def by_hand(**options):
    """Three experts in two dimensions, with ReLU gates."""
    router = make_router("cmoe", 3, 2, activation="relu", **options)
    with torch.no_grad():
        router.weight.copy_(torch.tensor([[1.0, 0], [0, 1], [1, 1]]))
        router.gate.copy_(torch.tensor([[1.0, 0], [0, 2], [-1, 0]]))
        router.scale.zero_()
    return router


def test_scores_by_hand():
    # h = (2, 1): up 2, 1, 3; gate 2, 2, relu(-2) = 0. h = (-2, 1): up -2, 1, -1; gate 0, 2, 2.
    routing = by_hand(top_k=2)(torch.tensor([[2.0, 1], [-2, 1]]))
    torch.testing.assert_close(routing.scores_TE, torch.tensor([[4.0, 2, 0], [0, 2, 2]]))
    assert routing.ids_TK[0].tolist() == [0, 1]
    assert set(routing.ids_TK[1].tolist()) == {1, 2}
    assert torch.equal(routing.weights_TK, torch.ones(2, 2))


def test_a_scale_weighs_by_the_probability():
    router = by_hand(top_k=1)
    with torch.no_grad():
        router.scale.copy_(torch.tensor([0.5, 9, 9]))
    # p = e^4 / (e^4 + e^2 + 1) for the first expert.
    probability = math.exp(4) / (math.exp(4) + math.exp(2) + 1)
    routing = router(torch.tensor([[2.0, 1]]))
    torch.testing.assert_close(routing.weights_TK, torch.tensor([[1 + 0.5 * probability]]))


def test_the_bias_chooses_and_does_not_weigh():
    router = by_hand(top_k=1, bias_step=0.5)
    with torch.no_grad():
        router.scale.fill_(1.0)
        router.balance.copy_(torch.tensor([0, 2, 0]))
    # p = 0.87, 0.12, 0.02; the bias of 2 * 0.5 lifts the second above the first.
    routing = router(torch.tensor([[2.0, 1]]))
    assert routing.ids_TK.tolist() == [[1]]
    probability = math.exp(2) / (math.exp(4) + math.exp(2) + 1)
    torch.testing.assert_close(routing.weights_TK, torch.tensor([[1 + probability]]))


# Three tokens choose the first expert, one the second: the mean load is 4 / 3.
LOADS = torch.tensor([[2.0, 0], [2, 0], [2, 0], [0, 2]])


def test_a_training_step_moves_the_bias_against_the_load():
    router = by_hand(top_k=1).train()
    routing = router(LOADS)
    assert routing.ids_TK.flatten().tolist() == [0, 0, 0, 1]
    assert router.balance.tolist() == [0, 0, 0]
    routing.weights_TK.sum().backward()
    assert router.balance.tolist() == [0, 0, 0]
    router.end_step()
    assert router.balance.tolist() == [-1, 1, 1]
    # Passes that are accumulated are one step.
    for _ in range(2):
        router(LOADS).weights_TK.sum().backward()
    router.end_step()
    assert router.balance.tolist() == [-2, 2, 2]


def test_nothing_else_moves_the_bias():
    router = by_hand(top_k=1)
    router(LOADS).weights_TK.sum().backward()
    with torch.no_grad():
        router.train()(LOADS)
    # The load is even: two tokens, two experts.
    even = by_hand(top_k=1)
    even = make_router("cmoe", 2, 2, activation="relu", top_k=1).train()
    with torch.no_grad():
        even.weight.copy_(torch.eye(2))
        even.gate.copy_(torch.eye(2))
    even(torch.eye(2)).weights_TK.sum().backward()
    router.end_step()
    even.end_step()
    assert router.balance.tolist() == [0, 0, 0]
    assert even.balance.tolist() == [0, 0]


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_forward_that_is_recomputed_counts_once(reentrant):
    moe = make_layer("cmoe", num_experts=E, router_config={"top_k": 2}).train()
    h_TD = tokens(63, dtype=torch.float64).requires_grad_()
    checkpoint(moe, h_TD, use_reentrant=reentrant).sum().backward()
    end_step(moe)
    assert moe.router.balance.abs().max() == 1


def test_steps_balance_the_load():
    router = make_router("cmoe", E, top_k=2, bias_step=0.001).train()
    # A bias of -0.5: the first expert is never chosen.
    router.balance[0] = -500
    h_TD = tokens(60)
    before_E = router(h_TD).counts_E()
    for _ in range(800):
        router(h_TD).weights_TK.sum().backward()
        router.end_step()
    after_E = router(h_TD).counts_E()
    # 60 * 2 / 6 = 20 tokens each.
    assert before_E[0] == 0
    assert (after_E - 20).abs().max() <= 3


def test_half_precision_does_not_swallow_a_step():
    router = by_hand(top_k=1)
    router.balance += 1000
    router = router.to(torch.bfloat16).train()
    router(LOADS.bfloat16()).weights_TK.sum().backward()
    router.end_step()
    assert router.balance.tolist() == [999, 1001, 1001]
