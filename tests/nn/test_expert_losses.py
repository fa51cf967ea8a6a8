"""Losses of experts reach whoever records the routing, however the layer is put together."""

from __future__ import annotations

import pytest
import torch
from nn_cases import make_layer, tokens
from torch import nn

from moesaic.nn.layer import all_experts_on, link_layers, record_routing

D = 17
SUBSPACE = {"experts": "subspace", "experts_options": {"size_coef": 1.0, "choice_coef": 0.0}}


def size(experts):
    """The loss of a topology alone."""
    return experts.topology.abs().mean()


def recorded(layer):
    with record_routing(layer) as routings:
        layer(tokens(9, D, dtype=torch.float64))
    return [routing.aux for routing in routings]


def test_a_recorded_routing_carries_the_losses_of_its_experts():
    layer = make_layer(**SUBSPACE)
    (aux,) = recorded(layer)
    torch.testing.assert_close(aux["topology"], size(layer.experts))
    assert aux["topology"].requires_grad
    # A routing that nobody records has those of the router alone.
    assert not layer.router(tokens(9, D, dtype=torch.float64)).aux


def test_they_stand_beside_those_of_the_router():
    (aux,) = recorded(make_layer("soft-trees", **SUBSPACE))
    assert aux.keys() == {"tree-entropy", "topology"}


def test_every_layer_has_its_own():
    layers = nn.Sequential(make_layer(**SUBSPACE, seed=1), make_layer(), make_layer(**SUBSPACE))
    first, none, last = recorded(layers)
    torch.testing.assert_close(first["topology"], size(layers[0].experts))
    assert none == {}
    torch.testing.assert_close(last["topology"], size(layers[2].experts))


def test_every_iteration_is_charged():
    layer = make_layer(**SUBSPACE, iterations=2)
    assert [aux["topology"] for aux in recorded(layer)] == [size(layer.experts)] * 2


def test_experts_of_several_kinds_add_up():
    layer = make_layer(num_experts=5, experts=("subspace", "subspace", "plain", *["subspace"] * 2))
    (aux,) = recorded(layer)
    parts = [part for part in layer.experts.parts if hasattr(part, "topology")]
    assert len(parts) == 2
    expected = sum(
        1e-3 * size(part) + 1e-2 * (part.links() * (1 - part.links())).mean() for part in parts
    )
    torch.testing.assert_close(aux["topology"], expected)


def test_experts_of_a_group_are_charged_where_they_are_used():
    layers = nn.Sequential(*(make_layer(**SUBSPACE, reuse=2, seed=seed) for seed in range(2)))
    link_layers(layers)
    both = size(layers[0].experts) + size(layers[1].experts)
    for aux in recorded(layers):
        torch.testing.assert_close(aux["topology"], both)


@pytest.mark.parametrize("shared", [0, 3])
def test_what_no_routing_drives_is_not_charged(shared):
    layer = make_layer(**SUBSPACE, shared_width=shared)
    with all_experts_on(layer):
        assert recorded(layer) == []
    (aux,) = recorded(layer)
    torch.testing.assert_close(aux["topology"], size(layer.experts))
