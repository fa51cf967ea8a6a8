"""Sparse networks: the roof by hand, the check that comes first, and what the document holds."""

import json

import pytest
import torch

from moesaic._errors import InputError, RunError
from moesaic.evaluation.bench import cell as cell_file
from moesaic.evaluation.bench import ffn as ffn_file
from moesaic.evaluation.bench import layer as layer_file
from moesaic.evaluation.bench import peers
from moesaic.evaluation.bench import roof as roof_file
from moesaic.evaluation.bench.cell import Method, Methods, require_memory, time_cell
from moesaic.evaluation.bench.ffn import (
    FfnCell,
    FfnConfig,
    Use,
    bench_ffn,
    ffn_cells,
    ffn_cost,
    sparse_work,
)
from moesaic.evaluation.bench.layer import bench_layer
from moesaic.evaluation.bench.roof import Limits, Probe, Roof
from moesaic.evaluation.bench.timing import Timing

ROOF = Roof(
    read_bytes_per_s=100.0,
    copy_bytes_per_s=80.0,
    flops_per_s={"float32": 1000.0, "bfloat16": 500.0},
    threads=1,
    buffer_bytes=8,
)


def tiny(**values):
    settings = {
        "shape": ("32x64",),
        "active": (0.5,),
        "tokens": (1, 5),
        "experts": (4,),
        "dtype": "float32",
        "seconds": 0.01,
        "working_set_mb": 0,
        "roof_mb": 1,
    }
    return FfnConfig(**{**settings, **values})


@pytest.fixture(autouse=True)
def _small_roof(monkeypatch):
    monkeypatch.setattr(roof_file, "_MATRIX", 64)


def test_roof_by_hand():
    cell = FfnCell(dim=2, neurons=8, num_experts=4, num_active=2, num_tokens=3)
    # An expert has 3 * 2 * 2 = 12 numbers; 3 are touched, and 6 pairs do 2 FLOPs a number.
    use = Use(touched=3, pairs=6)
    assert sparse_work(cell, use, "float32") == (3 * 12 * 4, 6 * 12 * 2)
    assert sparse_work(cell, use, "bfloat16") == (3 * 12 * 2, 6 * 12 * 2)
    # In bfloat16 the better peak of the two.
    assert (ROOF.peak("float32"), ROOF.peak("bfloat16")) == (1000.0, 1000.0)


def test_roof_is_measured():
    roof = Limits(("bfloat16",), seconds=1e-3, buffer_bytes=1 << 20).roof
    assert roof.buffer_bytes == 1 << 20
    assert set(roof.flops_per_s) == {"float32", "bfloat16"}
    rates = [roof.read_bytes_per_s, roof.copy_bytes_per_s, *roof.flops_per_s.values()]
    assert min(rates) > 0


def test_probes_read_and_multiply_what_the_cell_must(monkeypatch):
    limits = Limits(("float32",), seconds=1e-3, buffer_bytes=1 << 20)
    monkeypatch.setattr(limits, "roof", ROOF)
    read = []
    monkeypatch.setattr(limits, "_read", lambda rows: read.append(rows.clone()))
    # 10 rows of 4,096 numbers out of 64, each time others; arithmetic is a hundredth of that time.
    limits._buffer.copy_(torch.arange(64.0)[:, None])
    num_bytes = 10 * 4 * 4096
    probes = limits.probes(num_bytes, num_bytes / 10, "float32")
    assert set(probes) == {"reading"}
    for _ in range(7):
        probes["reading"].call()
    assert [int(rows[0, 0]) for rows in read] == [0, 10, 20, 30, 40, 50, 0]
    assert all(len(rows) == 10 for rows in read)
    assert probes["reading"].times == 1.0
    # More than there is: read all of it, several times over. A product of 16 x 64 by 64 x 64.
    probes = limits.probes(2.5 * (1 << 20), 1e9, "float32")
    assert probes["reading"].times == 2.5
    assert probes["arithmetic"].times == pytest.approx(1e9 / (2 * 16 * 64 * 64))
    assert probes["arithmetic"].call().shape == (16, 64)


def test_the_limit_of_a_cell_is_the_slower_of_its_probes(monkeypatch):
    seconds = {"ours": 6e-3, "the limit of reading": 1e-3, "the limit of arithmetic": 2e-3}

    def measured(calls, **options):
        return {
            name: Timing(median_s=seconds[name], low_s=0.0, high_s=1.0, samples=1, calls=1)
            for name in calls
        }

    monkeypatch.setattr(cell_file, "measure", measured)
    one = torch.ones(1)
    methods = Methods(running={"ours": Method([lambda: one], one)})
    probes = {"reading": Probe(lambda: None, 2.5), "arithmetic": Probe(lambda: None, 1.0)}
    roof_s, rows = time_cell(methods, "float32", seconds=1.0, probes=probes)
    assert roof_s == 2.5e-3
    assert [(row["method"], row["times_roof"]) for row in rows] == [("ours", pytest.approx(2.4))]


