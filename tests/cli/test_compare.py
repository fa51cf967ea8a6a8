"""`moesaic compare`: its options, what it prints, and its exit codes."""

import json

import pytest
import yaml
from recipe_cases import write_model, write_text

from moesaic.cli.main import main
from moesaic.recipes import comparison
from moesaic.recipes.architectures import compare_architectures
from moesaic.recipes.comparison.process import Outcome, do_piece


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("compare")
    write_model(root / "dense")
    write_text(root / "text")
    return root


@pytest.fixture
def protocol(root, tmp_path, monkeypatch):
    """A protocol, and pieces that are done in this process."""
    monkeypatch.setitem(
        comparison.compare.__kwdefaults__, "run", lambda piece, log, bar: do_piece(piece, bar)
    )
    values = {
        "model": str(root / "dense"),
        "data": {"sources": [f"notes={root / 'text'}"], "block": 32},
        "calibration": {"tokens": 128},
        "heldout": {"blocks_per_domain": 2},
        "budgets": [0.75, 0.5],
        "seeds": [0],
        "trained": [False],
        "methods": {"flap": {"compress": "flap", "options": {"multiple": 1}}},
    }
    path = tmp_path / "p.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_sentences_and_report(protocol, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["compare", str(protocol), "--out", str(out), "--only", "active=0.5"]) == 0
    text = capsys.readouterr().out
    assert "At 0.5 active without training, only flap was measured: " in text
    assert "At 0.75 active without training no method was measured" in text
    assert (out / "report.html").is_file()
    assert (out / "report.md").is_file()
    assert main(["compare", str(protocol), "--out", str(out), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["report"] == str(out / "report.html")
    assert len(result["verdicts"]) == 2
    assert result["failed"] == []


def test_dry_run(protocol, tmp_path, capsys):
    argv = ["compare", str(protocol), "--out", str(tmp_path / "out"), "--dry-run"]
    assert main([*argv, "--json", "--set", "budgets=[0.5]"]) == 0
    (cell,) = json.loads(capsys.readouterr().out)["cells"]
    assert (cell["method"], cell["active"], cell["done"]) == ("flap", 0.5, False)
    assert cell["seconds"] >= 0
    assert main(argv) == 0
    assert "seconds left" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_a_failed_cell_is_exit_code_1(protocol, tmp_path, capsys, monkeypatch):
    def run(piece, log, progress):
        if "cell" in piece:
            return Outcome(status="error", reason="it broke")
        return do_piece(piece, progress)

    monkeypatch.setitem(comparison.compare.__kwdefaults__, "run", run)
    argv = ["compare", str(protocol), "--out", str(tmp_path / "out"), "--json"]
    assert main([*argv, "--only", "active=0.5"]) == 1
    assert json.loads(capsys.readouterr().out)["failed"] == ["flap-0.5-seed0"]
    assert "it broke" in (tmp_path / "out" / "report.md").read_text()


def test_wrong_input(protocol, tmp_path, capsys):
    out = ["--out", str(tmp_path / "out")]
    for argv, message in (
        (["compare", "nowhere.yaml", *out], "protocol nowhere.yaml does not exist"),
        (["compare", str(protocol), *out, "--only", "method=flip"], "did you mean flap"),
        (["compare", str(protocol), *out, "--shard", "5"], "shard must be i/n"),
        (["compare", str(protocol), *out, "--report"], "holds no results of this protocol"),
        (["compare", str(protocol)], "out"),
        (
            ["compare", str(protocol), *out, "--dry-run", "--set", "calibration.tokens=8"],
            "at least one block of 32, got 8",
        ),
    ):
        assert main(argv) == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        assert message in printed.err


def test_architectures_have_the_same_command(root, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(
        compare_architectures.__kwdefaults__, "run", lambda piece, log, bar: do_piece(piece, bar)
    )
    values = {
        "kind": "architectures",
        "model": {"dim": 16, "num_layers": 1, "num_heads": 2, "num_kv_heads": 2, "width": 32},
        "data": {"sources": [f"notes={root / 'text'}"], "block": 32},
        "heldout": {"blocks_per_domain": 2},
        "train": {"tokens": 64},
        "device": "cpu",
        "seeds": [0],
        "architectures": {"dense": {}, "top-2": {"experts": 4, "router": "topk-softmax"}},
    }
    path, out = tmp_path / "a.yaml", tmp_path / "out"
    path.write_text(yaml.safe_dump(values))
    argv = ["compare", str(path), "--out", str(out)]
    assert main([*argv, "--dry-run"]) == 0
    assert "architecture" in capsys.readouterr().out
    assert main([*argv, "--only", "architecture=top-2"]) == 0
    assert "After 64 tokens top-2 has the lowest loss" in capsys.readouterr().out
    assert main([*argv, "--report", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["report"] == str(out / "report.html")
    assert "one seed" in result["verdicts"][1]
    assert main([*argv, "--only", "method=top-2"]) == 2
    assert "field of a cell 'method' is unknown" in capsys.readouterr().err
    assert main([*argv, "--suggest"]) == 2
    assert "suggest must be off" in capsys.readouterr().err
    assert main([*argv, "--set", "kind=archtectures"]) == 2
    assert "'archtectures' is unknown; did you mean architectures" in capsys.readouterr().err
