"""A fixed number of blocks for every token: equal where the token had as many, near elsewhere.

Shapes: T tokens, D model width, E blocks.
"""

import copy

import pytest
import torch
from model_cases import DIM, EXPERTS, Case, converted, random_ids

from moesaic._errors import InputError
from moesaic.conversion.fix_k import (
    FixK,
    GateUse,
    constant_direction,
    fix_k,
    make_layer,
    measure_gates,
)
from moesaic.models.export._base import Layout
from moesaic.nn.layer import all_experts_on, moe_layers, record_routing

SIGMOID = Layout(router="sigmoid-top-k")
SHARING = Layout(router="sigmoid-top-k", min_shared=1)
SOFTMAX = Layout(router="topk-softmax", max_shared=0)
DENSE = Layout(router="topk-softmax", max_shared=0, dense_layers=True)
PAPER = {"value": "gate", "normalize": "count"}
ONES = {"value": "one", "normalize": "none", "bias": True}
LLAMA = Case("llama", {})


def dsmoe(**options):
    return converted(LLAMA, router_options=options)


def inputs(num_tokens=200, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(num_tokens, DIM, generator=draw)


def used(layer, h_TD):
    """How the gates of one layer were used on some inputs."""
    routing = layer.router(h_TD)
    on_TE = routing.active_TE()
    bias = 0 if layer.router.bias is None else layer.router.bias
    return GateUse(
        num_tokens=len(h_TD),
        on_E=on_TE.sum(0).double(),
        value_E=(routing.scores_TE.sigmoid() * on_TE).sum(0).double(),
        largest=float((routing.scores_TE - bias).abs().max()),
        moment_DD=h_TD.T @ h_TD,
        sum_D=h_TD.sum(0),
    )


def counts(layer, h_TD):
    return layer.router(h_TD).active_T()


@torch.no_grad()
def both(options, layout, k, *, num_shared=0, change=None):
    """Outputs of a layer before and after, and how many blocks each token had."""
    layer = moe_layers(dsmoe(**options))[0]
    if change is not None:
        change(layer)
    h_TD = inputs()
    before, count_T = layer(h_TD), counts(layer, h_TD)
    make_layer(layer, used(layer, h_TD), layout, num_shared=num_shared, k=k)
    return before, layer(h_TD), count_T


@pytest.mark.parametrize(
    "options",
    [
        PAPER,
        {"value": "gate", "normalize": "none"},
        {"value": "gate", "normalize": "none", "rank": 3},
    ],
    ids=str,
)
def test_gates_that_weigh_are_exact_where_a_token_has_k_blocks(options):
    before, after, count_T = both(options, SIGMOID, 2)
    same = count_T == 2
    assert 20 < same.sum() < 180
    torch.testing.assert_close(after[same], before[same], rtol=1e-5, atol=1e-6)
    # The others have another number of blocks now.
    assert ((after - before)[~same].abs().amax(1) > 1e-3).float().mean() > 0.9


@pytest.mark.parametrize("normalize", ["none", "count"])
def test_gates_of_one_are_near_one_where_a_token_has_k_blocks(normalize):
    before, after, count_T = both({**ONES, "normalize": normalize}, SIGMOID, 2)
    same = count_T == 2
    assert 20 < same.sum() < 180
    error = (after - before)[same].norm() / before[same].norm()
    assert error < 2**-8


def test_a_softmax_holds_gates_of_one():
    options = {"value": "one", "normalize": "none"}
    before, after, count_T = both(options, SOFTMAX, 2)
    same = count_T == 2
    assert (after - before)[same].norm() < 2**-7 * before[same].norm()


def test_the_bias_of_gates_decides_with_a_softmax_that_has_none():
    """Where inputs have a part that is constant, the bias is along it."""
    layer = moe_layers(dsmoe(**ONES))[0]
    h_TD = inputs()
    h_TD[:, 0] = 3.0
    with torch.no_grad():
        want = layer.router(h_TD).scores_TE.topk(2).indices.sort().values
        plain = (h_TD @ layer.router.weight.T).topk(2).indices.sort().values
        make_layer(layer, used(layer, h_TD), SOFTMAX, num_shared=0, k=2)
        got = layer.router(h_TD).ids_TK.sort().values
    assert not torch.equal(plain, want)
    assert (got == want).all(1).float().mean() > 0.98


def test_the_direction_of_a_constant():
    """Inputs (2, +-1): half of the first channel is one."""
    moment_DD, mean_D = torch.tensor([[4.0, 0.0], [0.0, 1.0]]), torch.tensor([2.0, 0.0])
    u_D = constant_direction(moment_DD, mean_D)
    torch.testing.assert_close(u_D, torch.tensor([0.5, 0.0]).double(), rtol=0, atol=1e-4)


def test_the_block_that_is_on_most_becomes_the_shared_part():
    def open_third(layer):
        layer.router.bias[2] = 30.0

    before, after, count_T = both(ONES, SHARING, 2, num_shared=1, change=open_third)
    same = count_T == 2
    assert same.any()
    assert (after - before)[same].norm() < 2**-8 * before[same].norm()


def test_a_shared_block_weighs_what_its_gate_did():
    """A gate that is on for every token at 3/4, of 4 blocks of which 2 are on: 3/2."""

    def constant(layer):
        layer.router.weight[0] = 0.0

    def gates(layer):
        return used(layer, inputs())

    layer = moe_layers(dsmoe(**PAPER))[0]
    with torch.no_grad():
        constant(layer)
        use = gates(layer)
        use.on_E[0], use.value_E[0] = use.num_tokens, 0.75 * use.num_tokens
        down_DF = layer.experts.down_proj[0].clone()
        make_layer(layer, use, SHARING, num_shared=1, k=2)
        torch.testing.assert_close(layer.shared.down_proj[0], 1.5 * down_DF)
    assert layer.config.num_experts == EXPERTS - 1
    assert layer.config.router_options == {"top_k": 1, "scale": 2.0}


def test_use_is_what_the_routers_did():
    model, ids = dsmoe(**ONES), random_ids(5)
    uses = measure_gates(model, ids, moments=True)
    with torch.no_grad(), record_routing(model) as routings:
        model(ids)
    for use, routing in zip(uses, routings, strict=True):
        assert use.num_tokens == ids.numel()
        assert torch.equal(use.on_E, routing.active_TE().sum(0).double())
        gates_TE = routing.scores_TE.sigmoid() * routing.active_TE()
        torch.testing.assert_close(use.value_E, gates_TE.sum(0).double(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(use.moment_DD, use.moment_DD.T)
    assert not moe_layers(model)[0].router._forward_hooks


def test_a_model_becomes_one_of_fixed_layers():
    model, ids = dsmoe(**ONES), random_ids(6)
    fixed, decided = fix_k(model, ids, SHARING, FixK())
    assert fixed is model
    mean = sum(decided["mean_per_layer"]) / 2
    assert decided["k"] == max(2, round(mean))
    assert (decided["shared"], decided["blocks"], decided["dense_layers"]) == (1, EXPERTS, [])
    for layer, values in zip(moe_layers(model), model.config.moesaic["layers"], strict=True):
        assert values["router"] == "sigmoid-top-k"
        assert values["router_options"]["top_k"] == decided["k"] - 1
        assert (layer.config.num_experts, layer.config.shared_width) == (3, layer.config.width)
    with torch.no_grad(), record_routing(model) as routings:
        model(ids)
    assert all((r.active_T() == decided["k"] - 1).all() for r in routings)
    assert model.config.moesaic["exact"] is False
    assert model.loss_terms == {}


def test_every_block_for_every_token_is_the_dense_model():
    model, ids = dsmoe(**ONES), random_ids(6)
    with torch.no_grad(), all_experts_on(model):
        want = model(ids).logits
    for layout, closeness in ((SHARING, 0.02), (SOFTMAX, 0.02)):
        fixed, _ = fix_k(copy.deepcopy(model), ids, layout, FixK(k=EXPERTS))
        with torch.no_grad():
            assert (fixed(ids).logits - want).norm() < closeness * want.norm()


def test_a_layer_with_all_blocks_on_needs_no_router():
    model, ids = dsmoe(**ONES), random_ids(6)
    with torch.no_grad():
        moe_layers(model)[0].router.bias.fill_(40.0)
        with all_experts_on(model):
            want = moe_layers(model)[0](inputs())
    fixed, decided = fix_k(model, ids, DENSE, FixK())
    assert decided["dense_layers"] == [0]
    first, second = moe_layers(fixed)
    assert (first.config.num_experts, second.config.num_experts) == (0, EXPERTS)
    assert decided["k"] == max(1, round(decided["mean_per_layer"][1]))
    with torch.no_grad():
        torch.testing.assert_close(first(inputs()), want)


@pytest.mark.parametrize(
    ("values", "layout", "message"),
    [
        ({"k": 5}, SHARING, r"k must be in \[2, 4\] for 4 blocks of which 1 are shared, got 5"),
        ({"k": 1}, SHARING, r"k must be in \[2, 4\] for 4 blocks of which 1 are shared, got 1"),
        ({"k": 2, "shared": 2}, SHARING, r"shared must be in \[1, 1\] .* k=2 of 4 blocks, got 2"),
        ({"k": 2, "shared": 1}, SOFTMAX, r"shared must be in \[0, 0\] .* got 1; change it or"),
        ({"k": 0}, SHARING, r"k must be at least 1, got 0"),
        ({"shared": -1}, SHARING, r"shared must be at least 0, got -1"),
        ({"always": 0.0}, SHARING, r"always must be in \(0, 1\], got 0.0"),
    ],
)
def test_settings_that_do_not_fit_are_said(values, layout, message):
    with pytest.raises(InputError, match=message):
        fix_k(dsmoe(**ONES), random_ids(), layout, FixK(**values))


def test_routers_that_know_no_token_are_refused():
    model = dsmoe(**ONES)
    with torch.no_grad():
        for layer in moe_layers(model):
            layer.router.weight.zero_()
            layer.router.bias.fill_(4.0)
    with pytest.raises(InputError, match=r"gates do not depend on the token.*init 'gram'"):
        fix_k(copy.deepcopy(model), random_ids(), SHARING, FixK(k=2))
    with pytest.raises(InputError, match="nothing is left to route"):
        fix_k(copy.deepcopy(model), random_ids(), DENSE, FixK())
    # All of them can still be taken.
    fix_k(model, random_ids(), SHARING, FixK(k=EXPERTS))
