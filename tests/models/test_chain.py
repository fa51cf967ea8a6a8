"""A model whose layers run several times: saved, cached, trained, counted, and refused."""

from __future__ import annotations

import pytest
import torch
from model_cases import LAYERS, WIDTH, Case, converted, random_ids

from moesaic._errors import InputError
from moesaic.evaluation import model_cost
from moesaic.evaluation.activity import ActivityMeter, record_use, token_fractions
from moesaic.inference import Engine
from moesaic.nn.layer import moe_layers, record_routing
from moesaic.nn.shape import layer_shapes
from moesaic.training.budget import active_fraction

LLAMA = Case("llama", {})
TOP1 = {"router": "topk-softmax", "router_options": {"top_k": 1, "renormalize": False}}
CHAIN = {"iterations": 2, "iteration_residual": "change"}


@pytest.fixture
def model():
    model = converted(LLAMA, losses={"load-balance": {"coef": 0.1}}, **TOP1, **CHAIN)
    with torch.no_grad():
        for index, layer in enumerate(moe_layers(model)):
            for turn, router in enumerate(layer.routers()):
                router.weight.normal_(generator=torch.Generator().manual_seed(7 * index + turn))
    return model


def test_it_is_saved_and_loaded(model, tmp_path):
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(random_ids()).logits, model(random_ids()).logits)


def test_caches_change_no_logit(model):
    ids = random_ids()
    with torch.no_grad():
        expected = model(ids).logits
        start = model(ids[:, :-1], use_cache=True)
        last = model(ids[:, -1:], past_key_values=start.past_key_values).logits
    torch.testing.assert_close(last[:, 0], expected[:, -1], rtol=1e-4, atol=1e-5)


def test_a_step_teaches_every_router_and_balances_every_iteration(model):
    ids = random_ids()
    with record_routing(model) as routings:
        out = model.train()(ids, labels=ids)
    out.loss.backward()
    assert len(routings) == 2 * LAYERS
    for layer in moe_layers(model):
        for router in layer.routers():
            assert router.weight.grad.any()
    loads = [
        4 * (routing.counts_E() / ids.numel() * routing.scores_TE.softmax(-1).mean(0)).sum()
        for routing in routings
    ]
    torch.testing.assert_close(out.aux_loss, 0.1 * torch.stack(loads).mean())


def test_what_runs_twice_counts_twice(model):
    ids, expert = random_ids(), 1 / 4
    meter = ActivityMeter(model, WIDTH)
    with torch.no_grad(), meter.reading("docs", ids.numel()), record_routing(model) as routings:
        model(ids)
    per_layer = meter.result().mean_per_layer()
    # Two iterations of one expert of four.
    assert per_layer == pytest.approx([2 * expert] * LAYERS)
    shapes = layer_shapes(model, WIDTH)
    assert active_fraction(routings, shapes) == pytest.approx(per_layer)
    # In two passes the same.
    assert active_fraction(routings * 2, shapes) == pytest.approx(per_layer)
    with torch.no_grad(), record_use(model) as uses:
        model(ids)
    assert token_fractions(model, uses, WIDTH).tolist() == pytest.approx([0.5] * ids.numel())


def test_it_costs_what_one_choice_of_as_many_costs_and_a_router(model):
    options = {**TOP1["router_options"], "top_k": 2}
    once = converted(LLAMA, router="topk-softmax", router_options=options)
    costs = [model_cost(each, [0.5] * LAYERS) for each in (model, once)]
    added = LAYERS * moe_layers(model)[0].router.weight.numel()
    assert costs[0].flops_per_token - costs[1].flops_per_token == 2 * added
    assert costs[0].router_parameters - costs[1].router_parameters == added


def test_shared_parts_count_every_time():
    model = converted(LLAMA, shared_width=16, width=8, **TOP1, **CHAIN)
    ids = random_ids()
    meter = ActivityMeter(model, WIDTH)
    with torch.no_grad(), meter.reading("docs", ids.numel()):
        model(ids)
    assert meter.result().mean() == pytest.approx(2 * (16 + 8) / WIDTH)


def test_the_native_decoder_refuses_it(model):
    with pytest.raises(InputError, match=r"layer 0 runs 2 times in a row .* no native code"):
        Engine(model, length=64)
