"""The training benchmark measures what it says, at a size where speed means nothing."""

from __future__ import annotations

import json

import pytest
import torch

from moesaic._errors import InputError, RunError
from moesaic.evaluation.bench import train as bench
from moesaic.evaluation.bench.train import TrainBenchConfig, bench_train, train_bench_cost

TINY = {
    "dim": 24,
    "width": 32,
    "num_layers": 2,
    "num_heads": 3,
    "vocab_size": 64,
    "num_experts": 8,
    "num_tokens": 32,
    "seconds": 0.01,
    "memory": False,
}


@pytest.mark.parametrize("trains", ["all", "routers"])
def test_every_step_is_measured_beside_the_dense_one(trains):
    result = json.loads(json.dumps(bench_train(TrainBenchConfig(**TINY, trains=trains))))
    assert (result["kind"], result["roof"]) == ("bench train", None)
    assert {"created", "commit", "machine", "config"} <= set(result)
    (cell,) = result["cells"]
    assert (cell["shape"], cell["tokens"], cell["trains"]) == ("2x24x32", 32, trains)
    rows = {row["method"]: row for row in cell["rows"]}
    assert list(rows) == ["dense", "dsmoe", "hard-skip-0.5", "hard-skip-0.25"]
    for row in rows.values():
        assert 0 < row["low_ms"] <= row["median_ms"] <= row["high_ms"]
        assert row["difference"] < 1e-5
        assert "peak_bytes" not in row
    assert (rows["dense"]["faster_than_dense"], rows["dense"]["active"]) == (1.0, 1.0)
    for fraction in (0.5, 0.25):
        assert rows[f"hard-skip-{fraction}"]["active"] == pytest.approx(fraction, abs=0.02)


def test_memory_is_beside_that_of_the_dense_step(monkeypatch):
    peaks = {"dense": 100, "dsmoe": 150, "hard-skip-0.5": 120, "hard-skip-0.25": 110}
    monkeypatch.setattr(bench, "_peak_bytes_of_process", lambda name, config: peaks[name])
    (cell,) = bench_train(TrainBenchConfig(**{**TINY, "memory": True}))["cells"]
    assert {row["method"]: row["peak_bytes"] for row in cell["rows"]} == peaks
    assert [row["memory_ratio"] for row in cell["rows"]] == [1.0, 1.5, 1.2, 1.1]


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("_all_gates_on_logits", r"^dsmoe differs from the float32 reference"),
        ("_faithful", r"^hard-skip-0\.5 differs from the float32 reference"),
    ],
)
def test_a_wrong_step_gives_no_speed(what, message, monkeypatch):
    if what == "_faithful":
        # As if skipping lost an expert: the faithful model has all of its gates on.
        def wrong(model):
            twin = faithful(model)
            for _, router in bench._routers(twin):
                router.threshold = 0.0
            return twin

        faithful = bench._faithful
    else:

        def wrong(model, config):
            return torch.zeros(config.num_tokens, config.vocab_size)

    monkeypatch.setattr(bench, what, wrong)
    monkeypatch.setattr(bench, "_stepper", lambda model, config: lambda: pytest.fail("timed"))
    with pytest.raises(RunError, match=message):
        bench_train(TrainBenchConfig(**TINY))


def test_the_mosaic_is_the_dense_model_with_all_gates_on():
    config = TrainBenchConfig(**TINY)
    dense_SV = bench._logits(bench._build("dense", config), config)
    mosaic = bench._build("dsmoe", config)
    torch.testing.assert_close(bench._all_gates_on_logits(mosaic, config), dense_SV)
    # The model itself is left as it was: half of its gates are off.
    assert not torch.allclose(bench._logits(mosaic, config), dense_SV, atol=1e-4)


def test_cost_counts_what_every_model_keeps():
    config = TrainBenchConfig(**TINY)
    numbers = sum(p.numel() for p in bench._build("dense", config).parameters())
    cost = train_bench_cost(config)
    assert cost["cells"] == 1
    assert 4 * 4 * 4 * numbers < cost["memory_bytes"] < 4 * 4 * 4 * numbers + 1e6
    assert (
        cost["seconds"] < train_bench_cost(TrainBenchConfig(**{**TINY, "memory": True}))["seconds"]
    )


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
    # What this process holds is not that of the other.
    ballast = torch.ones(2**28)
    measured = bench._peak_bytes_of_process("dense", config)
    assert ballast.all()
    assert 3.5 * num_bytes < measured < 8 * num_bytes


def test_a_failing_process_says_why(monkeypatch):
    monkeypatch.setattr(bench.sys, "executable", "/bin/false")
    with pytest.raises(RunError, match=r"memory of dense failed with code 1 .*lower num_tokens"):
        bench._peak_bytes_of_process("dense", TrainBenchConfig(**TINY))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_experts": 7}, r"num_experts must divide width=1536, got 7"),
        ({"num_tokens": 0}, r"num_tokens must be at least 1, got 0"),
        ({"seconds": 0.0}, r"seconds above 0, got 0 and 0.0"),
        ({"active": (1.5,)}, r"active must be in \(0, 1\), got 1.5"),
    ],
)
def test_wrong_sizes_are_refused(values, message):
    with pytest.raises(InputError, match=message):
        TrainBenchConfig(**values)
