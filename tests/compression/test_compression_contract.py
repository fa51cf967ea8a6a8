"""Every registered compression keeps the promises of the family, the moment it is listed.

Abilities: with `static` the weights that are left serve every token, so the fraction can be
counted; with `any-architecture` no row of the architecture table is refused. Those with `mixture`
start from a model with experts and promise other things: `test_mixture_contract.py`.
"""

import contextlib
import inspect
import re

import pytest
import torch
from compression_cases import LLAMA, logits, measure, state, weights_in_use
from model_cases import Case, converted, dense_model, same_state

from moesaic._config import to_plain
from moesaic._errors import InputError
from moesaic.compression._table import COMPRESSIONS
from moesaic.models import checkpoint

OTHERS = [
    Case("llama", {"mlp_bias": True}),
    *(Case(name, {}) for name in ("gemma2", "gpt2", "opt", "phi3")),
]


FROM_DENSE = [name for name, info in COMPRESSIONS.items() if "mixture" not in info.abilities]


@pytest.fixture(params=FROM_DENSE)
def name(request):
    return request.param


def settings(name, **values):
    return COMPRESSIONS.load_config(name)(**values)


def compress(name, directory, active, case=LLAMA, dtype=torch.float32, **options):
    config = settings(name, active=active)
    dense = dense_model(case, dtype)
    stats = measure(dense, directory, config.collectors())
    return COMPRESSIONS.load(name)(dense, stats, config, **options)


def test_requested_fraction_is_met(name, tmp_path):
    model, results = compress(name, tmp_path, 0.5)
    assert results["active"] == pytest.approx(0.5, abs=1e-3)
    assert to_plain(results) == results
    if "static" in COMPRESSIONS[name].abilities:
        counted = weights_in_use(model) / weights_in_use(dense_model(LLAMA))
        assert counted == pytest.approx(results["active"], abs=1e-9)


def test_something_is_lost_and_not_all(name, tmp_path):
    """A method that left the model as it was, or made it constant, would pass the other tests."""
    want = logits(dense_model(LLAMA))
    got = logits(compress(name, tmp_path, 0.5)[0])
    assert got.isfinite().all()
    assert (got - want).abs().max() > 1e-2
    assert got.std(dim=1).min() > 1e-2


def test_everything_active_is_the_dense_model(name, tmp_path):
    model, results = compress(name, tmp_path, 1.0, dtype=torch.float64)
    assert results["active"] == 1.0
    torch.testing.assert_close(logits(model), logits(dense_model(LLAMA, torch.float64)))


def test_dense_model_is_consumed(name, tmp_path):
    config = settings(name)
    dense = dense_model(LLAMA)
    stats = measure(dense, tmp_path, config.collectors())
    model, _ = COMPRESSIONS.load(name)(dense, stats, config)
    assert model is dense
    assert not model.training
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_saves_and_loads(name, tmp_path):
    config = settings(name, active=0.5)
    dense = dense_model(LLAMA)
    stats = measure(dense, tmp_path / "stats", config.collectors())
    manifest = checkpoint.new_manifest("tiny", dense)
    model, results = COMPRESSIONS.load(name)(dense, stats, config)
    manifest = checkpoint.add_step(manifest, f"compress {name}", to_plain(config), results)
    checkpoint.save(model, tmp_path / "model", manifest)
    loaded = checkpoint.load(tmp_path / "model")
    same_state(loaded, model)
    assert torch.equal(logits(loaded), logits(model))
    assert weights_in_use(loaded) == weights_in_use(model)


def test_same_input_same_model_whatever_the_random_state(name, tmp_path):
    torch.manual_seed(1)
    first, _ = compress(name, tmp_path / "a", 0.5)
    torch.manual_seed(2)
    second, _ = compress(name, tmp_path / "b", 0.5)
    same_state(first, second)


def test_finished_run_is_taken_up(name, tmp_path):
    store = tmp_path / "store"
    whole, want = compress(name, tmp_path / "a", 0.5, store=store)
    again, results = compress(name, tmp_path / "b", 0.5, store=store)
    same_state(again, whole)
    assert results == want


