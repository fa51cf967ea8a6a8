"""The training benchmark measures what it says, at a size where speed means nothing."""

from __future__ import annotations

import json

import pytest

from moesaic._errors import InputError, RunError
from moesaic.evaluation.bench import train as bench
from moesaic.evaluation.bench.train import TrainBenchConfig, in_turns, train

TINY = {
    "dim": 24,
    "width": 32,
    "num_layers": 2,
    "num_heads": 3,
    "vocab_size": 64,
    "num_experts": 8,
    "num_tokens": 32,
    "repeats": 2,
}


@pytest.mark.parametrize("trains", ["all", "routers"])
def test_every_case_is_measured_beside_the_dense_step(trains):
    result = train(TrainBenchConfig(**TINY, trains=trains, memory=False))
    cases = result["cases"]
    assert list(cases) == ["dense", "dsmoe", "hard-skip-0.5", "hard-skip-0.25"]
    for case in cases.values():
        for values in (case["step_s"], case["time_ratio"]):
            assert 0 < values["low"] <= values["median"] <= values["high"]
    assert cases["dense"]["time_ratio"] == {"median": 1.0, "low": 1.0, "high": 1.0}
    assert cases["dense"]["active"] == 1.0
    for fraction in (0.5, 0.25):
        assert cases[f"hard-skip-{fraction}"]["active"] == pytest.approx(fraction, abs=0.02)
    # Plain data, as it is.
    assert json.loads(json.dumps(result))["cases"] == cases


def test_turns_alternate_after_the_warm_up():
    calls = []
    steps = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}
    seconds = in_turns(steps, repeats=2, warmup=1)
    assert calls == ["a", "b", "a", "b", "a", "b"]
    assert {name: len(values) for name, values in seconds.items()} == {"a": 2, "b": 2}


def test_routers_alone_train_with_the_gradient_flowing_through():
    config = TrainBenchConfig(**TINY, trains="routers")
    model = bench._build("dsmoe", config)
    learns = {name for name, p in model.named_parameters() if p.requires_grad}
    assert learns == {f"model.layers.{i}.mlp.router.weight" for i in range(2)}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    bench._stepper(model, config)()
    changed = {name for name, p in model.named_parameters() if not p.equal(before[name])}
    assert changed == learns


@pytest.mark.slow
def test_memory_is_that_of_the_model():
    # 30 MB of parameters, as much of gradients and twice that of AdamW.
    config = TrainBenchConfig(**{**TINY, "dim": 384, "width": 2048, "num_layers": 3})
    num_bytes = 4 * sum(p.numel() for p in bench._build("dense", config).parameters())
    measured = bench._peak_bytes_of_process("dense", config)
    assert 3.5 * num_bytes < measured < 8 * num_bytes


def test_a_failing_process_says_why(monkeypatch):
    monkeypatch.setattr(bench.sys, "executable", "/bin/false")
    with pytest.raises(RunError, match=r"memory of dense failed with code 1 .*lower num_tokens"):
        bench._peak_bytes_of_process("dense", TrainBenchConfig(**TINY))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_experts": 7}, r"num_experts must divide width=1536, got 7"),
        ({"repeats": 0}, r"repeats must be at least 1, got 0"),
        ({"active": (1.5,)}, r"active must be in \(0, 1\), got 1.5"),
    ],
)
def test_wrong_sizes_are_refused(values, message):
    with pytest.raises(InputError, match=message):
        TrainBenchConfig(**values)
