"""Routers whose chosen experts weigh one: scores against references, exact weights, gradients."""

from __future__ import annotations

import pytest
import torch
from nn_cases import make_layer, make_router, set_scores, tokens
from torch import nn

E = 6
NAMES = ["linear-top-k", "mlp-top-k", "nearest-top-k"]
each_router = pytest.mark.parametrize("name", NAMES)


@each_router
@pytest.mark.parametrize("training", [True, False])
def test_weights_are_exactly_one(name, training):
    routing = make_router(name, E, top_k=3, spread_out=7.3).train(training)(tokens(63))
    assert torch.equal(routing.weights_TK, torch.ones(63, 3))


@each_router
def test_all_experts_are_the_sum_of_all(name):
    moe = make_layer(name, num_experts=E, router_config={"top_k": E})
    h_TD = tokens(63, dtype=torch.float64)
    torch.testing.assert_close(moe(h_TD), moe.experts.dense(h_TD))


def test_the_gradient_is_that_of_the_sigmoid():
    router = make_router("linear-top-k", 3, top_k=2)
    h_TD = set_scores(router, torch.tensor([[0.0, 2, -1]]))
    routing = router(h_TD)
    assert routing.ids_TK.tolist() == [[1, 0]]
    # Upstream 5 for the expert of score 2, 3 for that of score 0: s (1 - s) = 1/4 at 0.
    (routing.weights_TK * torch.tensor([[5.0, 3]])).sum().backward()
    gate = 1 / (1 + torch.tensor(-2.0).exp())
    expected = torch.stack([torch.tensor(3 / 4), 5 * gate * (1 - gate), torch.tensor(0.0)])
    # Column t of the weight holds the scores of token t.
    torch.testing.assert_close(router.weight.grad[:, 0], expected)


def test_mlp_is_two_linear_maps_of_the_unit_input():
    router, h_TD = make_router("mlp-top-k", E, top_k=2), tokens(63)
    reference = nn.Sequential(nn.Linear(17, E, bias=False), nn.Tanh(), nn.Linear(E, E, bias=False))
    reference.load_state_dict({"0.weight": router.weight, "2.weight": router.mix})
    scores_TE = reference(h_TD / h_TD.norm(dim=1, keepdim=True))
    torch.testing.assert_close(router(h_TD).scores_TE, scores_TE)
    assert torch.equal(router(h_TD).ids_TK, scores_TE.topk(2).indices)


def test_nearest_is_the_least_distance_of_the_unit_input():
    router, h_TD = make_router("nearest-top-k", E, top_k=2), tokens(63)
    distance_TE = torch.cdist(h_TD / h_TD.norm(dim=1, keepdim=True), router.weight)
    routing = router(h_TD)
    assert torch.equal(routing.ids_TK, distance_TE.topk(2, largest=False).indices)
    torch.testing.assert_close(routing.scores_TE, (1 - distance_TE.square()) / 2)


@pytest.mark.parametrize("name", ["mlp-top-k", "nearest-top-k"])
def test_the_length_of_an_input_does_not_matter(name):
    router, h_TD = make_router(name, E, top_k=2), tokens(63)
    assert torch.equal(router(9.0 * h_TD).ids_TK, router(h_TD).ids_TK)


def test_mlp_starts_with_an_identity():
    router = make_router("mlp-top-k", E)
    router.reset_parameters()
    assert torch.equal(router.mix, torch.eye(E))
