"""The bypass: beside the experts, away where all of them are on, counted as what it weighs."""

import pytest
import torch
from torch.nn.functional import linear

from moesaic._errors import InputError
from moesaic.nn.bypass import Bypass
from moesaic.nn.layer import LayerConfig, MoELayer, all_experts_on
from moesaic.nn.shape import layer_shape

D, E, F, R = 8, 4, 6, 3


def make_layer(**options):
    torch.manual_seed(0)
    config = LayerConfig(
        num_experts=E, width=F, router="sigmoid-threshold", bypass_rank=R, **options
    )
    layer = MoELayer(D, config).eval()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    return layer


@torch.no_grad()
def test_it_is_added_to_the_experts_of_every_token():
    layer, h_TD = make_layer(output_bias=True), torch.randn(5, D)
    down, up = layer.bypass.down_proj, layer.bypass.up_proj
    added_TD = linear(linear(h_TD, down.weight), up.weight, up.bias)
    want_TD = layer.experts(h_TD, layer.router(h_TD)) + layer.output_bias + added_TD
    torch.testing.assert_close(layer(h_TD), want_TD)


@torch.no_grad()
def test_with_all_experts_on_it_has_nothing_to_stand_in_for():
    layer, h_TD = make_layer(), torch.randn(5, D)
    with all_experts_on(layer):
        torch.testing.assert_close(layer(h_TD), layer.experts(h_TD, None))


@torch.no_grad()
def test_a_fresh_one_adds_nothing():
    assert torch.equal(Bypass(D, R)(torch.randn(5, D)), torch.zeros(5, D))


@pytest.mark.parametrize(("experts", "rows"), [("gated", 3), ("plain", 2)])
def test_it_counts_as_the_neurons_that_weigh_as_much(experts, rows):
    shape = layer_shape(make_layer(experts=experts), E * F)
    # Its 2 R D weights are those of 2 R / rows neurons.
    assert shape.bypass_width == pytest.approx(2 * R / rows)
    assert shape.fraction(2) == pytest.approx((2 * F + 2 * R / rows) / (E * F))
    assert shape.experts_on(shape.fraction(3)) == pytest.approx(3 / E)
    assert shape.unused(shape.fraction(3)) == pytest.approx(F)
    assert shape.experts_on(0.0) == 0.0
    assert shape.experts_on(2.0) == 1.0


def test_a_negative_rank_is_refused():
    with pytest.raises(InputError, match="bypass_rank must be at least 0, got 0, 0, 0, -1"):
        LayerConfig(num_experts=0, bypass_rank=-1)
