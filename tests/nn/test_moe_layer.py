"""The layer in the place of a feed-forward network: parts, shapes, switches, copies."""

from __future__ import annotations

import copy

import pytest
import torch
from nn_cases import (
    dense_weights,
    expert_outputs,
    given_ids,
    make_layer,
    router_options,
    tokens,
)
from torch import nn

from moesaic._config import build_config, to_plain
from moesaic._errors import InputError
from moesaic.nn.experts._table import EXPERTS
from moesaic.nn.layer import LayerConfig, MoELayer, all_experts_on, moe_layers, record_routing
from moesaic.nn.routers._base import RouterState
from moesaic.nn.routers._table import ROUTERS

each_router = pytest.mark.parametrize("router", ROUTERS)


def run(part, h):
    """Run a layer or router as a model does, from one state of the generator of noise."""
    torch.manual_seed(0)
    router = part.router if isinstance(part, MoELayer) else part
    return part(h, RouterState(**given_ids(router, h)))


@each_router
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_output_is_the_weighted_sum_of_experts(router, training):
    moe = make_layer(router).train(training)
    h_TD = tokens(63, dtype=torch.float64)
    routing = run(moe.router, h_TD)
    expected = (dense_weights(routing).unsqueeze(2) * expert_outputs(moe, h_TD)).sum(1)
    if moe.free is not None:
        expected = expected + moe.free(h_TD, routing.free_weights_TZ)
    torch.testing.assert_close(run(moe, h_TD), expected)


@each_router
def test_leading_dimensions_are_kept(router):
    moe = make_layer(router)
    h_TD = tokens(60, dtype=torch.float64)
    for shape in ((3, 20, 17), (60, 17), (2, 5, 6, 17)):
        out = run(moe, h_TD.reshape(shape))
        assert out.shape == shape
        if "sequences" not in ROUTERS[router].abilities or len(shape) == 2:
            torch.testing.assert_close(out.reshape(60, 17), run(moe, h_TD))
    assert run(moe, h_TD[0]).shape == (17,)
    assert run(moe, torch.zeros(2, 0, 17, dtype=torch.float64)).shape == (2, 0, 17)


@each_router
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_output_has_the_dtype_of_the_input(router, dtype):
    moe = make_layer(router, dtype=dtype, shared_width=3, output_bias=True)
    assert run(moe, tokens(5, dtype=dtype)).dtype == dtype


@pytest.mark.parametrize(
    "experts", [name for name in EXPERTS if "sequences" not in EXPERTS[name].abilities]
)
@pytest.mark.parametrize("bias", [False, True])
def test_shared_part_and_output_bias_are_added_once(experts, bias):
    layer = {"experts": experts, "bias": bias, "shared_width": 4, "output_bias": True}
    moe = make_layer(**layer)
    h_TD = tokens(63, dtype=torch.float64)
    routed = moe.experts(h_TD, moe.router(h_TD))
    shared = moe.shared.dense(h_TD)
    torch.testing.assert_close(moe(h_TD), routed + shared + moe.output_bias)
    with all_experts_on(moe):
        dense = moe.experts.dense(h_TD) + shared + moe.output_bias
        torch.testing.assert_close(moe(h_TD), dense)


def test_pruned_form_has_no_router():
    moe = make_layer(num_experts=0, shared_width=4, output_bias=True)
    h_TD = tokens(63, dtype=torch.float64)
    assert moe.router is None
    assert moe.experts is None
    torch.testing.assert_close(moe(h_TD), moe.shared.dense(h_TD) + moe.output_bias)
    with all_experts_on(moe), record_routing(moe) as routings:
        torch.testing.assert_close(moe(h_TD), moe.shared.dense(h_TD) + moe.output_bias)
    assert routings == []
    assert {name for name, _ in moe.named_parameters()} == {
        "shared.gate_up_proj",
        "shared.down_proj",
        "output_bias",
    }


def test_a_network_pruned_to_nothing_gives_its_bias():
    moe = make_layer(num_experts=0, output_bias=True)
    out = moe(tokens(3, dtype=torch.float64))
    torch.testing.assert_close(out, moe.output_bias.expand(3, 17))
    assert not make_layer(num_experts=0)(tokens(3, dtype=torch.float64)).any()