def test_half_precision(name, tmp_path):
    model, results = compress(name, tmp_path, 0.5, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert results["active"] == pytest.approx(0.5, abs=1e-3)
    assert logits(model).isfinite().all()


@pytest.mark.parametrize("case", OTHERS, ids=str)
def test_other_architectures(name, case, tmp_path):
    if "any-architecture" not in COMPRESSIONS[name].abilities:
        with contextlib.suppress(InputError):
            compress(name, tmp_path / "works", 0.5, case)
            return
        with pytest.raises(InputError, match=rf"{name} .* {case.model_type}, .* work$"):
            compress(name, tmp_path / "refused", 0.5, case)
        return
    dense = weights_in_use(dense_model(case))
    model, results = compress(name, tmp_path, 0.5, case)
    assert results["active"] == pytest.approx(0.5, abs=1e-3)
    assert logits(model).isfinite().all()
    if "static" in COMPRESSIONS[name].abilities:
        assert weights_in_use(model) / dense == pytest.approx(0.5, abs=1e-3)


def refuses(name, model, stats, match, config=None):
    """A refusal is one sentence and leaves the model alone."""
    before = state(model)
    model_type = model.config.model_type
    with pytest.raises(InputError, match=match) as caught:
        COMPRESSIONS.load(name)(model, stats, config or settings(name))
    assert "\n" not in str(caught.value)
    assert model.config.model_type == model_type
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_missing_statistics_are_refused(name, tmp_path):
    needed = settings(name).collectors()
    if not needed:
        COMPRESSIONS.load(name)(dense_model(LLAMA), None, settings(name))
        return
    refuses(name, dense_model(LLAMA), None, rf"^{name} needs calibration of {', '.join(needed)}$")
    others = measure(dense_model(LLAMA), tmp_path, ("moments",))
    match = rf"^{name} needs the collector '\w+', but .* has moments; calibrate again with it$"
    refuses(name, dense_model(LLAMA), others, match)


def test_statistics_of_another_model_are_refused(name, tmp_path):
    needed = settings(name).collectors()
    if needed:
        deep = dense_model(Case("llama", {"num_hidden_layers": 3}))
        match = r"was measured on 3 layers, the model has 2; calibrate this model$"
        refuses(name, dense_model(LLAMA), measure(deep, tmp_path, needed), match)


def test_converted_model_is_refused(name, tmp_path):
    stats = measure(dense_model(LLAMA), tmp_path, settings(name).collectors())
    refuses(name, converted(LLAMA), stats, r"converted already; give its dense parent$")


@pytest.mark.parametrize("active", [0.0, -0.5, 1.01])
def test_fraction_out_of_bounds_is_refused(name, active):
    with pytest.raises(InputError, match=rf"active must be in \(0, 1\], got {active}"):
        settings(name, active=active)


def test_tiny_fraction_is_met_or_refused(name, tmp_path):
    """Where a fraction is too small for the shapes, the message says which would do."""
    config = settings(name, active=1e-4)
    dense = dense_model(LLAMA)
    stats = measure(dense, tmp_path, config.collectors())
    try:
        _, results = COMPRESSIONS.load(name)(dense, stats, config)
    except InputError:
        refuses(name, dense_model(LLAMA), stats, r"active=0.0001 .*; (raise it|use) ", config)
    else:
        assert results["active"] == pytest.approx(1e-4, abs=1e-3)


@pytest.mark.parametrize("name", COMPRESSIONS)
def test_record_is_complete(name):
    record, config = COMPRESSIONS[name], COMPRESSIONS.load_config(name)
    assert config.__dataclass_params__.frozen
    parameters = inspect.signature(config).parameters
    assert {p.kind for p in parameters.values()} == {inspect.Parameter.KEYWORD_ONLY}
    assert ("active" in parameters) == (name in FROM_DENSE)
    assert len(record.summary) <= 80
    paper = re.search(r"\d{4}\.\d{5}", record.paper)
    if paper:
        assert paper[0] in (inspect.getmodule(COMPRESSIONS.load(name)).__doc__ or "")
    assert record.abilities <= {"static", "any-architecture", "mixture"}, (
        "an ability that no test asks for"
    )
