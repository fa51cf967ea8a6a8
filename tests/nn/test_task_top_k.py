"""CDSP-MoE's router: what a task changes, when it is hidden, how layers of a model hear of it."""

from __future__ import annotations

import pytest
import torch
from nn_cases import make_router, tokens
from torch import nn

from moesaic._errors import InputError
from moesaic.nn.layer import LayerConfig, MoELayer, pass_state, record_routing
from moesaic.nn.routers._base import RouterState

E, D = 6, 17


def given(*tasks):
    return RouterState(tasks_B=torch.tensor(tasks))


def test_scores_by_hand():
    router = make_router("task-top-k", 3, 2, num_tasks=2, size=1, top_k=2)
    with torch.no_grad():
        router.norm_weight.fill_(2.0)
        router.norm_bias.copy_(torch.tensor([0.0, 1.0]))
        router.weight.copy_(torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]))
        router.bias.copy_(torch.tensor([0.0, 0.0, 0.5]))
        router.task_embedding.copy_(torch.tensor([[3.0], [-3.0]]))
    # (1, 3) normalised is (-1, 1): times 2 and shifted (-2, 3). Tasks add 3, -3 and nothing.
    h_TD = torch.tensor([[1.0, 3.0]]).repeat(3, 1)
    routing = router(h_TD, given(0, 1, -1))
    expected = torch.tensor([[-2.0, 3.0, 3.5], [-2.0, 3.0, -2.5], [-2.0, 3.0, 0.5]])
    torch.testing.assert_close(routing.scores_TE, expected, atol=1e-4, rtol=0)
    assert routing.ids_TK.tolist() == [[2, 1], [1, 0], [1, 2]]
    # A softmax over the two that were chosen alone.
    weights_T = torch.sigmoid(torch.tensor([0.5, 5.0, 2.5]))
    torch.testing.assert_close(routing.weights_TK[:, 0], weights_T, atol=1e-4, rtol=0)
    assert torch.equal(router(h_TD).scores_TE, routing.scores_TE[2:].expand(3, -1))


def test_a_task_is_that_of_a_sequence_or_of_a_token():
    router, h_TD = make_router("task-top-k", E), tokens(12)
    by_token = router(h_TD, given(*[0] * 4, *[1] * 4, *[-1] * 4))
    by_sequence = router(h_TD, given(0, 1, -1))
    assert torch.equal(by_sequence.scores_TE, by_token.scores_TE)
    parts = [router(h_TD[:4], given(0)), router(h_TD[4:8], given(1)), router(h_TD[8:])]
    torch.testing.assert_close(torch.cat([p.scores_TE for p in parts]), by_token.scores_TE)


def test_tasks_are_hidden_for_a_whole_pass_in_training_alone():
    router, h_TD = make_router("task-top-k", E, probability=0.25), tokens(4)
    known, blind = router(h_TD, given(0, 1)).scores_TE, router(h_TD).scores_TE
    torch.manual_seed(0)
    hidden = 0
    for _ in range(400):
        scores_TE = router.train()(h_TD, given(0, 1)).scores_TE
        assert torch.equal(scores_TE, blind) or torch.equal(scores_TE, known)
        hidden += torch.equal(scores_TE, blind)
    # Binomial: three deviations of sqrt(400 * 3/16).
    assert abs(hidden - 100) < 3 * (400 * 3 / 16) ** 0.5
    assert all(torch.equal(router.eval()(h_TD, given(0, 1)).scores_TE, known) for _ in range(50))


def test_cost_is_that_of_the_map():
    router = MoELayer(D, LayerConfig(num_experts=E, width=5, router="task-top-k")).router
    assert router.num_multiplied() == E * (D + 16)


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ((0, 2), r"num_tasks must be above every task, got 2 and task 2; raise it"),
        ((0, 1, 1), r"tasks must be one for each sequence or token, got the shape \[3\] for 4"),
    ],
)
def test_tasks_that_do_not_fit_are_refused(tasks, message):
    with pytest.raises(InputError, match=message):
        make_router("task-top-k", E)(tokens(4), given(*tasks))


@pytest.fixture
def layers():
    torch.manual_seed(0)
    config = LayerConfig(num_experts=E, width=5, router="task-top-k")
    return nn.Sequential(MoELayer(D, config), MoELayer(D, config)).eval()


def scores(layers, h):
    with record_routing(layers) as routings:
        layers(h)
    return [routing.scores_TE for routing in routings]


def test_every_layer_hears_the_tasks_of_a_pass(layers):
    h = tokens(12).reshape(3, 4, D)
    blind = scores(layers, h)
    with pass_state(layers, tasks=torch.tensor([0, -1, 1])):
        heard = scores(layers, h)
        # A model opens a state of its own inside, with its token ids, and the tasks stay.
        with pass_state(layers, torch.zeros(3, 4, dtype=torch.int64)):
            inner = scores(layers, h)
    expected = layers[0].router(h.flatten(0, 1), given(0, -1, 1)).scores_TE
    assert torch.equal(heard[0], expected)
    assert all(torch.equal(a, b) for a, b in zip(inner, heard, strict=True))
    for known, unknown in zip(heard, blind, strict=True):
        same_T = (known == unknown).all(1)
        assert not same_T[:4].any()
        assert not same_T[8:].any()
    assert torch.equal(heard[0][4:8], blind[0][4:8])
    assert all(torch.equal(a, b) for a, b in zip(scores(layers, h), blind, strict=True))
