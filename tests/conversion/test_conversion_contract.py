"""What every registered conversion owes its users; a new one is tested the moment it is listed."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re

import pytest
import torch
from calibration_cases import DEEP, LLAMA, Killed, make_text
from conversion_cases import TOKENS, CutAfter, settings_of, stats_for
from model_cases import LAYERS, WIDTH, Case, dense_model, random_ids, same_state

from moesaic._config import build_config, to_plain
from moesaic._errors import InputError
from moesaic.calibration import calibrate
from moesaic.conversion._table import CONVERSIONS
from moesaic.evaluation.activity import record_use, token_fractions
from moesaic.models.checkpoint import load, new_manifest, save
from moesaic.nn.layer import all_experts_on, moe_layers

BIASED = Case("llama", {"mlp_bias": True})
PLAIN = Case("opt", {})


@pytest.fixture(params=list(CONVERSIONS), scope="module")
def name(request):
    return request.param


@pytest.fixture(scope="module")
def config(name):
    return settings_of(name)


@pytest.fixture(scope="module")
def stats(config, tmp_path_factory):
    return stats_for(config, tmp_path_factory.mktemp("stats") / "of-llama")


def convert(name, config, stats, case=LLAMA, dtype=torch.float32, **options):
    return CONVERSIONS.load(name)(dense_model(case, dtype), stats, config, **options)


@pytest.fixture(scope="module")
def converted(name, config, stats):
    """A converted model, to be looked at alone, and what the conversion measured."""
    return convert(name, config, stats)


def as_cut(config):
    """Settings that leave the experts as they are cut."""
    return (
        dataclasses.replace(config, refit=False, kept=1.0) if hasattr(config, "refit") else config
    )


def without(ability, name):
    return ability not in CONVERSIONS[name].abilities


@torch.no_grad()
def test_every_network_becomes_a_layer_that_runs(converted):
    model, _ = converted
    assert model.config.model_type == "moesaic_llama"
    assert len(moe_layers(model)) == LAYERS
    assert all(layer.router is not None for layer in moe_layers(model))
    assert not any(module.training for module in model.modules())
    assert model(random_ids()).logits.isfinite().all()


def test_results_are_plain_data(converted):
    json.dumps(converted[1])


@torch.no_grad()
def test_saved_and_loaded_it_computes_the_same(converted, tmp_path):
    model, _ = converted
    save(model, tmp_path / "model", new_manifest("dense", model))
    again = load(tmp_path / "model")
    same_state(model, again)
    # Bits are the same; products may round by where weights lie in memory.
    torch.testing.assert_close(
        again(random_ids()).logits, model(random_ids()).logits, atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("num_done", range(1, LAYERS + 1))
def test_an_interrupted_conversion_goes_on(name, config, stats, converted, num_done, tmp_path):
    whole, results = converted
    store = tmp_path / "store"
    with pytest.raises(Killed):
        convert(name, config, stats, store=store, progress=CutAfter(num_done))
    done = {path.name: path.stat().st_mtime_ns for path in store.iterdir()}
    assert len(done) == num_done
    again, same = convert(name, config, stats, store=store)
    assert done.items() <= {p.name: p.stat().st_mtime_ns for p in store.iterdir()}.items()
    same_state(whole, again)
    assert whole.config.moesaic == again.config.moesaic
    assert same == results


def test_the_same_input_gives_the_same_model(name, config, stats, converted):
    # The global random state is neither read nor changed.
    torch.manual_seed(123)
    before = torch.get_rng_state()
    dense = dense_model(LLAMA)
    torch.set_rng_state(before)
    again, results = CONVERSIONS.load(name)(dense, stats, config)
    assert torch.equal(torch.get_rng_state(), before)
    same_state(converted[0], again)
    assert results == converted[1]


@torch.no_grad()
def test_all_experts_on_is_the_dense_model_where_declared(name, config, stats):
    if without("cut", name):
        return
    model, _ = convert(name, as_cut(config), stats)
    assert model.config.moesaic["exact"]
    with all_experts_on(model):
        logits = model(random_ids()).logits
    torch.testing.assert_close(logits, dense_model(LLAMA)(random_ids()).logits, atol=1e-4, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("active", [0.5, 0.75])
def test_every_token_uses_what_was_asked_for_where_declared(name, active, tmp_path):
    if without("fixed-k", name):
        return
    config = settings_of(name, active=active)
    model, _ = convert(name, config, stats_for(config, tmp_path / "stats"))
    ids = torch.from_numpy(make_text().ids_NS).long()
    with record_use(model) as uses:
        model(ids)
    fraction_T = token_fractions(model, uses, WIDTH)
    torch.testing.assert_close(fraction_T, torch.full_like(fraction_T, active))


@torch.no_grad()
@pytest.mark.parametrize("case", [BIASED, PLAIN], ids=str)
def test_biases_and_plain_networks_come_along(name, config, case, tmp_path):
    if case is PLAIN and "gated-only" in CONVERSIONS[name].abilities:
        with pytest.raises(InputError, match="gated"):
            convert(name, config, None, case)
        return
    stats = stats_for(config, tmp_path, case)
    model, _ = convert(name, config, stats, case)
    assert model(random_ids()).logits.isfinite().all()
    if without("cut", name):
        return
    model, _ = convert(name, as_cut(config), stats, case)
    with all_experts_on(model):
        logits = model(random_ids()).logits
    torch.testing.assert_close(logits, dense_model(case)(random_ids()).logits, atol=1e-4, rtol=1e-4)


def test_bfloat16_stays_bfloat16(name, config, stats):
    model, _ = convert(name, config, stats, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model(random_ids()).logits.isfinite().all()


def test_it_trains(name, config, stats):
    model, _ = convert(name, config, stats)
    torch.manual_seed(0)
    loss = model.train()(random_ids(), labels=random_ids()).loss
    loss.backward()
    assert loss.isfinite()
    for key, parameter in model.named_parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all(), key
    for layer in moe_layers(model):
        assert any(p.grad is not None and p.grad.any() for p in layer.router.parameters())
        assert any(p.grad is not None and p.grad.any() for p in layer.experts.parameters())


def test_a_converted_model_is_refused(name, config, stats):
    model, _ = convert(name, config, stats)
    with pytest.raises(InputError, match="converted already; give its dense parent"):
        CONVERSIONS.load(name)(model, stats, config)


def test_wrong_statistics_are_refused_before_the_model_is_touched(name, config, stats, tmp_path):
    needed = config.collectors()
    if not needed:
        return
    deep, wide = dense_model(DEEP), dense_model(Case("llama", {"intermediate_size": 2 * WIDTH}))
    apply = CONVERSIONS.load(name)
    with pytest.raises(InputError, match="needs calibration of"):
        apply(deep, None, config)
    with pytest.raises(InputError, match=r"measured on 2 layers, the model has 4; calibrate this"):
        apply(deep, stats, config)
    other = next(c for c in ("moments", "neurons") if {c} != set(needed))
    few = calibrate(dense_model(LLAMA), make_text(), (other,), TOKENS, tmp_path)
    dense = dense_model(LLAMA)
    with pytest.raises(InputError, match=r"needs the collector '\w+'"):
        apply(dense, few, config)
    if set(needed) & {"neurons", "adjacency", "gradients"}:
        with pytest.raises(InputError, match=r"calibrate this model"):
            apply(wide, stats, config)
    assert not any(moe_layers(model) for model in (deep, wide, dense))


@pytest.mark.parametrize("active", [0.0, -0.5, float("nan")])
def test_nothing_active_is_refused(name, active):
    with pytest.raises(InputError, match=rf"active must be .*got {active}"):
        settings_of(name, active=active)


def test_record_and_settings_are_complete(name):
    record, config = CONVERSIONS[name], CONVERSIONS.load_config(name)
    assert len(record.summary) <= 80
    assert record.abilities <= {"cut", "fixed-k", "gated-only"}
    paper = record.paper.rpartition("arXiv ")[2]
    assert paper == "ours" or paper in (inspect.getmodule(CONVERSIONS.load(name)).__doc__ or "")
    assert config.__dataclass_params__.frozen
    fields = {field.name for field in dataclasses.fields(config)}
    assert {"active", "seed"} <= fields
    # Each is explained.
    assert all(re.search(rf"^\s+{field}: ", config.__doc__, re.M) for field in fields)
    values = to_plain(config())
    json.dumps(values)
    assert build_config(config, values, where=name) == config()