def test_all_experts_on_restores_what_was_also_after_an_error():
    model = nn.Sequential(make_layer(), make_layer())
    model[1].all_on = True
    with all_experts_on(model):
        assert [layer.all_on for layer in model] == [True, True]
    assert [layer.all_on for layer in model] == [False, True]
    with pytest.raises(RuntimeError, match="stop"), all_experts_on(model):
        raise RuntimeError("stop")
    assert [layer.all_on for layer in model] == [False, True]


def test_all_experts_on_does_not_ask_the_router():
    moe = make_layer()
    moe.router.forward = None
    with all_experts_on(moe):
        assert moe(tokens(3, dtype=torch.float64)).any()


def test_record_routing_lists_layers_in_order_and_leaves_no_hooks():
    model = nn.Sequential(
        make_layer("top-p"), nn.Linear(17, 17).double(), make_layer("topk-softmax")
    )
    h_TD = tokens(5, dtype=torch.float64)
    with record_routing(model) as routings:
        model(h_TD)
        model(h_TD[:2])
    assert [r.ids_TK.shape for r in routings] == [(5, 6), (5, 2), (2, 6), (2, 2)]
    assert torch.equal(routings[0].weights_TK, model[0].router(h_TD).weights_TK)
    model(h_TD)
    assert len(routings) == 4
    with pytest.raises(RuntimeError, match="stop"), record_routing(model):
        raise RuntimeError("stop")
    assert not any(module._forward_hooks for module in model.modules())


def test_moe_layers_are_found_in_order():
    inner = make_layer()
    model = nn.ModuleList([nn.Linear(2, 2), nn.Sequential(inner), make_layer()])
    assert moe_layers(model) == [inner, model[2]]
    assert moe_layers(nn.Linear(2, 2)) == []


@each_router
def test_copies_and_saved_states_are_the_same_bit_by_bit(router):
    layer = {"shared_width": 3, "output_bias": True, "bias": True}
    moe, fresh = make_layer(router, **layer), make_layer(router, seed=1, **layer)
    h_TD = tokens(63, dtype=torch.float64)
    assert not torch.equal(run(fresh, h_TD), run(moe, h_TD))
    fresh.load_state_dict(moe.state_dict())
    duplicate = copy.deepcopy(moe)
    for other in (fresh, duplicate):
        assert torch.equal(run(other, h_TD), run(moe, h_TD))
    with torch.no_grad():
        if "random" in ROUTERS[router].abilities:
            # Draws have no weight.
            duplicate.experts.down_proj.mul_(3.0)
        elif "fixed" in ROUTERS[router].abilities:
            duplicate.router.table_VK.copy_(duplicate.router.table_VK.flip(0))
        else:
            # One row alone: what is added to all may leave the ranking as it is.
            duplicate.router.weight[0].mul_(3.0)
    assert not torch.equal(run(duplicate, h_TD), run(moe, h_TD))


@each_router
def test_config_survives_as_plain_data(router):
    config = LayerConfig(
        num_experts=6, width=5, router=router, router_options=router_options(router, 6), bias=True
    )
    assert build_config(LayerConfig, to_plain(config), where="layer") == config
    assert MoELayer(17, config).config is config


@each_router
def test_a_training_step_reaches_every_part(router):
    moe = make_layer(router, shared_width=3, output_bias=True, bias=True).train()
    h_TD = tokens(63, dtype=torch.float64).requires_grad_()
    run(moe, h_TD).square().sum().backward()
    for name, parameter in moe.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        # It multiplies the state of the layer before, which the first layer has none of.
        assert parameter.grad.any() or name == "router.cell.weight_hh", name
    assert h_TD.grad.isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_experts": -1}, r"must be at least 0, got -1, 5, 0, 0"),
        ({"width": -5}, r"must be at least 0, got 6, -5, 0, 0"),
        ({"shared_width": -2}, r"must be at least 0, got 6, 5, -2, 0"),
        ({"router": ""}, r"a layer of 6 experts needs a router; name one"),
        ({"router": "top-q"}, r"router 'top-q' is unknown; did you mean top-p"),
        ({"experts": "gate"}, r"experts 'gate' is unknown; did you mean gated"),
        ({"activation": "gelu_ne"}, r"activation 'gelu_ne' is unknown; did you mean gelu_new"),
    ],
)
def test_wrong_layers_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        MoELayer(17, LayerConfig(**{"num_experts": 6, "width": 5, "router": "top-p", **options}))
