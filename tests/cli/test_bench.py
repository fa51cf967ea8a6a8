"""`moesaic bench`: its table, its document, and no output at all when a check fails."""

import json

import pytest
import torch

from moesaic.cli.main import main
from moesaic.evaluation.bench import ffn as ffn_file
from moesaic.evaluation.bench import llama_cpp, peers, roof

FFN = ["--shape", "32x64", "--experts", "4", "--active", "0.5", "--tokens", "1", "--dtype"]
FFN += ["float32", "--seconds", "0.01", "--roof-mb", "1", "--working-set-mb", "0"]
MODEL = ["--model", "llama-tiny", "--tokens", "2", "--prompt-tokens", "4", "--seconds", "0.01"]
MODEL += ["--roof-mb", "1", "--dtype", "float32"]
TRAIN = ["--dim", "24", "--width", "32", "--num-layers", "1", "--num-heads", "3", "--vocab-size"]
TRAIN += ["64", "--num-tokens", "16", "--active", "0.5", "--seconds", "0.01", "--no-memory"]
OPTIONS = {"ffn": FFN, "layer": FFN, "decode": MODEL, "prefill": MODEL, "train": TRAIN}


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(llama_cpp, "find", lambda: None)
    monkeypatch.setattr(roof, "_MATRIX", 64)


@pytest.mark.parametrize("kind", OPTIONS)
def test_document_and_file(kind, tmp_path, capsys):
    out = tmp_path / "result.json"
    assert main(["bench", kind, *OPTIONS[kind], "--json", "--out", str(out)]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads(out.read_text())
    assert printed["kind"] == f"bench {kind}"
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]


def test_table(capsys):
    assert main(["bench", "ffn", *FFN]) == 0
    text = capsys.readouterr().out
    for word in ("GB/s", "32x64", "dense", "moesaic", "transformers grouped_mm", "times the roof"):
        assert word in text
    assert "bfloat16 alone is compared" in text


def test_training_table(capsys):
    assert main(["bench", "train", *TRAIN]) == 0
    text = capsys.readouterr().out
    for word in ("1x24x32", "training all", "dense", "dsmoe", "hard-skip-0.5", "dense peak"):
        assert word in text


def test_table_marks_what_did_not_run_in_turns(capsys, monkeypatch):
    times = {"median_ms": 2.0, "low_ms": 1.0, "high_ms": 3.0, "faster_than_dense": 4.0}
    row = {"method": "llama.cpp Q8_0", **times, "times_roof": None, "interleaved": False}

    def around(time, *args, **options):
        roof_s, rows = time()
        return roof_s, [*rows, row]

    monkeypatch.setattr(llama_cpp, "around", around)
    assert main(["bench", "decode", *MODEL]) == 0
    lines = capsys.readouterr().out.splitlines()
    (line,) = [line.split() for line in lines if "llama.cpp" in line]
    assert line == ["llama.cpp", "Q8_0", "*", "2", "1", "-", "3", "4.00", "-"]
    assert any(line.startswith("* in a process of its own") for line in lines)


def test_a_wrong_peer_leaves_nothing(tmp_path, capsys, monkeypatch):
    def wrong(name, weights, num_slots):
        return lambda h_TD, *routing: torch.zeros_like(h_TD)

    monkeypatch.setattr(peers, "transformers_experts", wrong)
    out = tmp_path / "result.json"
    assert main(["bench", "ffn", *FFN, "--json", "--out", str(out)]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "moesaic: transformers eager differs from the float32 reference by 1 " in printed.err
    assert not out.exists()


def test_dry_run_does_nothing(capsys, monkeypatch):
    monkeypatch.setattr(ffn_file, "Limits", lambda *args: pytest.fail("worked"))
    assert main(["bench", "ffn", *FFN, "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["cells"] == 1
    assert main(["bench", "decode", *MODEL, "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["memory_bytes"] > 0
    assert main(["bench", "train", "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["seconds"] > 60


def test_wrong_input(tmp_path, capsys):
    assert main(["bench", "fnn"]) == 2
    assert "did you mean ffn" in capsys.readouterr().err
    assert main(["bench", "ffn", "--shape", "12"]) == 2
    assert "shape must be DxM" in capsys.readouterr().err
    assert main(["bench", "ffn", *FFN, "--out", str(tmp_path)]) == 2
    assert "is a directory" in capsys.readouterr().err
    assert main(["bench"]) == 2
