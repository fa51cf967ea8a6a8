"""Recipes: strict parsing, every step, and `kill -9` at any moment."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
from recipe_cases import recipe_values, write_recipe
from safetensors.torch import load_file

from moesaic._errors import InputError
from moesaic._files import read_json
from moesaic.models import load
from moesaic.recipes import plan, read_recipe, run_recipe
from moesaic.recipes.run import Run


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    root = tmp_path_factory.mktemp("whole")
    result = run_recipe(read_recipe(write_recipe(root)))
    return root, result


def weights(root):
    files = sorted((root / "run" / "03-train" / "model").glob("*.safetensors"))
    return {name: t for file in files for name, t in load_file(file).items()}


def test_a_recipe_makes_all_that_it_says(finished):
    root, result = finished
    record = read_json(root / "run" / "04-evaluate" / "record.json")
    assert [entry["name"] for entry in record["models"]] == ["dense", "flap", "dsmoe"]
    assert record["models"][0]["quality"]["ratio"] == 1.0
    assert len(record["training"]) == 4
    steps = [step["step"] for step in record["manifest"]["steps"]]
    assert steps == ["convert dsmoe", "train"]
    assert "<svg" in (root / "run" / "report.html").read_text()
    assert load(result["model"]).config.model_type == "moesaic_llama"
    # Nothing of the work is left but the results.
    assert not list((root / "run").rglob("checkpoint-*"))
    assert not list((root / "run").rglob("layers"))


def test_a_finished_run_does_nothing_more(finished, monkeypatch):
    root, result = finished
    monkeypatch.setattr("moesaic.recipes.run._apply", lambda *a: pytest.fail("a step ran again"))
    assert run_recipe(read_recipe(root / "recipe.yaml")) == result


def test_another_recipe_is_refused_with_the_difference(finished):
    root, _ = finished
    changed = read_recipe(root / "recipe.yaml", ["steps.convert.experts=2"])
    with pytest.raises(InputError, match=r"another recipe.steps\[0\].convert.experts \(4, not 2\)"):
        run_recipe(changed)


# Files whose appearance says that a stage is under way.
MOMENTS = {
    "parent": "parent/moesaic.json",
    "calibration": "calibration/layer_000.safetensors",
    "conversion": "01-convert/layers/layer_000.safetensors",
    "training": "03-train/training/metrics.jsonl",
    "checkpoint": "03-train/training/checkpoint-2/trainer_state.json",
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_runs_end_the_same(moment, finished, tmp_path):
    whole_root, _ = finished
    recipe = write_recipe(tmp_path)
    process = subprocess.Popen(
        [sys.executable, "-m", "moesaic.cli.main", "run", str(recipe)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    while process.poll() is None and not (tmp_path / "run" / MOMENTS[moment]).exists():
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the run was over before it could be killed"
    run_recipe(read_recipe(recipe))
    mine, theirs = weights(tmp_path), weights(whole_root)
    assert mine.keys() == theirs.keys()
    for name in mine:
        assert mine[name].equal(theirs[name]), name
    records = [read_json(r / "run" / "04-evaluate" / "record.json") for r in (tmp_path, whole_root)]
    assert records[0]["training"] == records[1]["training"]
    assert [m["quality"] for m in records[0]["models"]] == [
        m["quality"] for m in records[1]["models"]
    ]


def test_overrides(tmp_path):
    path = write_recipe(tmp_path)
    recipe = read_recipe(path, ["steps.train.tokens=64", "dtype=auto", "data.block=16"])
    assert recipe.steps[2].config.tokens == 64
    assert (recipe.dtype, recipe.data.block) == ("auto", 16)
    assert plan(recipe)["train_tokens"] == 64
    assert not (tmp_path / "run").exists()


def broken(change):
    def make(root):
        values = recipe_values(root)
        change(values)
        return values

    return make


BROKEN = {
    "unknown key": (
        lambda v: v.update(modle="x"),
        "recipe option 'modle' is unknown; did you mean",
    ),
    "unknown step": (lambda v: v["steps"].append({"trian": {}}), "did you mean train"),
    "unknown method": (
        lambda v: v["steps"][0]["convert"].update(method="dsmoo"),
        "conversion 'dsmoo' is unknown; did you mean dsmoe",
    ),
    "unknown option": (
        lambda v: v["steps"][0]["convert"].update(expert=4),
        "option 'expert' is unknown; did you mean experts",
    ),
    "unknown preset": (
        lambda v: v["steps"][0]["convert"].update(preset="papre"),
        "preset 'papre' is unknown; did you mean paper",
    ),
    "no mapping": (
        lambda v: v["steps"].append({"compress": "flap"}),
        "must be a mapping of options, got 'flap'",
    ),
    "experts": (lambda v: v["steps"][0]["convert"].update(experts=7), "experts=7 does not divide"),
    "active": (
        lambda v: v["steps"][0]["convert"].update(active=1.5),
        r"active must be in \(0, 1\]",
    ),
    "kind": (lambda v: v["steps"][2]["train"].update(tokens="many"), "train.tokens must be a int"),
    "no steps": (lambda v: v.update(steps=[]), "at least one step"),
    "order": (lambda v: v["steps"].reverse(), "train before any convert"),
    "missing data": (
        lambda v: v["data"].update(sources=["nowhere/at.txt"]),
        "nowhere/at.txt",
    ),
    "missing model": (lambda v: v.update(model="./nowhere"), "model directory ./nowhere does not"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_wrong_recipe_is_refused_before_any_work(name, tmp_path, monkeypatch):
    change, message = BROKEN[name]
    write_recipe(tmp_path)
    values = broken(change)(tmp_path)
    path = write_recipe(tmp_path, values)
    monkeypatch.setattr(
        "moesaic.recipes.run.load_dense", lambda *a, **k: pytest.fail("a model was loaded")
    )
    with pytest.raises(InputError, match=message):
        run_recipe(read_recipe(path))
    assert not (tmp_path / "run").exists()


def test_a_recipe_that_is_no_yaml(tmp_path):
    (tmp_path / "r.yaml").write_text("steps: [")
    with pytest.raises(InputError, match="is not YAML"):
        read_recipe(tmp_path / "r.yaml")
    (tmp_path / "r.yaml").write_text(json.dumps([1]))
    with pytest.raises(InputError, match="must be a mapping"):
        read_recipe(tmp_path / "r.yaml")
    with pytest.raises(InputError, match="does not exist"):
        read_recipe(tmp_path / "none.yaml")


def test_a_run_killed_at_its_first_file_goes_on(tmp_path):
    recipe = read_recipe(write_recipe(tmp_path))
    recipe.output.mkdir()
    (recipe.output / ".run.json.77.tmp").write_text("{")
    Run(recipe).claim()
    assert read_json(recipe.output / "run.json") == recipe.plain()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="is not empty and holds no run"):
        Run(read_recipe(tmp_path / "recipe.yaml", [f"output={tmp_path / 'other'}"])).claim()


def test_one_router_setting_keeps_the_others(tmp_path):
    path = write_recipe(tmp_path)
    whole = read_recipe(path).steps[0].config
    moved = read_recipe(path, ["steps.convert.router.threshold=0.4"]).steps[0].config
    assert moved == replace(whole, router=replace(whole.router, threshold=0.4))


def test_text_is_not_read_where_no_step_needs_it(tmp_path):
    values = recipe_values(tmp_path)
    values["steps"] = [{"convert": {"preset": "paper", "experts": 4}}]
    values["data"] = {"sources": ["nowhere.txt"]}
    assert plan(read_recipe(write_recipe(tmp_path, values)))["documents"] == 0
