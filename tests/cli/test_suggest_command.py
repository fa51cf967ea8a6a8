"""`moesaic convert --suggest` and `moesaic compare --suggest`: what they say and leave."""

import json

import pytest
import yaml
from recipe_cases import write_model, write_text

from moesaic.calibration import run as calibration
from moesaic.cli.main import main
from moesaic.recipes import comparison
from moesaic.recipes.comparison.process import do_piece

METHODS = ("dsmoe", "dsmoe-thresholds", "flap", "wanda", "teal", "neuron-bound", "block-bound")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("suggest")
    write_model(root / "dense")
    write_text(root / "text")
    return root


@pytest.fixture
def command(root):
    """The command up to its output, and the rest of it."""
    rest = ["--data.sources", f"notes={root / 'text'}", "--data.block", "32"]
    rest += ["--calibration.tokens", "256", "--experts", "4", "--fit-steps", "3"]
    return ["convert", str(root / "dense")], rest


def test_a_conversion_takes_up_what_a_suggestion_calibrated(command, tmp_path, capsys, monkeypatch):
    start, rest = command
    out = tmp_path / "out"
    argv = [*start, str(out), *rest, "--suggest", "--budgets", "0.5", "0.75"]
    assert main([*argv, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["conversion"], result["budgets"]) == ("dsmoe", [0.75, 0.5])
    assert [(p["method"], p["budget"]) for p in result["predictions"]] == [
        (method, budget) for method in METHODS for budget in (0.75, 0.5)
    ]
    assert all(p["low"] <= p["ratio"] <= p["high"] for p in result["predictions"])
    assert result["advice"][0].startswith("Without training, predicted to lose least: ")
    assert not out.exists()
    assert (tmp_path / "out.suggested" / "calibration" / "layer_001.safetensors").is_file()

    def walk(*args, **options):
        raise AssertionError("the text is read a second time")

    monkeypatch.setattr(calibration, "_walk", walk)
    assert main(argv) == 0
    text = capsys.readouterr().out
    assert "0.75 active" in text
    assert "flap (static)" in text
    # Any budget: a suggestion is about all of them.
    assert main([*start, str(out), *rest, "--active", "0.6"]) == 0
    assert (out / "moesaic.json").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_another_calibration_is_not_taken_up(command, tmp_path, capsys):
    start, rest = command
    out = tmp_path / "out"
    assert main([*start, str(out), *rest, "--suggest", "--budgets", "0.5"]) == 0
    assert main([*start, str(out), *rest, "--calibration.tokens", "128"]) == 0
    assert (out / "moesaic.json").is_file()
    assert (tmp_path / "out.suggested").is_dir()


def test_without_output_nothing_is_left(command, tmp_path, capsys, monkeypatch):
    start, rest = command
    monkeypatch.chdir(tmp_path)
    assert main([*start, *rest, "--suggest", "--budgets", "0.5"]) == 0
    assert "Without training" in capsys.readouterr().out
    assert main([*start, *rest, "--suggest", "--dry-run", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["suggest"] == [0.75, 0.625, 0.5, 0.375, 0.25]
    assert not list(tmp_path.iterdir())


def test_wrong_input(command, capsys):
    start, rest = command
    assert main([*start, *rest, "--suggest", "--budgets", "1.5"]) == 2
    assert "budgets must be in (0, 1), got 1.5" in capsys.readouterr().err
    assert main(["compress", start[1], "out", "--suggest"]) == 2
    assert "--suggest" in capsys.readouterr().err


def test_a_comparison_says_how_far_predictions_are_off(root, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(
        comparison.compare.__kwdefaults__, "run", lambda piece, log, bar: do_piece(piece, bar)
    )
    path, out = tmp_path / "p.yaml", tmp_path / "out"
    path.write_text(
        yaml.safe_dump(
            {
                "model": str(root / "dense"),
                "data": {"sources": [f"notes={root / 'text'}"], "block": 32},
                "calibration": {"tokens": 256},
                "heldout": {"blocks_per_domain": 16},
                "budgets": [0.75],
                "seeds": [0],
                "trained": [False],
                "methods": {"flap": {"compress": "flap", "options": {"multiple": 1}}},
            }
        )
    )
    argv = ["compare", str(path), "--out", str(out)]
    assert main([*argv, "--suggest"]) == 0
    said = capsys.readouterr().out
    assert "predictions were within" not in said
    assert "At 0.75 active without training, predicted and not measured: flap 1." in said
    assert main(argv) == 0
    said = capsys.readouterr().out
    assert "not measured: " not in said
    assert "1 of 1 predictions were within 15%" in said
    assert main([*argv, "--report", "--json"]) == 0
    (check,) = json.loads(capsys.readouterr().out)["predictions"]
    assert (check["method"], check["budget"]) == ("flap", 0.75)
    assert check["ratio"] == pytest.approx(check["measured"], rel=0.15)
    assert "### Predicted from short trials" in (out / "report.md").read_text()
