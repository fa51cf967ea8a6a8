"""Recipes: strict parsing, every step, and `kill -9` at any moment."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from recipe_cases import recipe_values, write_recipe
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from moesaic._errors import InputError
from moesaic._files import read_json
from moesaic.compression._table import COMPRESSIONS
from moesaic.models import load
from moesaic.recipes import plan, read_recipe, run_recipe
from moesaic.recipes.claim import held
from moesaic.recipes.plan import estimate_parameters
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
    "train tokens": (
        lambda v: v["steps"][2]["train"].update(tokens=32),
        "train.tokens must be at least one step of 64, got 32",
    ),
    "speed": (
        lambda v: v["steps"][3]["evaluate"].update(
            measure_speed=True, speed={"prefill_tokens": 600}
        ),
        "evaluate.speed.prefill_tokens must be at most the 512 positions",
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
        "moesaic.recipes.parent.load_dense", lambda *a, **k: pytest.fail("a model was loaded")
    )
    with pytest.raises(InputError, match=message):
        run_recipe(read_recipe(path))
    assert not (tmp_path / "run").exists()


def test_too_much_calibration_is_refused_before_a_model_is_loaded(tmp_path, monkeypatch):
    path = write_recipe(tmp_path)
    monkeypatch.setattr(
        "moesaic.recipes.parent.load_dense", lambda *a, **k: pytest.fail("a model was loaded")
    )
    with pytest.raises(InputError, match=r"calibration.tokens is 1000000, the text has \d+"):
        run_recipe(read_recipe(path, ["calibration.tokens=1000000"]))
    monkeypatch.undo()
    # Nothing was finished, so the corrected recipe may have the directory.
    recipe = read_recipe(path, ["steps=[{convert: {experts: 4, fit_steps: 3}}]"])
    assert run_recipe(recipe)["model"].endswith("01-convert/model")


def test_what_a_killed_writer_left_is_no_obstacle(tmp_path):
    path = write_recipe(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".run.json.1.tmp").write_text("{")
    recipe = read_recipe(path, ["steps=[{convert: {experts: 4, preset: paper}}]"])
    (tmp_path / "run" / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="not empty and holds no run"):
        run_recipe(recipe)
    assert {p.name for p in (tmp_path / "run").iterdir()} == {".run.json.1.tmp", "mine.txt"}
    (tmp_path / "run" / "mine.txt").unlink()
    run_recipe(recipe)
    assert not list((tmp_path / "run").glob(".*.tmp"))


def test_a_directory_serves_one_process(tmp_path):
    path = write_recipe(tmp_path)
    (tmp_path / "run").mkdir()
    with held(tmp_path / "run"), pytest.raises(InputError, match="another process works in"):
        run_recipe(read_recipe(path))


def test_a_run_cut_while_it_tidied_up_ends_the_same(tmp_path):
    recipe = read_recipe(write_recipe(tmp_path))
    result = run_recipe(recipe)
    before = weights(tmp_path)
    for step in ("03-train", "04-evaluate"):
        (tmp_path / "run" / step / "done.json").unlink()
    # Half a checkpoint, as a cut deletion leaves it.
    half = tmp_path / "run" / "03-train" / "training" / "checkpoint-4"
    half.mkdir()
    (half / "optimizer.pt").write_bytes(b"")
    assert run_recipe(recipe) == result
    assert all(tensor.equal(before[name]) for name, tensor in weights(tmp_path).items())
    assert not list((tmp_path / "run").rglob("*checkpoint-*"))


def test_overrides_by_step_and_place(tmp_path):
    values = recipe_values(tmp_path)
    values["steps"].insert(3, {"train": {"tokens": 64}})
    path = write_recipe(tmp_path, values)
    with pytest.raises(InputError, match=r"may mean 2 steps; say which with steps.2.train or"):
        read_recipe(path, ["train.tokens=64"])
    recipe = read_recipe(
        path,
        [
            "steps.3.train.learning_rate=1e-4",
            "convert.router.threshold=0.4",
            f"data.sources.0=x={tmp_path / 'text'}",
        ],
    )
    assert recipe.steps[3].config.learning_rate == 1e-4
    assert recipe.steps[0].config.router.threshold == 0.4
    assert recipe.data.sources == (f"x={tmp_path / 'text'}",)
    with pytest.raises(InputError, match="names 'train', which the recipe does not have"):
        read_recipe(path, ["steps=[convert]", "train.tokens=64"])


def test_yaml_is_read_as_it_is_meant(tmp_path):
    path = tmp_path / "r.yaml"
    text = "model: a\noutput: b\nsteps:\n- convert\n- train: {learning_rate: 1e-4}\n"
    path.write_text(text)
    assert read_recipe(path).steps[1].config.learning_rate == 1e-4
    path.write_text(text + "model: c\n")
    with pytest.raises(InputError, match="the option 'model' stands a second time in line 6"):
        read_recipe(path)


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


def test_what_a_config_tells_is_refused_before_any_work(tmp_path):
    values = recipe_values(tmp_path)
    values["steps"] = [{"compress": {"method": "llm-pruner-channel", "active": 0.7}}]
    with pytest.raises(InputError, match=r"active=0.7 leaves \d+ of \d+ channels, which must be a"):
        run_recipe(read_recipe(write_recipe(tmp_path, values)))
    assert not (tmp_path / "run").exists()
    # The number of experts that it leaves open is no wrong one.
    values["steps"] = [{"convert": {"method": "moefication"}}]
    assert plan(read_recipe(write_recipe(tmp_path, values)))["steps"] == ["convert"]


def test_every_compression_is_a_step_and_is_evaluated(tmp_path):
    """One calibration serves them all; a result that is dense still is loaded like the others."""
    values = recipe_values(tmp_path)
    from_dense = [name for name, info in COMPRESSIONS.items() if "mixture" not in info.abilities]
    values["steps"] = [
        *({"compress": {"method": name, "active": 0.5}} for name in from_dense),
        values["steps"][-1],
    ]
    result = run_recipe(read_recipe(write_recipe(tmp_path, values)))
    record = read_json(Path(result["record"]))
    assert [entry["name"] for entry in record["models"]] == ["dense", *from_dense]
    kinds = {entry["name"]: entry["kind"] for entry in record["models"]}
    assert (kinds["flap"], kinds["teal"]) == ("static-pruning", "activation-sparsity")
    # A baseline is not what the report is about.
    assert record["activation"] == {}
    assert all(entry["quality"]["ratio"] > 0 for entry in record["models"])
    assert not list((tmp_path / "run").rglob("layers"))


def test_a_mixture_is_compressed_on_the_way_and_trained_on(tmp_path):
    values = recipe_values(tmp_path)
    convert, _, train, evaluate = values["steps"]
    del train["train"]["active"]
    latent = {"compress": {"method": "latent-experts", "group_size": 4}}
    values["steps"] = [convert, latent, train, evaluate]
    result = run_recipe(read_recipe(write_recipe(tmp_path, values)))
    record = read_json(Path(result["record"]))
    steps = [step["step"] for step in record["manifest"]["steps"]]
    assert steps == ["convert dsmoe", "compress latent-experts", "train"]
    # It is the model that the report is about, and no baseline beside it.
    assert [(one["name"], one["kind"]) for one in record["models"]] == [
        ("dense", "dense"),
        ("dsmoe", "dsmoe"),
    ]
    assert load(result["model"]).config.moesaic["layers"][0]["experts"] == "latent-gated"


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([], r"model '.*dense' is dense, latent-experts changes the experts of a mixture; convert"),
        (["convert"], r"recipe.steps has convert after latent-experts, whose model is a mixture"),
    ],
    ids=["dense", "convert after"],
)
def test_a_compression_of_mixtures_needs_one(steps, message, tmp_path):
    values = recipe_values(tmp_path)
    values["steps"] = [{"compress": {"method": "latent-experts"}}, *steps]
    with pytest.raises(InputError, match=message):
        run_recipe(read_recipe(write_recipe(tmp_path, values)))
    assert not (tmp_path / "run").exists()


def test_a_compression_of_mixtures_waits_for_one(tmp_path):
    values = recipe_values(tmp_path)
    values["steps"] = [values["steps"][1], {"compress": {"method": "latent-experts"}}]
    with pytest.raises(InputError, match=r"has latent-experts before any convert; put convert"):
        read_recipe(write_recipe(tmp_path, values))


@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_head_is_planned_for_once(tied):
    sizes = {"hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, vocab_size=500, num_attention_heads=2, tie_word_embeddings=tied)
    count = sum(p.numel() for p in LlamaForCausalLM(config).parameters())
    assert estimate_parameters(config) == pytest.approx(count, rel=0.02)
