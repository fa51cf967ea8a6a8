"""Parameters in groups: routers, the rest, and what parts want faster."""

from __future__ import annotations

import pytest
import torch
from nn_cases import make_layer
from torch import nn

from moesaic.nn.groups import parameter_groups


def make(**options):
    layer = make_layer(experts="subspace", experts_options=options, dtype=torch.float32)
    return nn.Sequential(make_layer(dtype=torch.float32), layer)


def names(model, group):
    found = {id(p) for p in group["params"]}
    return {name for name, p in model.named_parameters() if id(p) in found}


def test_every_parameter_is_in_one_group():
    model = make()
    groups = parameter_groups(model, 1e-3)
    assert [group["lr"] for group in groups] == [1e-3, pytest.approx(1e-2)]
    assert names(model, groups[1]) == {"1.experts.topology"}
    assert groups[1]["weight_decay"] == 0.0
    assert "weight_decay" not in groups[0]
    params = [p for group in groups for p in group["params"]]
    assert {id(p) for p in params} == {id(p) for p in model.parameters()}
    assert len(params) == len(list(model.parameters()))


def test_routers_have_a_rate_of_their_own():
    model = make(topology_rate=3.0)
    routers, rest, topology = parameter_groups(model, 1e-3, 5e-2)
    assert names(model, routers) == {"0.router.weight", "1.router.weight"}
    assert (routers["lr"], routers["weight_decay"], rest["lr"]) == (5e-2, 0.0, 1e-3)
    assert topology["lr"] == pytest.approx(3e-3)


def test_experts_of_several_kinds_are_asked_too():
    model = make_layer(num_experts=3, experts=("subspace", "subspace", "plain"))
    assert names(model, parameter_groups(model, 1.0)[1]) == {"experts.parts.0.topology"}


def test_what_is_frozen_is_left_out():
    model = make()
    model[1].experts.requires_grad_(False)
    model[0].router.requires_grad_(False)
    (rest,) = parameter_groups(model, 1e-3)
    assert names(model, rest) == {
        "0.experts.gate_up_proj",
        "0.experts.down_proj",
        "1.router.weight",
    }


def test_the_optimiser_moves_and_decays_as_the_groups_say():
    model = make()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(parameter_groups(model, 1e-3), weight_decay=0.1)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        # AdamW's first step is the rate long.
        if name == "1.experts.topology":
            expected = before[name] - 1e-2
        else:
            expected = before[name] * (1 - 1e-3 * 0.1) - 1e-3
        torch.testing.assert_close(parameter, expected, atol=1e-6, rtol=1e-5)
