"""Selective Sinkhorn routing, arXiv 2511.08972: the plan, what it gives a token, and when."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nn_cases import make_router, set_scores, tokens

from moesaic.nn.routers import selective_sinkhorn
from moesaic.nn.routers.selective_sinkhorn import sinkhorn_duals

E = 6


def plan(gains_TE, max_rounds=1000, tolerance=1e-8):
    log_v_E, off = sinkhorn_duals(gains_TE, max_rounds, tolerance)
    return (gains_TE + log_v_E).softmax(-1), off


def sinkhorn(gains_TE, rounds=2000):
    """The plan by scaling rows and columns in turn, as the paper writes it."""
    kernel_TE = gains_TE.exp()
    num_tokens, num_experts = gains_TE.shape
    u_T, v_E = torch.ones(num_tokens).double(), torch.ones(num_experts).double()
    for _ in range(rounds):
        v_E = num_tokens / num_experts / (kernel_TE.T @ u_T)
        u_T = 1 / (kernel_TE @ v_E)
    return u_T[:, None] * kernel_TE * v_E


def sinkhorn_router(**options):
    return make_router("selective-sinkhorn", E, **{"probability": 1.0, **options})


@settings(max_examples=20, deadline=None)
@given(
    num_tokens=st.integers(1, 40),
    num_experts=st.integers(1, 9),
    seed=st.integers(0, 2**31),
    spread_out=st.floats(0.0, 3.0),
)
def test_plan_has_its_sums(num_tokens, num_experts, seed, spread_out):
    gains_TE = spread_out * tokens(num_tokens, num_experts, seed=seed, dtype=torch.float64)
    plan_TE, _ = plan(gains_TE, tolerance=1e-5)
    assert (plan_TE.sum(1) - 1).abs().max() < 1e-4
    mean = num_tokens / num_experts
    assert (plan_TE.sum(0) - mean).abs().max() < 1e-4 * max(1.0, mean)


def test_plan_is_that_of_scaling_in_turn():
    gains_TE = tokens(63, E, dtype=torch.float64)
    torch.testing.assert_close(plan(gains_TE)[0], sinkhorn(gains_TE), rtol=0, atol=1e-7)


def test_by_hand():
    # Symmetric, so v is equal for both: a row is softmax(1.46, 0.54) = 1 / (1 + exp(-0.92)).
    plan_TE, off = plan(torch.tensor([[0.73, 0.27], [0.27, 0.73]]) / 0.5)
    torch.testing.assert_close(
        plan_TE, torch.tensor([[0.715, 0.285], [0.285, 0.715]]), rtol=0, atol=1e-3
    )
    assert off < 1e-6


@pytest.mark.parametrize("gain", ["softmax", "linear"])
def test_weights_are_the_plan_renormalised(gain):
    router, h_TD = sinkhorn_router(gain=gain, tolerance=1e-6).train(), tokens(63)
    routing = router(h_TD)
    gains_TE = routing.scores_TE.double()
    if gain == "softmax":
        gains_TE = gains_TE.softmax(-1)
    best_TK = sinkhorn(gains_TE / 0.5).topk(2)
    assert torch.equal(routing.ids_TK, best_TK.indices)
    expected = best_TK.values / best_TK.values.sum(1, keepdim=True)
    torch.testing.assert_close(routing.weights_TK.double(), expected, rtol=0, atol=1e-5)


def test_what_is_added_to_a_token_or_an_expert_leaves_the_plan():
    gains_TE = tokens(63, E, dtype=torch.float64)
    expected = plan(gains_TE)[0]
    for shift in (tokens(63, 1, seed=2), tokens(1, E, seed=3)):
        torch.testing.assert_close(plan(gains_TE + shift)[0], expected, rtol=0, atol=1e-6)
    # The second changes the usual top-k.
    assert not torch.equal((gains_TE + shift).topk(2).indices, gains_TE.topk(2).indices)


def test_no_subset_is_closer_to_the_plan():
    # KL(alpha || row) for alpha the row renormalised over a subset is -log of the subset's mass.
    row_E = plan(tokens(63, E, dtype=torch.float64))[0][0]

    def distance(ids):
        alpha_K = row_E[ids] / row_E[ids].sum()
        return (alpha_K * (alpha_K / row_E[ids]).log()).sum()

    best = distance(row_E.topk(2).indices)
    subsets = torch.combinations(torch.arange(E), 2)
    assert all(best <= distance(ids) + 1e-12 for ids in subsets)
    # Nor is another distribution over the best subset.
    ids = row_E.topk(2).indices
    for share in torch.linspace(0.05, 0.95, 19).double():
        alpha_K = torch.stack([share, 1 - share])
        assert best <= (alpha_K * (alpha_K / row_E[ids]).log()).sum() + 1e-12


def test_a_plan_evens_a_skewed_load():
    router, plain = sinkhorn_router(temperature=0.1), make_router("topk-softmax", E)
    h_TD = tokens(300)
    with torch.no_grad():
        # Every token's favourite.
        h_TD += router.weight[0]
    plain.load_state_dict(router.state_dict())
    even, skewed = router.train()(h_TD).counts_E(), plain(h_TD).counts_E()
    assert skewed.max() > 1.5 * 100
    assert even.max() < 1.3 * 100


def no_plan(*args):
    raise AssertionError("a plan was solved")


def test_at_zero_it_is_the_usual_router_bit_by_bit(monkeypatch):
    monkeypatch.setattr(selective_sinkhorn, "sinkhorn_duals", no_plan)
    router, plain = sinkhorn_router(probability=0.0).train(), make_router("topk-softmax", E)
    plain.load_state_dict(router.state_dict())
    routing, expected = router(tokens(63)), plain(tokens(63))
    assert torch.equal(routing.ids_TK, expected.ids_TK)
    assert torch.equal(routing.weights_TK, expected.weights_TK)


def test_evaluation_solves_nothing(monkeypatch):
    monkeypatch.setattr(selective_sinkhorn, "sinkhorn_duals", no_plan)
    router = sinkhorn_router()
    together = router(tokens(63))
    assert torch.equal(router(tokens(63)[:1]).ids_TK, together.ids_TK[:1])


def test_fewer_tokens_than_experts_are_routed_as_usual(monkeypatch):
    monkeypatch.setattr(selective_sinkhorn, "sinkhorn_duals", no_plan)
    assert sinkhorn_router().train()(tokens(E - 1)).ids_TK.shape == (E - 1, 2)


def test_the_chance_is_kept(monkeypatch):
    solved = []
    real = sinkhorn_duals
    monkeypatch.setattr(
        selective_sinkhorn, "sinkhorn_duals", lambda *args: solved.append(1) or real(*args)
    )
    router, h_TD = sinkhorn_router(probability=0.25).train(), tokens(E)
    torch.manual_seed(0)
    for _ in range(400):
        router(h_TD)
    # Mean 100, deviation 8.7.
    assert 70 < len(solved) < 130


def test_gradient_is_that_at_constant_duals():
    router, h_TD = sinkhorn_router(gain="linear").double().train(), tokens(63, dtype=torch.float64)
    routing = router(h_TD)
    routing.weights_TK[:, 0].sum().backward()
    # A softmax of two: dw/ds = w (1 - w) / temperature for its own score, minus it for the other.
    slope_T = routing.weights_TK.prod(1).detach() / 0.5
    slope_TE = torch.zeros(63, E, dtype=torch.float64)
    slope_TE.scatter_(1, routing.ids_TK, torch.stack([slope_T, -slope_T], 1))
    torch.testing.assert_close(router.weight.grad, slope_TE.T @ h_TD)


def test_without_gradient_the_weights_teach_nothing():
    routing = sinkhorn_router(gradient="none").train()(tokens(63))
    assert not routing.weights_TK.requires_grad
    assert routing.scores_TE.requires_grad


def test_noise_breaks_ties():
    flat = torch.zeros(12, E)
    plain, noisy = sinkhorn_router().train(), sinkhorn_router(noise=0.1).train()
    torch.manual_seed(0)
    loads = [router(set_scores(router, flat)).counts_E().max() for router in (plain, noisy)]
    assert loads[0] == 12
    assert loads[1] < 12


def test_a_plan_that_does_not_converge_is_said(caplog):
    router = sinkhorn_router(gain="linear", temperature=0.01, max_rounds=2).train()
    routing = router(tokens(63))
    assert routing.weights_TK.isfinite().all()
    assert "from balance after max_rounds=2; raise it or temperature" in caplog.text
