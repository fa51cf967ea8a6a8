"""Expert choice, arXiv 2202.09368, by hand: experts take tokens, all equally many."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nn_cases import make_layer, make_router, set_scores, tokens

# Rows are tokens; softmax over the two experts gives expert 0 its 3/4, 1/2, 1/4 and 1/10.
SCORES = torch.tensor([[3.0, 1.0], [1.0, 1.0], [1.0, 3.0], [1.0, 9.0]]).log()


def test_each_expert_takes_the_tokens_that_like_it_best():
    router = make_router("expert-choice", 2, capacity=1.0)
    routing = router(set_scores(router, SCORES))
    # T c / E = 4 / 2: expert 0 takes tokens 0 and 1, expert 1 tokens 2 and 3.
    want = torch.tensor([[0.75, 0.0], [0.5, 0.0], [0.0, 0.75], [0.0, 0.9]])
    torch.testing.assert_close(routing.weights_TE(), want)
    assert routing.ids_TK.tolist() == [[0, 2], [0, 2], [2, 1], [2, 1]]
    torch.testing.assert_close(routing.scores_TE, SCORES)


def test_a_token_may_have_all_experts_or_none():
    router = make_router("expert-choice", 2, capacity=0.5)
    scores = torch.tensor([[1.0, 1.0], [0.0, 0.0], [-9.0, 9.0], [9.0, -9.0]])
    routing = router(set_scores(router, scores))
    # One token an expert: the two that are sure.
    assert routing.active_T().tolist() == [0, 0, 1, 1]
    # Of tied tokens the earlier is taken, and by both.
    routing = router(set_scores(router, torch.zeros(4, 2)))
    assert routing.active_T().tolist() == [2, 0, 0, 0]


@settings(max_examples=25, deadline=None)
@given(
    num_tokens=st.integers(1, 70),
    num_experts=st.integers(1, 9),
    capacity=st.floats(0.1, 4.0),
    seed=st.integers(0, 99),
)
def test_loads_are_equal_whatever_comes(num_tokens, num_experts, capacity, seed):
    capacity = min(capacity, num_experts)
    router = make_router("expert-choice", num_experts, capacity=capacity, seed=seed)
    load_E = router(tokens(num_tokens, seed=seed)).counts_E()
    wanted = min(num_tokens, max(1, round(num_tokens * capacity / num_experts)))
    assert load_E.tolist() == [wanted] * num_experts


def test_a_later_token_can_take_an_experts_place():
    """What makes it unfit for decoding; its record says so."""
    router = make_router("expert-choice", 2, capacity=1.0)
    first = router(set_scores(router, SCORES[:2])).active_TE()
    both = router(set_scores(router, SCORES)).active_TE()[:2]
    assert first.tolist() == [[True, False], [False, True]]
    assert both.tolist() == [[True, False], [True, False]]


def test_one_token_goes_to_every_expert():
    router = make_router("expert-choice", 6)
    assert router(tokens(1)).active_T().tolist() == [6]


def test_a_layer_mixes_as_the_weights_say():
    moe = make_layer("expert-choice")
    h_TD = tokens(63, dtype=torch.float64)
    weights_TE = moe.router(h_TD).weights_TE()
    everything = torch.stack([moe.experts(h_TD, one_expert(e, 63, 6)) for e in range(6)], dim=1)
    expected = (weights_TE.unsqueeze(2) * everything).sum(1)
    torch.testing.assert_close(moe(h_TD), expected)


def one_expert(expert, num_tokens, num_experts):
    from nn_cases import hand_routing

    routing = hand_routing(torch.zeros(num_tokens, num_experts), [[expert]] * num_tokens)
    return type(routing)(
        routing.ids_TK, routing.weights_TK.double(), routing.scores_TE, num_experts
    )


@pytest.mark.parametrize("training", [True, False])
def test_only_chosen_pairs_teach_the_router(training):
    router = make_router("expert-choice", 3, capacity=0.5).train(training)
    h_TD = tokens(9).requires_grad_()
    routing = router(h_TD)
    (grad_TE,) = torch.autograd.grad(routing.weights_TE().sum(), routing.scores_TE)
    # The softmax couples experts of a token that has one; a token without has no gradient.
    none_T = routing.active_T() == 0
    assert 0 < none_T.sum() < 9
    assert not grad_TE[none_T].any()
    assert grad_TE[~none_T].any()
