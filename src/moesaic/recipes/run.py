"""Run a recipe: every result whole on disk before the next step, so that a run can be cut anywhere.

A run directory belongs to one resolved recipe. A finished step is skipped; calibration, conversion
and training go on at their layer or step.
"""

from __future__ import annotations

import gc
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moesaic._config import to_plain
from moesaic._errors import InputError
from moesaic._files import read_json, require_space, write_json
from moesaic._progress import SILENT, Progress
from moesaic.analysis import write_report
from moesaic.calibration import CalibrationStats, calibrate
from moesaic.compression._table import COMPRESSIONS
from moesaic.conversion._table import CONVERSIONS
from moesaic.conversion.partition._base import validate_num_experts
from moesaic.data import DataSplit, load_documents, prepare
from moesaic.evaluation import Subject, evaluate, fastest_dtype
from moesaic.models.checkpoint import (
    add_step,
    check_weights,
    load,
    load_dense,
    load_tokenizer,
    new_manifest,
    read_config,
    read_manifest,
    save,
)
from moesaic.recipes.recipe import Recipe, Step
from moesaic.training.run import clean, train

logger = logging.getLogger(__name__)


class Run:
    """A recipe and the directory of its results.

    Args:
        recipe: What to do.
        progress: Told of every stage.
    """

    def __init__(self, recipe: Recipe, progress: Progress = SILENT) -> None:
        self.recipe = recipe
        self.progress = progress
        self.directory = recipe.output
        self.parent = recipe.output / "parent"

    def claim(self) -> None:
        """Make the directory ours, or refuse that of another recipe."""
        path = self.directory / "run.json"
        resolved = self.recipe.plain()
        if path.is_file():
            difference = _first_difference(read_json(path), resolved, "recipe")
            if difference:
                raise InputError(
                    f"{self.directory} holds a run with another {difference}; choose another "
                    "output or delete it"
                )
            return
        # A run killed while it wrote its first file left a temporary one, which is nobody's.
        found = self.directory.iterdir() if self.directory.exists() else ()
        if any(not (p.name.startswith(".run.json.") and p.suffix == ".tmp") for p in found):
            raise InputError(
                f"output {self.directory} is not empty and holds no run; choose another"
            )
        write_json(path, resolved)

    def place(self, index: int) -> Path:
        """Directory of a step."""
        return self.directory / f"{index + 1:02d}-{self.recipe.steps[index].kind}"

    def model_of(self, index: int) -> Path:
        """Checkpoint that a step made."""
        return self.place(index) / "model"

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Tokenizer of the parent."""
        return load_tokenizer(str(self.parent))

    def split(self) -> DataSplit:
        """The text, tokenized once."""
        return prepare(
            self.recipe.data, self.tokenizer(), self.directory / "data", progress=self.progress
        )

    def dense(self) -> PreTrainedModel:
        """The dense parent."""
        dtype = read_json(self.parent / "config.json")["dtype"]
        return load_dense(str(self.parent), dtype=dtype)

    def save_parent(self) -> None:
        """Keep the parent as it is meant here: dequantised and in one dtype."""
        if (self.parent / "moesaic.json").is_file():
            return
        dtype = self.recipe.dtype
        if dtype == "auto":
            dtype = fastest_dtype()
            logger.info("weights are %s, the fastest here", dtype)
        with self.progress.stage("load the parent", 1, "models") as stage:
            model = load_dense(self.recipe.model, dtype=dtype)
            manifest = new_manifest(self.recipe.model, model)
            save(model, self.parent, manifest, load_tokenizer(self.recipe.model))
            stage.advance()

    def stats(self) -> CalibrationStats | None:
        """Statistics of the parent, measured once for all steps."""
        collectors = self.recipe.collectors()
        if not collectors:
            return None
        return calibrate(
            self.dense(),
            self.split().train,
            collectors,
            self.recipe.calibration,
            self.directory / "calibration",
            self.progress,
        )

    def apply_method(self, index: int) -> None:
        """Convert or compress the parent."""
        step = self.recipe.steps[index]
        table = CONVERSIONS if step.kind == "convert" else COMPRESSIONS
        store = self.place(index) / "layers"
        model, results = table.load(step.method)(
            self.dense(), self.stats(), step.config, store=store, progress=self.progress
        )
        manifest = add_step(
            read_manifest(self.parent), f"{step.kind} {step.method}", to_plain(step.config), results
        )
        save(model, self.model_of(index), manifest, self.tokenizer())
        shutil.rmtree(store, ignore_errors=True)

    def apply_train(self, index: int) -> None:
        """Train the converted model."""
        step = self.recipe.steps[index]
        before = max(i for i in range(index) if self.recipe.steps[i].kind in ("convert", "train"))
        source = self.model_of(before)
        work = self.place(index) / "training"
        model, results = train(load(source), self.split().train, step.config, work, self.progress)
        shown = {name: value for name, value in results.items() if name != "log"}
        manifest = add_step(read_manifest(source), "train", to_plain(step.config), shown)
        write_json(self.place(index) / "log.json", results["log"])
        save(model, self.model_of(index), manifest, self.tokenizer())
        clean(work)

    def apply_evaluate(self, index: int) -> None:
        """Evaluate the latest model beside its parent and the baselines; write the report."""
        step = self.recipe.steps[index]
        subjects: dict[str, Subject] = {"dense": Subject(self.dense(), "dense", str(self.parent))}
        log: list[Any] = []
        manifest: Mapping[str, Any] = {}
        final: int | None = None
        for earlier in range(index):
            kind, method = self.recipe.steps[earlier].kind, self.recipe.steps[earlier].method
            path = self.model_of(earlier)
            if kind == "compress":
                subjects[method] = Subject(load(path), "static-pruning", str(path))
            elif kind in ("convert", "train"):
                final = earlier
                if kind == "train":
                    log.extend(read_json(self.place(earlier) / "log.json"))
        if final is not None:
            path = self.model_of(final)
            name = next(s.method for s in self.recipe.steps if s.kind == "convert")
            subjects[name] = Subject(load(path), name, str(path))
            manifest = read_manifest(path)
        record = evaluate(
            subjects,
            self.split().heldout,
            self.tokenizer(),
            step.config,
            self.progress,
            training=log,
            manifest=manifest,
        )
        write_json(self.place(index) / "record.json", record)
        write_report(record, self.directory / "report.html")


def plan(recipe: Recipe) -> dict[str, Any]:
    """Check a recipe against its model and text, before anything expensive, and say what it does.

    Returns:
        Plain data: the steps, the tokens that they read, and the disk and memory that they take.

    Raises:
        InputError: If a step cannot work.
    """
    config = read_config(recipe.model)
    check_weights(recipe.model)
    width = getattr(config, "intermediate_size", None) or getattr(config, "ffn_dim", None)
    width = width or getattr(config, "n_inner", None) or 4 * config.hidden_size
    for step in recipe.steps:
        if step.kind == "convert" and hasattr(step.config, "experts"):
            validate_num_experts(width, step.config.experts)
    reads = bool(recipe.collectors()) or any(s.kind in ("train", "evaluate") for s in recipe.steps)
    documents = load_documents(recipe.data) if reads else ()
    parameters = _parameters(config, width)
    size = 2 if recipe.dtype in ("bfloat16", "float16") else 4
    trains = any(step.kind == "train" for step in recipe.steps)
    models = 1 + sum(step.kind != "evaluate" for step in recipe.steps)
    disk = parameters * size * (models + (6 if trains else 0))
    if not (recipe.output / "run.json").is_file():
        require_space(recipe.output, disk, what="the run")
    return {
        "model": recipe.model,
        "output": str(recipe.output),
        "parameters": parameters,
        "documents": len(documents),
        "calibration_tokens": recipe.calibration.tokens if recipe.collectors() else 0,
        "train_tokens": sum(s.config.tokens for s in recipe.steps if s.kind == "train"),
        "steps": [next(iter(step.plain())) for step in recipe.steps],
        "disk_bytes": disk,
        "memory_bytes": parameters * size * (5 if trains else 3),
    }


def run_recipe(recipe: Recipe, progress: Progress = SILENT) -> dict[str, Any]:
    """Do every step that is not done yet.

    Args:
        recipe: What to do.
        progress: Told of every stage.

    Returns:
        Plain data: the directory, the final checkpoint, the record of the last evaluation and the
        report, where the recipe makes them.

    Raises:
        InputError: Before any work, if the recipe cannot work or its directory is another's.
    """
    plan(recipe)
    run = Run(recipe, progress)
    run.claim()
    run.save_parent()
    result: dict[str, Any] = {"output": str(recipe.output)}
    for index, step in enumerate(recipe.steps):
        place = run.place(index)
        if not (place / "done.json").is_file():
            _apply(run, index, step)
            write_json(place / "done.json", step.plain())
            gc.collect()
        if step.kind in ("convert", "train"):
            result["model"] = str(run.model_of(index))
        if step.kind == "evaluate":
            result["record"] = str(place / "record.json")
            result["report"] = str(recipe.output / "report.html")
    return result


def _apply(run: Run, index: int, step: Step) -> None:
    if step.kind == "train":
        run.apply_train(index)
    elif step.kind == "evaluate":
        run.apply_evaluate(index)
    else:
        run.apply_method(index)


def _first_difference(old: Any, new: Any, where: str) -> str:
    """Name the first place where two plain values differ; empty when they do not."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*new, *old]:
            if key not in old or key not in new:
                return f"{where}.{key}"
            if found := _first_difference(old[key], new[key], f"{where}.{key}"):
                return found
        return ""
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for index, (a, b) in enumerate(zip(old, new, strict=True)):
            if found := _first_difference(a, b, f"{where}[{index}]"):
                return found
        return ""
    return "" if old == new else f"{where} ({old!r}, not {new!r})"


def _parameters(config: Any, width: int) -> int:
    """Parameters of a decoder, near enough to plan with."""
    dim, layers = config.hidden_size, config.num_hidden_layers
    return int(config.vocab_size * dim * 2 + layers * (4 * dim * dim + 3 * dim * width))
