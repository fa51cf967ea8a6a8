"""Every registered compression of a mixture keeps the promises of the family.

It takes a model with experts as `convert` leaves it, changes them in place, leaves routers and what
is always on alone, needs no text, and what it leaves is a mixture of the same number of experts.
"""

import pytest
import torch
from compression_cases import LLAMA, Killed, Watch, logits, state
from model_cases import Case, converted, dense_model, same_state

from moesaic._config import to_plain
from moesaic._errors import InputError
from moesaic.compression._table import COMPRESSIONS
from moesaic.models import checkpoint
from moesaic.nn.layer import moe_layers

FROM_MIXTURE = [name for name, info in COMPRESSIONS.items() if "mixture" in info.abilities]


@pytest.fixture(params=FROM_MIXTURE)
def name(request):
    return request.param


def compress(name, dtype=torch.float32, mixture=None, **options):
    config = COMPRESSIONS.load_config(name)()
    mixture = converted(LLAMA, dtype, shared_width=8) if mixture is None else mixture
    return COMPRESSIONS.load(name)(mixture, None, config, **options)


def experts(model):
    return [layer.experts for layer in moe_layers(model)]


def test_something_is_lost_and_not_all(name):
    want = logits(converted(LLAMA, shared_width=8))
    got = logits(compress(name)[0])
    assert got.isfinite().all()
    assert (got - want).abs().max() > 1e-2
    assert got.std(dim=1).min() > 1e-2


def test_only_experts_change_and_they_weigh_less(name):
    before = converted(LLAMA, shared_width=8)
    count = sum(p.numel() for part in experts(before) for p in part.parameters())
    kept = {key: value for key, value in state(before).items() if ".experts." not in key}
    model, results = compress(name)
    after = state(model)
    assert all(torch.equal(after[key], value) for key, value in kept.items())
    assert [part.num_experts for part in experts(model)] == [
        part.num_experts for part in experts(before)
    ]
    left = sum(p.numel() for part in experts(model) for p in part.parameters())
    assert results["weights"] == pytest.approx(left / count)
    assert results["weights"] < 1
    assert to_plain(results) == results


def test_the_mixture_is_consumed_and_no_teacher_of_itself(name):
    mixture = converted(LLAMA, shared_width=8).train()
    model, _ = compress(name, mixture=mixture)
    assert model is mixture
    assert not model.training
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert model.config.moesaic["exact"] is False


def test_saves_and_loads(name, tmp_path):
    manifest = checkpoint.new_manifest("tiny", dense_model(LLAMA))
    model, results = compress(name)
    manifest = checkpoint.add_step(manifest, f"compress {name}", {}, results)
    checkpoint.save(model, tmp_path, manifest)
    loaded = checkpoint.load(tmp_path)
    same_state(loaded, model)
    assert torch.equal(logits(loaded), logits(model))


def test_layers_that_reuse_experts_use_the_new_ones(name, tmp_path):
    router = {"router": "topk-softmax", "router_options": {"top_k": 3}}
    model, _ = compress(name, mixture=converted(LLAMA, shared_width=8, reuse=2, **router))
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(logits(again), logits(model))


def test_same_input_same_model_whatever_the_random_state(name):
    torch.manual_seed(1)
    first, _ = compress(name)
    torch.manual_seed(2)
    second, _ = compress(name)
    same_state(first, second)


def test_an_interrupted_run_goes_on_after_its_layers(name, tmp_path, monkeypatch):
    whole, want = compress(name)
    with pytest.raises(Killed):
        compress(name, store=tmp_path, progress=Watch(stop_after=1))
    finished = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert finished
    model, results = compress(name, store=tmp_path)
    same_state(model, whole)
    assert results == want
    assert {path: path.stat().st_mtime_ns for path in finished} == finished


def test_half_precision(name):
    model, _ = compress(name, torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert logits(model).isfinite().all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: dense_model(LLAMA), r"a model of type llama has no experts to \w+; convert it"),
        (lambda: converted(Case("opt", {})), r"are made of gated ones, got PlainExperts"),
    ],
    ids=["dense", "plain"],
)
def test_other_models_are_refused_and_left_alone(name, make, message):
    model = make()
    before = state(model)
    with pytest.raises(InputError, match=message) as caught:
        compress(name, mixture=model)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_no_text_is_read(name):
    assert COMPRESSIONS.load_config(name)().collectors() == ()
