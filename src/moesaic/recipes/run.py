"""Run a recipe: every result whole on disk before the next step, so that a run can be cut anywhere.

A run directory belongs to one resolved recipe. A finished step is skipped; calibration, conversion
and training go on at their layer or step.
"""

from __future__ import annotations

import gc
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moesaic._config import to_plain
from moesaic._errors import InputError
from moesaic._files import read_json, write_json
from moesaic._progress import SILENT, Progress
from moesaic.analysis import write_report
from moesaic.calibration import CalibrationStats, calibrate
from moesaic.compression._table import baseline_kind
from moesaic.data import DataSplit, prepare
from moesaic.evaluation import Subject, evaluate
from moesaic.models.checkpoint import (
    MANIFEST,
    add_step,
    load,
    load_tokenizer,
    read_manifest,
    save,
)
from moesaic.recipes.claim import claim, held
from moesaic.recipes.parent import keep_parent, open_parent
from moesaic.recipes.plan import plan
from moesaic.recipes.recipe import METHODS, Recipe, Step
from moesaic.training.run import clean, train
from moesaic.training.teacher import is_own_teacher


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
        claim(self.directory, self.recipe.plain(), "recipe")

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
        return open_parent(self.parent)

    def save_parent(self) -> None:
        """Keep the parent as it is meant here: dequantised and in one dtype."""
        keep_parent(self.recipe.model, self.recipe.dtype, self.parent, self.progress)

    def check_text(self) -> None:
        """Refuse, before a model is loaded, to calibrate on more text than there is."""
        if not self.recipe.collectors() or (self.parent / MANIFEST).is_file():
            return
        tokenizer = load_tokenizer(self.recipe.model)
        text = prepare(
            self.recipe.data, tokenizer, self.directory / "data", progress=self.progress
        ).train
        if self.recipe.calibration.tokens > text.num_tokens:
            raise InputError(
                f"calibration.tokens is {self.recipe.calibration.tokens}, the text has "
                f"{text.num_tokens}; lower calibration.tokens, raise data.max_tokens_per_domain or "
                "give more text"
            )

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

    def mixture_before(self, index: int) -> Path:
        """Checkpoint of the mixture that a step starts from."""
        made = (i for i in range(index) if self.recipe.steps[i].makes_mixture)
        last = max(made, default=None)
        return self.parent if last is None else self.model_of(last)

    def apply_method(self, index: int) -> None:
        """Convert or compress the parent, or change the mixture that is there."""
        step = self.recipe.steps[index]
        store = self.place(index) / "layers"
        source = self.mixture_before(index) if step.from_mixture else self.parent
        model = load(source) if step.from_mixture else self.dense()
        # Statistics are of the dense parent.
        stats = None if step.from_mixture else self.stats()
        model, results = METHODS[step.kind].load(step.method)(
            model, stats, step.config, store=store, progress=self.progress
        )
        manifest = add_step(
            read_manifest(source), f"{step.kind} {step.method}", to_plain(step.config), results
        )
        save(model, self.model_of(index), manifest, self.tokenizer())

    def apply_train(self, index: int) -> None:
        """Train the converted model."""
        step = self.recipe.steps[index]
        source = self.mixture_before(index)
        work = self.place(index) / "training"
        model = load(source)
        asks = step.config.needs_teacher and not is_own_teacher(model)
        model, results = train(
            model,
            self.split().train,
            step.config,
            work,
            self.progress,
            teacher=self.dense() if asks else None,
        )
        shown = {name: value for name, value in results.items() if name != "log"}
        manifest = add_step(read_manifest(source), "train", to_plain(step.config), shown)
        write_json(self.place(index) / "log.json", results["log"])
        save(model, self.model_of(index), manifest, self.tokenizer())

    def tidy(self, index: int) -> None:
        """Delete what only an unfinished step needs; called when it is known to be finished."""
        shutil.rmtree(self.place(index) / "layers", ignore_errors=True)
        if self.recipe.steps[index].kind == "train":
            clean(self.place(index) / "training")

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
            if self.recipe.steps[earlier].makes_mixture:
                final = earlier
                if kind == "train":
                    log.extend(read_json(self.place(earlier) / "log.json"))
            elif kind == "compress":
                subjects[method] = Subject(load(path), baseline_kind(method), str(path))
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
    with held(recipe.output):
        return _steps(Run(recipe, progress))


def _steps(run: Run) -> dict[str, Any]:
    """Do the work of a run whose directory nobody else works in."""
    run.claim()
    run.check_text()
    run.save_parent()
    result: dict[str, Any] = {"output": str(run.directory)}
    for index, step in enumerate(run.recipe.steps):
        place = run.place(index)
        if not (place / "done.json").is_file():
            _apply(run, index, step)
            write_json(place / "done.json", step.plain())
            gc.collect()
        # Not only now: an earlier run may have been cut before this.
        run.tidy(index)
        if step.makes_mixture:
            result["model"] = str(run.model_of(index))
        if step.kind == "evaluate":
            result["record"] = str(place / "record.json")
            result["report"] = str(run.directory / "report.html")
    return result


def _apply(run: Run, index: int, step: Step) -> None:
    if step.kind == "train":
        run.apply_train(index)
    elif step.kind == "evaluate":
        run.apply_evaluate(index)
    else:
        run.apply_method(index)
