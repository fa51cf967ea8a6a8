"""Recover quality by self-distillation, at a requested budget."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tyro

from moesaic._config import to_plain
from moesaic._errors import InputError
from moesaic._files import read_json, write_json
from moesaic.cli._common import parse, quiet_libraries, show
from moesaic.cli._progress import TerminalProgress
from moesaic.data import DataConfig, load_documents, prepare
from moesaic.models.checkpoint import (
    add_step,
    load,
    load_dense,
    load_parent,
    load_tokenizer,
    save,
    verify_files,
)
from moesaic.recipes.claim import claim, held, holds_run
from moesaic.recipes.plan import check_train
from moesaic.training import TrainConfig, train
from moesaic.training.health.history import NAME as HEALTH
from moesaic.training.teacher import is_own_teacher


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Train a converted or pruned model against its dense parent; run it again to resume.

    Attributes:
        model: A converted or pruned checkpoint.
        output: Directory of the trained checkpoint.
        teacher: The dense parent. If not given, the model itself with all gates on where that is
            its parent, and else the source that its manifest names.
        train: Settings of the training.
        data: The text.
        dry_run: Check everything, say what would be done, do nothing.
        json: Print one JSON document.
    """

    model: tyro.conf.Positional[Path]
    output: tyro.conf.Positional[Path]
    teacher: str = ""
    train: TrainConfig = field(default_factory=TrainConfig)
    data: DataConfig = field(default_factory=DataConfig)
    dry_run: bool = False
    json: bool = False


def run(argv: Sequence[str]) -> int:
    """Run the command."""
    options = parse(Options, argv, "train")
    quiet_libraries()
    manifest = verify_files(options.model)
    check_train(options.train, options.data.block)
    resolved = {
        "model": {name: entry["sha256"] for name, entry in manifest["files"].items()},
        "train": to_plain(options.train),
        "data": to_plain(options.data),
        **({"teacher": options.teacher} if options.teacher else {}),
    }
    work = options.output.with_name(f"{options.output.name}.partial")
    if options.output.exists():
        # An earlier run may have been cut between its last two acts.
        if not (work / "saved.json").is_file() or not holds_run(work, resolved):
            raise InputError(f"output {options.output} exists; delete it or choose another")
        results = read_json(work / "saved.json")
    elif options.dry_run:
        documents = load_documents(options.data)
        facts = {
            "model": str(options.model),
            "output": str(options.output),
            "documents": len(documents),
            "tokens": options.train.tokens,
        }
        show(facts, as_json=options.json)
        return 0
    else:
        with held(work):
            claim(work, resolved, "training")
            results = _train(options, manifest, work)
    # Before the last act, so that a run that was cut does it again.
    if (work / "train" / HEALTH).is_file():
        shutil.copyfile(work / "train" / HEALTH, options.output / HEALTH)
    shutil.rmtree(work)
    show({"output": str(options.output), **results}, as_json=options.json)
    return 0


def _train(options: Options, manifest: dict[str, Any], work: Path) -> dict[str, Any]:
    """Train, save, and return what to show."""
    tokenizer = load_tokenizer(str(options.model))
    with TerminalProgress() as progress:
        text = prepare(options.data, tokenizer, work / "data", progress=progress).train
        model = load(options.model)
        dtype = str(model.dtype).removeprefix("torch.")
        teacher = None
        if options.teacher:
            teacher = load_dense(options.teacher, dtype=dtype)
        elif options.train.needs_teacher and not is_own_teacher(model):
            teacher = load_parent(manifest, dtype=dtype)
        model, results = train(
            model, text, options.train, work / "train", progress, teacher=teacher
        )
    log = results.pop("log")
    shown = {**results, **{name: log[-1][name] for name in ("loss", "active")}}
    write_json(work / "saved.json", shown)
    save(
        model,
        options.output,
        add_step(manifest, "train", to_plain(options.train), results),
        tokenizer,
    )
    return shown