def test_combinations_that_do_not_divide_are_left_out():
    cells = ffn_cells(tiny(experts=(4, 3, 128), active=(0.5, 0.375)))
    assert {(cell.num_experts, cell.num_active) for cell in cells} == {(4, 2)}
    with pytest.raises(InputError, match="no combination"):
        ffn_cells(tiny(experts=(3,)))
    assert ffn_cost(tiny())["cells"] == 2


@pytest.mark.parametrize("bench", [bench_ffn, bench_layer])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_document(bench, dtype, monkeypatch):
    monkeypatch.setattr(peers, "why_not_kt", lambda: "left out")
    result = json.loads(json.dumps(bench(tiny(dtype=dtype))))
    assert set(result) == {
        "schema",
        "kind",
        "created",
        "commit",
        "machine",
        "native_kernels",
        "config",
        "roof",
        "cells",
    }
    assert result["machine"]["threads"] == torch.get_num_threads()
    assert [cell["tokens"] for cell in result["cells"]] == [1, 5]
    for cell in result["cells"]:
        rows = {row["method"]: row for row in cell["rows"]}
        assert {"dense", "moesaic"} <= set(rows)
        for row in rows.values():
            if "skipped" in row:
                continue
            assert row["low_ms"] <= row["median_ms"] <= row["high_ms"]
            assert row["difference"] <= cell_file.TOLERANCE[dtype]
            assert row["times_roof"] == pytest.approx(row["median_ms"] / cell["roof_ms"])
        assert rows["dense"]["faster_than_dense"] == 1.0
        if bench is bench_ffn:
            assert cell["pairs"] == 2 * cell["tokens"]
            assert {f"transformers {name}" for name in peers.TRANSFORMERS} <= set(rows)
            assert rows["kt-kernel"]["skipped"]


@pytest.mark.parametrize("file", [ffn_file, layer_file], ids=["ffn", "layer"])
def test_wrong_numbers_give_no_speed(file, monkeypatch):
    def wrong(layer):
        return torch.zeros_like

    monkeypatch.setattr(file, "our_layer", wrong)
    monkeypatch.setattr(cell_file, "measure", lambda *args, **options: pytest.fail("timed"))
    bench = bench_ffn if file is ffn_file else bench_layer
    with pytest.raises(RunError, match=r"^moesaic differs from the float32 reference by 1 "):
        bench(tiny())


def test_not_a_number_is_wrong():
    expected = torch.ones(2)
    methods = Methods(running={"peer": Method([lambda: expected * torch.nan], expected)})
    with pytest.raises(RunError, match="peer differs"):
        time_cell(methods, "float32", probes={}, seconds=0.01)


def test_a_peer_too_large_says_so(monkeypatch):
    monkeypatch.setattr(peers, "_BATCHED_BYTES", 1.0)
    rows = bench_ffn(tiny(tokens=(1,)))["cells"][0]["rows"]
    row = next(row for row in rows if row["method"] == "transformers batched_mm")
    assert "would gather" in row["skipped"]


def test_memory_is_checked_before_work(monkeypatch):
    require_memory(1, "nothing")
    with pytest.raises(InputError, match=r"needs about 1000000000\.0 GB of memory"):
        require_memory(1e18, "it")
    monkeypatch.setattr(ffn_file, "Limits", lambda *args: pytest.fail("worked"))
    with pytest.raises(InputError, match="the largest combination needs"):
        bench_ffn(tiny(shape=("1048576x1048576",)))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"shape": ("2048",)}, "shape must be DxM"),
        ({"shape": ("0x8",)}, "shape must be DxM"),
        ({"active": (0.0,)}, "active must be in"),
        ({"active": (1.5,)}, "active must be in"),
        ({"tokens": ()}, "tokens must name at least 1"),
        ({"tokens": (0,)}, "tokens must be at least 1"),
        ({"experts": (0,)}, "experts must be at least 1"),
        ({"threads": -1}, "threads must be at least 0"),
        ({"seconds": 0.0}, "seconds must be above 0"),
    ],
)
def test_wrong_settings(values, message):
    with pytest.raises(InputError, match=message):
        tiny(**values)
