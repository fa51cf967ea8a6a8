"""A model whose layers use each other's experts: saved once, cached, trained, counted, refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from model_cases import LAYERS, WIDTH, Case, dense_config, random_ids
from safetensors.torch import load_file

from moesaic._config import to_plain
from moesaic._errors import InputError
from moesaic.evaluation import model_cost
from moesaic.evaluation.activity import ActivityMeter
from moesaic.inference import Engine
from moesaic.models.architectures import ARCHITECTURES
from moesaic.models.modeling import moesaic_classes
from moesaic.nn.layer import LayerConfig, moe_layers, record_routing

N, EXPERT = 4, 12


@pytest.fixture
def model():
    torch.manual_seed(0)
    layer = LayerConfig(
        num_experts=N,
        width=EXPERT,
        reuse=LAYERS,
        router="growing-top-k",
        router_options={"top_k": 2, "initial": N, "start_step": 1, "end_step": 3},
    )
    config_class, model_class = moesaic_classes(ARCHITECTURES["llama"])
    values = dense_config(Case("llama", {})).to_dict()
    values.pop("model_type")
    moesaic = {"layers": [to_plain(layer)] * LAYERS, "losses": {"load-balance": {"coef": 0.1}}}
    model = model_class(config_class(**values, moesaic=moesaic))
    with torch.no_grad():
        for layer in moe_layers(model):
            for parameter in layer.parameters():
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return model.eval()


def test_it_is_saved_once_and_loaded(model, tmp_path):
    model.save_pretrained(tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    assert sum("experts.down_proj" in name for name in load_file(file)) == LAYERS
    again = type(model).from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(random_ids()).logits, model(random_ids()).logits)
        # And what was loaded is what every layer of the group reads.
        moe_layers(again)[0].experts.down_proj.zero_()
    with record_routing(again) as routings, torch.no_grad():
        out = again(random_ids())
    assert (routings[1].ids_TK < N).any()
    assert not torch.equal(out.logits, model(random_ids()).logits)


def test_a_step_teaches_experts_that_another_layer_uses(model):
    ids = random_ids()
    first, last = moe_layers(model)
    # Of the last layer's experts, the first layer alone uses any.
    first.router.register_forward_hook(lambda router, args, routing: routing_to(routing, N))
    last.router.register_forward_hook(lambda router, args, routing: routing_to(routing, 0))
    model.train()(ids, labels=ids).loss.backward()
    for layer in (first, last):
        assert layer.router.weight.grad.any()
        assert layer.experts.down_proj.grad.any()


def routing_to(routing, first):
    """The same weights, of the experts of one layer."""
    return replace(routing, ids_TK=routing.ids_TK % N + first)


def test_caches_change_no_logit(model):
    ids = random_ids()
    with torch.no_grad():
        expected = model(ids).logits
        start = model(ids[:, :-1], use_cache=True)
        last = model(ids[:, -1:], past_key_values=start.past_key_values).logits
    torch.testing.assert_close(last[:, 0], expected[:, -1], rtol=1e-4, atol=1e-5)


def test_it_is_counted(model):
    ids = random_ids()
    meter = ActivityMeter(model, WIDTH)
    with torch.no_grad(), meter.reading("docs", ids.numel()):
        model(ids)
    activation = meter.result()
    fraction = 2 * EXPERT / WIDTH
    assert activation.mean_per_layer() == pytest.approx([fraction] * LAYERS)
    assert [len(layer) for layer in activation.experts_per_layer()] == [LAYERS * N] * LAYERS
    cost = model_cost(model, [fraction] * LAYERS)
    assert cost.total_parameters == sum(p.numel() for p in model.parameters())
    off = LAYERS * (N - 2) * 3 * EXPERT * 32
    assert cost.active_parameters == cost.total_parameters - off
    assert cost.router_parameters == LAYERS * LAYERS * N * 32


def test_the_native_decoder_refuses_it(model):
    with pytest.raises(InputError, match=r"layer 0 uses the experts of 2 layers, which has no n"):
        Engine(model, length=64)
