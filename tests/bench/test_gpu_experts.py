"""The benchmark of the expert paths runs end to end, and gives no speed to a wrong result."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="triton is not installed; pip install 'moesaic[dev]'",
)
SCRIPT = Path(__file__).resolve().parents[2] / "bench" / "gpu_experts.py"


@pytest.fixture
def script(monkeypatch):
    spec = importlib.util.spec_from_file_location("gpu_experts", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up.
    monkeypatch.setitem(sys.modules, "gpu_experts", module)
    spec.loader.exec_module(module)
    return module


def test_tiny_run_gives_every_number(script, tmp_path, capsys):
    out = tmp_path / "out.json"
    record = script.main(["--tiny", "--repeats", "1", "--out", str(out)])
    assert json.loads(out.read_text()) == record
    lines = capsys.readouterr().out.splitlines()
    # Two of heading; two cases of two directions of three paths.
    assert len(lines) == 2 + 2 * 2 * 3
    assert record["machine"]["triton"]
    assert record["peak_flops"] > 0
    for case, shapes in zip(record["cases"], script.TINY, strict=True):
        assert case["check"]["holds"]
        # h up^T has 2F columns, a down^T another F, at two operations each; backward twice that.
        assert case["flops"]["forward"] == case["pairs"] * 2 * shapes.D * 3 * shapes.F
        assert case["flops"]["both"] == 3 * case["flops"]["forward"]
        for direction in ("forward", "both"):
            assert set(case[direction]) == {"triton", "grouped", "dense"}
            assert all(result["seconds"] > 0 for result in case[direction].values())
    assert record["cases"][0]["active_experts"] == 2


@pytest.mark.parametrize("wrong", [1.1, float("nan")])
def test_a_wrong_result_gets_no_speed(script, monkeypatch, capsys, wrong):
    right = script.experts_triton
    monkeypatch.setattr(script, "experts_triton", lambda *a: right(*a) * wrong)
    monkeypatch.setattr(script, "TINY", script.TINY[1:])
    record = script.main(["--tiny", "--repeats", "1"])
    (case,) = record["cases"]
    assert case["check"]["holds"] is False
    assert "forward" not in case
    assert "tiny-variable  misses the reference" in capsys.readouterr().out


def test_what_does_not_fit_is_said(script):
    def too_much():
        raise torch.OutOfMemoryError("no")

    runs = {"big": too_much, "small": lambda: None}
    results = script.interleave(runs, "cpu", 2)
    assert results["big"]["seconds"] is None
    assert results["small"]["seconds"] > 0


def test_without_a_gpu_only_tiny_runs(script, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stop:
        script.main([])
    assert stop.value.code == 2
    assert "needs a cuda device" in capsys.readouterr().err
