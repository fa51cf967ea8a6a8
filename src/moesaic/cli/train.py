"""Recover quality by self-distillation, at a requested budget."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import tyro

from moesaic._config import to_plain
from moesaic._errors import InputError
from moesaic.cli._common import parse, quiet_libraries, show
from moesaic.cli._progress import TerminalProgress
from moesaic.data import DataConfig, prepare
from moesaic.models.checkpoint import add_step, load, load_tokenizer, read_manifest, save
from moesaic.training import TrainConfig, train


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Train a converted model against its dense parent; run it again to resume.

    Attributes:
        model: A converted checkpoint.
        output: Directory of the trained checkpoint.
        train: Settings of the training.
        data: The text.
        dry_run: Check everything, say what would be done, do nothing.
        json: Print one JSON document.
    """

    model: tyro.conf.Positional[Path]
    output: tyro.conf.Positional[Path]
    train: TrainConfig = field(default_factory=TrainConfig)
    data: DataConfig = field(default_factory=DataConfig)
    dry_run: bool = False
    json: bool = False


def run(argv: Sequence[str]) -> int:
    """Run the command."""
    options = parse(Options, argv, "train")
    quiet_libraries()
    if options.output.exists():
        raise InputError(f"output {options.output} exists; delete it or choose another")
    manifest = read_manifest(options.model)
    tokenizer = load_tokenizer(str(options.model))
    work = options.output.with_name(f"{options.output.name}.partial")
    if options.dry_run:
        facts = {"model": str(options.model), "output": str(options.output)}
        show({**facts, "tokens": options.train.tokens}, as_json=options.json)
        return 0
    with TerminalProgress() as progress:
        text = prepare(options.data, tokenizer, work / "data", progress=progress).train
        model, results = train(load(options.model), text, options.train, work / "train", progress)
    log = results.pop("log")
    save(
        model,
        options.output,
        add_step(manifest, "train", to_plain(options.train), results),
        tokenizer,
    )
    shutil.rmtree(work)
    last = {name: log[-1][name] for name in ("loss", "active")}
    show({"output": str(options.output), **results, **last}, as_json=options.json)
    return 0
