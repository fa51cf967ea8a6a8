"""AdaMoE, arXiv 2406.13233: extremes, sums and bounds, the loss, and ties."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nn_cases import hand_routing, make_layer, make_loss, make_router, set_scores, tokens

from moesaic.nn.layer import record_routing
from moesaic.nn.routers import null_experts

E, M, K = 6, 8, 3


def with_nulls_at(monkeypatch, value):
    """Put the logits of the null experts at a value, whatever the inputs."""
    plain = null_experts.linear_scores

    def scores(*args):
        scores_TE = plain(*args)
        return torch.cat([scores_TE[:, :E], torch.full_like(scores_TE[:, E:], value)], dim=1)

    monkeypatch.setattr(null_experts, "linear_scores", scores)


@pytest.mark.parametrize("value", [-float("inf"), -1e4], ids=["-inf", "-1e4"])
def test_nulls_never_chosen_leave_the_usual_top_k(monkeypatch, value):
    with_nulls_at(monkeypatch, value)
    moe = make_layer("null-experts", router_config={"num_null": M, "top_k": K}).eval()
    vanilla = make_layer("topk-softmax", router_config={"top_k": K}).eval()
    with torch.no_grad():
        vanilla.router.weight.copy_(moe.router.weight[:E])
        vanilla.experts.load_state_dict(moe.experts.state_dict())
    h_TD = tokens(63, dtype=torch.float64)
    torch.testing.assert_close(moe(h_TD), vanilla(h_TD), rtol=0, atol=1e-6)
    assert torch.equal(moe.router(h_TD).ids_TK, vanilla.router(h_TD).ids_TK)


@pytest.mark.parametrize("value", [float("inf"), 1e4], ids=["inf", "1e4"])
def test_nulls_always_chosen_give_zero_and_run_nothing(monkeypatch, value):
    with_nulls_at(monkeypatch, value)
    moe = make_layer("null-experts", router_config={"num_null": M, "top_k": K}).train()
    h_TD = tokens(63, dtype=torch.float64).requires_grad_()
    with record_routing(moe) as routings:
        y_TD = moe(h_TD)
    assert (y_TD == 0).all()
    assert (routings[0].ids_TK == E).all()
    assert routings[0].active_T().sum() == 0
    y_TD.sum().backward()
    assert h_TD.grad.isfinite().all()


def test_few_nulls_far_above_leave_real_gates_that_sum_to_one(monkeypatch):
    # One null for three slots: two real experts, whose softmax over all is 0 in float32.
    with_nulls_at(monkeypatch, 1e4)
    router = make_router("null-experts", E, num_null=1, top_k=3)
    routing = router(tokens(63))
    assert (routing.ids_TK[:, 0] == E).all()
    best_TE = routing.scores_TE[:, :E].topk(2)
    assert torch.equal(routing.ids_TK[:, 1:], best_TE.indices)
    torch.testing.assert_close(routing.weights_TK[:, 1:], best_TE.values.softmax(-1))


@settings(max_examples=40, deadline=None)
@given(
    num_experts=st.integers(1, 9),
    num_null=st.integers(0, 9),
    data=st.data(),
    seed=st.integers(0, 2**31),
    spread_out=st.floats(0.0, 30.0),
)
def test_gates_sum_to_one_and_the_count_has_bounds(num_experts, num_null, data, seed, spread_out):
    top_k = data.draw(st.integers(1, num_experts + num_null))
    router = make_router(
        "null-experts",
        num_experts,
        seed=seed,
        spread_out=spread_out,
        num_null=num_null,
        top_k=top_k,
    )
    routing = router(tokens(20, seed=seed))
    real_TK = routing.ids_TK < num_experts
    count_T = real_TK.sum(1)
    assert (count_T >= max(0, top_k - num_null)).all()
    assert (count_T <= min(top_k, num_experts)).all()
    torch.testing.assert_close(routing.weights_TK.sum(1), (count_T > 0).float())
    # The same as renormalising the probabilities of the chosen real experts.
    probs_TE = routing.scores_TE.double().softmax(-1)
    for t in range(20):
        held = routing.ids_TK[t][real_TK[t]]
        expected = probs_TE[t, held] / probs_TE[t, held].sum()
        torch.testing.assert_close(
            routing.weights_TK[t][real_TK[t]].double(), expected, rtol=1e-4, atol=1e-6
        )


def test_tokens_differ_in_their_number_of_experts():
    counts = [make_router("null-experts", E, seed=s)(tokens(63)).active_T() for s in range(40)]
    assert set(counts[0].tolist()) == {0, 1, 2, 3}
    # At balance, as in the mean over random routers, top_k * E / (E + M) = 3 * 6 / 14 = 1.29.
    assert torch.cat(counts).double().mean().item() == pytest.approx(18 / 14, abs=0.1)


def test_by_hand():
    # Two real and two null experts, k = 2. Scores log (4, 1, 2, 1): real 0 and null 0; the single
    # gate is 1. Scores log (3, 1, 1/2, 1/4): both real, gates 3/4 and 1/4. Last: both null.
    router = make_router("null-experts", 2, num_null=2, top_k=2)
    h_TD = set_scores(router, torch.tensor([[4, 1, 2, 1], [3, 1, 0.5, 0.25], [1, 2, 8, 4]]).log())
    routing = router(h_TD)
    assert routing.ids_TK.tolist() == [[0, 2], [0, 1], [2, 2]]
    torch.testing.assert_close(
        routing.weights_TK, torch.tensor([[1.0, 0.0], [0.75, 0.25], [0.0, 0.0]])
    )


def test_moving_mass_among_nulls_leaves_the_loss_where_plain_balance_changes():
    routing = make_router("null-experts", E, num_null=M, top_k=K)(tokens(63))
    mask_BS = torch.ones(7, 9, dtype=torch.bool)
    order = torch.cat(
        [torch.arange(E), E + torch.randperm(M, generator=torch.Generator().manual_seed(0))]
    )
    moved = dataclasses.replace(routing, scores_TE=routing.scores_TE[:, order])
    loss = make_loss("null-balance")
    torch.testing.assert_close(loss(moved, mask_BS), loss(routing, mask_BS))

    # Plain balance over all E + M, the load of each null its own.
    chosen_TK = routing.scores_TE.topk(K).indices
    load_E = torch.bincount(chosen_TK.flatten(), minlength=E + M) / 63

    def plain(scores_TE):
        return (E + M) * (load_E * scores_TE.softmax(-1).mean(0)).sum()

    assert (plain(moved.scores_TE) - plain(routing.scores_TE)).abs() > 1e-2
    # Loads that are averaged over the nulls give the loss.
    load_E[E:] = load_E[E:].mean()
    torch.testing.assert_close(plain(routing.scores_TE), loss(routing, mask_BS))


@pytest.mark.parametrize("top_k", [1, 3, 6])
def test_uniform_routing_gives_k(top_k):
    # Slots per token sum to k and every probability is 1 / (E + M), whoever is chosen.
    router = make_router("null-experts", E, num_null=M, top_k=top_k)
    with torch.no_grad():
        router.weight.zero_()
    value = make_loss("null-balance")(router(tokens(20)), torch.ones(4, 5, dtype=torch.bool))
    assert value.item() == pytest.approx(top_k)


def test_loss_without_nulls_is_plain_balance():
    routing = hand_routing(tokens(20, E), torch.randint(E, (20, 1)).tolist())
    mask_BS = torch.ones(4, 5, dtype=torch.bool)
    torch.testing.assert_close(
        make_loss("null-balance")(routing, mask_BS), make_loss("load-balance")(routing, mask_BS)
    )


def test_ties_go_to_the_lower_index_and_real_experts_first():
    # Null rows that start as copies of the real ones, twice each; k = 4. The best real expert ties
    # with its two copies, the second best with its own: real 3, two nulls, then real 5.
    router = make_router("null-experts", 8, num_null=16, top_k=4)
    real_E = torch.tensor([0.0, 1, 2, 9, 3, 8, 4, 5])
    h_TD = set_scores(router, real_E.repeat(3)[None])
    routing = router(h_TD)
    assert routing.ids_TK.tolist() == [[3, 8, 8, 5]]
    # exp(9) / (exp(9) + exp(8)) = 1 / (1 + exp(-1)).
    gate = torch.tensor(1.0).sigmoid().item()
    assert routing.weights_TK[0].tolist() == pytest.approx([gate, 0, 0, 1 - gate])
    assert torch.equal(routing.scores_TE[0, :8], real_E)


def test_null_rows_learn_from_the_balance_loss_alone():
    moe = make_layer("null-experts", router_config={"num_null": M, "top_k": K}).train()
    with record_routing(moe) as routings:
        y_TD = moe(tokens(63, dtype=torch.float64))
    y_TD.square().sum().backward(retain_graph=True)
    assert moe.router.weight.grad[:E].any(1).all()
    assert not moe.router.weight.grad[E:].any()
    make_loss("null-balance")(routings[0], torch.ones(7, 9, dtype=torch.bool)).backward()
    assert moe.router.weight.grad[E:].any(1).all()
