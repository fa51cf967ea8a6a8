"""Dynamic routing, arXiv 2403.07652: the invariants, known counts, and what its losses teach."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nn_cases import expert_outputs, make_layer, make_loss, make_router, set_scores, tokens

from moesaic.nn.layer import record_routing

few = settings(max_examples=40, deadline=None)
ROUTES = {
    "num_experts": st.integers(1, 16),
    "seed": st.integers(0, 2**31),
    "spread_out": st.floats(0.0, 20.0),
}


def route(threshold, num_experts=6, seed=0, spread_out=1.0, num_tokens=20):
    router = make_router(
        "top-p", num_experts, seed=seed, spread_out=spread_out, threshold=threshold
    )
    routing = router(tokens(num_tokens, seed=seed))
    return routing, routing.scores_TE.softmax(-1)


@few
@given(threshold=st.floats(0, 1, exclude_max=True), **ROUTES)
def test_the_set_is_the_smallest_above_the_threshold(threshold, num_experts, seed, spread_out):
    routing, probs_TE = route(threshold, num_experts, seed, spread_out)
    active_TE = routing.ids_TK < num_experts
    count_T = active_TE.sum(1)
    assert (count_T >= 1).all()
    # Gates are the probabilities themselves: not renormalised.
    held_TE = torch.zeros_like(probs_TE, dtype=torch.bool)
    for t, k in enumerate(count_T.tolist()):
        chosen = routing.ids_TK[t, :k]
        assert (routing.ids_TK[t, k:] == num_experts).all()
        held_TE[t, chosen] = True
        assert torch.equal(routing.weights_TK[t, :k], probs_TE[t, chosen])
        # They are the k largest, most probable first.
        assert torch.equal(probs_TE[t, chosen], probs_TE[t].sort(descending=True).values[:k])
    mass_T = (probs_TE.double() * held_TE).sum(1)
    weakest_T = torch.where(held_TE, probs_TE, 2.0).double().amin(1)
    # Rounding of a sum of at most 16 float32 terms.
    slack = 2e-6
    assert ((mass_T > threshold - slack) | (count_T == num_experts)).all()
    assert (mass_T - weakest_T <= threshold + slack).all()


@few
@given(thresholds=st.lists(st.floats(0, 1), min_size=2, max_size=5), **ROUTES)
def test_a_higher_threshold_never_uses_fewer_experts(thresholds, num_experts, seed, spread_out):
    counts = [
        (route(q, num_experts, seed, spread_out)[0].ids_TK < num_experts).sum(1)
        for q in sorted(thresholds)
    ]
    for lower, higher in pairwise(counts):
        assert (lower <= higher).all()


@few
@given(**ROUTES)
def test_threshold_zero_is_top_one_at_its_probability(num_experts, seed, spread_out):
    routing, probs_TE = route(0.0, num_experts, seed, spread_out)
    assert torch.equal((routing.ids_TK < num_experts).sum(1), torch.ones(20, dtype=torch.int64))
    torch.testing.assert_close(routing.weights_TE().sum(1), probs_TE.amax(1))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_threshold_one_is_the_soft_mixture_of_all(training):
    moe = make_layer("top-p", router_config={"threshold": 1.0}).train(training)
    h_TD = tokens(63, dtype=torch.float64)
    with record_routing(moe) as routings:
        y_TD = moe(h_TD)
    assert (routings[0].active_T() == 6).all()
    probs_TE = (h_TD @ moe.router.weight.T).softmax(-1)
    soft = (probs_TE.unsqueeze(2) * expert_outputs(moe, h_TD)).sum(1)
    torch.testing.assert_close(y_TD, soft, rtol=0, atol=1e-6)


def test_uniform_probabilities():
    # q = 0.4, E = 16: six experts gather 6/16 = 0.375, seven 7/16 = 0.4375, so k = 7.
    router = make_router("top-p", 16)
    with torch.no_grad():
        router.weight.zero_()
    routing = router(tokens(5))
    assert routing.active_T().tolist() == [7] * 5
    torch.testing.assert_close(routing.weights_TK[:, :7], torch.full((5, 7), 1 / 16))
    # Ties go to the lower index.
    assert routing.ids_TK.tolist() == [[*range(7), *[16] * 9]] * 5


def test_a_sure_router_uses_one_expert():
    router = make_router("top-p", 16)
    h_TD = set_scores(router, torch.eye(16)[[3, 11]] * 50.0)
    routing = router(h_TD)
    assert routing.active_T().tolist() == [1, 1]
    assert routing.ids_TK[:, 0].tolist() == [3, 11]


def test_by_hand():
    # p = 0.5, 0.25, 0.125, 0.125 in another order; every sum is exact in float32.
    router = make_router("top-p", 4, threshold=0.7)
    scores_TE = torch.tensor([[0.25, 0.125, 0.5, 0.125]]).log()
    h_TD = set_scores(router, scores_TE)
    # 0.5 does not pass 0.7, 0.75 does: experts 2 and 0.
    routing = router(h_TD)
    assert routing.ids_TK.tolist() == [[2, 0, 4, 4]]
    torch.testing.assert_close(routing.weights_TK, torch.tensor([[0.5, 0.25, 0.0, 0.0]]))
    # A prefix must exceed the threshold: at 0.4999 one is enough, at 0.51 two are needed.
    for threshold, count in ((0.4999, 1), (0.51, 2), (0.7499, 2), (0.76, 3), (0.88, 4), (1.0, 4)):
        other = make_router("top-p", 4, threshold=threshold)
        set_scores(other, scores_TE)
        assert other(h_TD).active_T().tolist() == [count], threshold


def test_one_expert_keeps_the_gradient_of_its_gate():
    # Renormalised, the gate of a single expert would be the constant 1.
    router = make_router("top-p", 6, threshold=0.0).train()
    routing = router(tokens(20))
    routing.weights_TK.sum().backward()
    assert router.weight.grad.abs().max() > 1e-3


def test_entropy_gradient_is_the_closed_form():
    # dL/ds_e = -p_e (log p_e + H), H the entropy, over the number of tokens.
    moe = make_layer("top-p").train()
    with record_routing(moe) as routings:
        moe(tokens(20, dtype=torch.float64))
    routings[0].scores_TE.retain_grad()
    make_loss("entropy")(routings[0], torch.ones(4, 5, dtype=torch.bool)).backward()
    logs_TE = routings[0].scores_TE.detach().log_softmax(-1)
    entropy_T1 = -(logs_TE.exp() * logs_TE).sum(1, keepdim=True)
    expected = -logs_TE.exp() * (logs_TE + entropy_T1) / 20
    torch.testing.assert_close(routings[0].scores_TE.grad, expected)


@pytest.mark.parametrize("scores", [torch.zeros(6), torch.eye(6)[2] * 200], ids=["flat", "one-hot"])
def test_entropy_is_still_where_it_is_extreme(scores):
    router = make_router("top-p", 6)
    routing = router(set_scores(router, scores[None]))
    routing.scores_TE.retain_grad()
    value = make_loss("entropy")(routing, torch.ones(1, 1, dtype=torch.bool))
    value.backward()
    assert value.item() == pytest.approx(math.log(6) if not scores.any() else 0.0, abs=1e-6)
    assert routing.scores_TE.grad.abs().max() < 1e-6


def test_balance_gradient_flows_through_the_probabilities_alone():
    # L = E sum_e F_e Q_e with F constant: dL/ds_te = (E / T) p_te (F_e - sum_f F_f p_tf).
    moe = make_layer("top-p").train()
    with record_routing(moe) as routings:
        moe(tokens(20, dtype=torch.float64))
    (routing,) = routings
    routing.scores_TE.retain_grad()
    value = make_loss("load-balance")(routing, torch.ones(4, 5, dtype=torch.bool))
    value.backward()
    probs_TE = routing.scores_TE.detach().softmax(-1)
    load_E = routing.counts_E().double() / 20
    # Load is not divided by the number of experts: its sum is the mean count.
    assert load_E.sum().item() == pytest.approx(routing.active_T().double().mean().item())
    assert value.item() == pytest.approx(6 * (load_E * probs_TE.mean(0)).sum().item())
    expected = 6 / 20 * probs_TE * (load_E - (probs_TE * load_E).sum(1, keepdim=True))
    torch.testing.assert_close(routing.scores_TE.grad, expected)
