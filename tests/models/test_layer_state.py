"""A model hands routers the routing of the layer before, in every way that it is run."""

from __future__ import annotations

import pytest
import torch
from model_cases import LAYERS, Case, dense_config, random_ids, recompute

from moesaic import record_routing
from moesaic._config import to_plain
from moesaic._errors import InputError
from moesaic.models.architectures import ARCHITECTURES
from moesaic.models.modeling import moesaic_classes
from moesaic.nn.layer import LayerConfig, end_step, moe_layers


@pytest.fixture(params=["zero-computation", "recurrent-top-k"])
def model(request):
    """Layers that all but the first hear the one before, with weights of order one."""
    torch.manual_seed(0)
    layers, loss = [], "load-balance"
    for index in range(LAYERS):
        options = {"first": index == 0, "size": 8}
        if request.param == "zero-computation":
            options, loss = {"residual": index > 0}, "heterogeneous-balance"
        layers.append(
            LayerConfig(num_experts=4, width=8, router=request.param, router_options=options)
        )
    moesaic = {"layers": [to_plain(layer) for layer in layers], "losses": {loss: {"coef": 0.1}}}
    config_class, model_class = moesaic_classes(ARCHITECTURES["llama"])
    values = dense_config(Case("llama", {})).to_dict()
    values.pop("model_type")
    model = model_class(config_class(**values, moesaic=moesaic))
    with torch.no_grad():
        for layer in moe_layers(model):
            for parameter in layer.router.parameters():
                parameter.normal_()
    return model.eval()


@pytest.mark.parametrize("model", ["zero-computation"], indirect=True)
def test_scores_of_the_layer_before_are_added(model):
    last = moe_layers(model)[-1].router
    inputs = []
    handle = last.register_forward_pre_hook(lambda router, args: inputs.append(args[0]))
    with record_routing(model) as routings:
        model(random_ids())
    handle.remove()
    added_TN = routings[-1].scores_TE - inputs[0] @ last.weight.T
    expected_TN = routings[-2].scores_TE @ last.residual.T
    assert len(routings) == LAYERS > 1
    assert expected_TN.abs().mean() > 0.1
    torch.testing.assert_close(added_TN, expected_TN, rtol=1e-4, atol=1e-4)


def test_labels_and_caches_change_no_logit(model):
    ids = random_ids()
    with torch.no_grad():
        expected = model(ids).logits
        torch.testing.assert_close(model(ids, labels=ids).logits, expected)
        start = model(ids[:, :-1], use_cache=True)
        last = model(ids[:, -1:], past_key_values=start.past_key_values).logits
    torch.testing.assert_close(last[:, 0], expected[:, -1], rtol=1e-4, atol=1e-5)


def test_a_step_teaches_every_router_through_the_next(model):
    ids = random_ids()
    model.train()(ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    for layer in moe_layers(model):
        for name, parameter in layer.router.named_parameters():
            assert parameter.grad.any(), name


def test_it_is_saved_and_loaded(model, tmp_path):
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(random_ids()).logits, model(random_ids()).logits)


def test_recomputation_is_refused(model):
    ids = random_ids()
    recompute(model, use_reentrant=False)
    loss = model.train()(ids, labels=ids).loss
    with pytest.raises(InputError, match=r" needs the .* train without gradient checkpointing"):
        loss.backward()


@pytest.mark.parametrize("router", ["permutation-search", "dense-to-sparse", "progressive-top-k"])
def test_what_steps_have_changed_is_saved_and_loaded(router, tmp_path):
    torch.manual_seed(0)
    layer = LayerConfig(num_experts=4, width=8, router=router)
    moesaic = {"layers": [to_plain(layer)] * LAYERS, "losses": {}}
    config_class, model_class = moesaic_classes(ARCHITECTURES["llama"])
    values = dense_config(Case("llama", {})).to_dict()
    values.pop("model_type")
    model = model_class(config_class(**values, moesaic=moesaic))
    for _ in range(3):
        end_step(model)
    buffers = dict(model.named_buffers())
    assert any("router" in name for name in buffers)
    model.save_pretrained(tmp_path)
    again = dict(type(model).from_pretrained(tmp_path).named_buffers())
    for name in (name for name in buffers if "router" in name):
        assert torch.equal(again[name], buffers[name]), name
    if router == "permutation-search":
        exchanged = [value for name, value in again.items() if name.endswith("expert_of")]
        assert any(value.tolist() != sorted(value.tolist()) for value in exchanged)
