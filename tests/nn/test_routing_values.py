"""What a routing says of itself, by hand."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from moesaic.nn.routing import Routing

# Three experts, two slots. Token 0 uses experts 2 and 0; token 1 has an empty slot; token 2 holds
# expert 0 at weight zero, which is switched off; token 3 uses nothing.
ROUTING = Routing(
    ids_TK=torch.tensor([[2, 0], [3, 1], [0, 2], [3, 3]]),
    weights_TK=torch.tensor([[0.5, 0.25], [0.0, 1.0], [0.0, -0.5], [0.0, 0.0]]),
    scores_TE=torch.zeros(4, 3),
    num_experts=3,
)


def test_weights():
    assert ROUTING.weights_TE().tolist() == [[0.25, 0, 0.5], [0, 1, 0], [0, 0, -0.5], [0, 0, 0]]


def test_active():
    assert ROUTING.active_TE().int().tolist() == [[1, 0, 1], [0, 1, 0], [0, 0, 1], [0, 0, 0]]
    assert ROUTING.active_TE().dtype == torch.bool
    assert ROUTING.active_T().tolist() == [2, 1, 1, 0]


def test_counts_leave_padding_out():
    assert ROUTING.counts_E().tolist() == [1, 1, 2]
    assert ROUTING.counts_E(torch.tensor([True, False, False, True])).tolist() == [1, 0, 1]
    assert ROUTING.counts_E(torch.zeros(4, dtype=torch.bool)).tolist() == [0, 0, 0]


def test_weights_keep_the_gradient():
    weights_TK = ROUTING.weights_TK.clone().requires_grad_()
    routing = dataclasses.replace(ROUTING, weights_TK=weights_TK)
    routing.weights_TE().sum().backward()
    # One for a held slot, also at weight zero; nothing for an empty one.
    assert weights_TK.grad.tolist() == [[1, 1], [0, 1], [1, 1], [0, 0]]


def test_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError, match="num_experts"):
        ROUTING.num_experts = 4
    assert ROUTING.aux == {}
