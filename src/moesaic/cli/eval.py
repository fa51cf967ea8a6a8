"""Measure models beside their dense parent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import tyro

from moesaic._errors import InputError
from moesaic._files import write_json
from moesaic.analysis import write_report
from moesaic.cli._common import parse, quiet_libraries, show, show_table
from moesaic.cli._progress import TerminalProgress
from moesaic.compression._table import baseline_kind
from moesaic.data import DataConfig, prepare
from moesaic.evaluation import EvaluationConfig, Subject, check_tasks, evaluate, evaluate_tasks
from moesaic.models.checkpoint import load, load_dense, load_tokenizer, verify_files


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Measure quality, cost and speed of converted models beside their dense parent.

    Attributes:
        dense: The dense parent.
        models: Converted or pruned checkpoints.
        output: Where the record goes; its report lies beside it.
        tasks: lm-eval tasks, or .jsonl files of multiple-choice questions.
        evaluation: Settings.
        data: The text; only its held-out part is read.
        json: Print one JSON document.
    """

    dense: tyro.conf.Positional[str]
    models: tyro.conf.Positional[tuple[Path, ...]]
    output: Path
    tasks: tuple[str, ...] = ()
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    data: DataConfig = field(default_factory=DataConfig)
    json: bool = False


def run(argv: Sequence[str]) -> int:
    """Run the command."""
    options = parse(Options, argv, "eval")
    quiet_libraries()
    manifests = {path: verify_files(path) for path in options.models}
    if len({path.name for path in options.models}) < len(options.models):
        raise InputError("models must differ in the name of their directory; rename one")
    if options.tasks:
        check_tasks(options.tasks)
    tokenizer = load_tokenizer(options.dense)
    with TerminalProgress() as progress:
        text = prepare(options.data, tokenizer, progress=progress).heldout
    subjects = {"dense": Subject(load_dense(options.dense), "dense", options.dense)}
    for path, manifest in manifests.items():
        step = manifest["steps"][0]["step"] if manifest["steps"] else ""
        method = step.rpartition(" ")[2]
        kind = baseline_kind(method) if step.startswith("compress") else method
        subjects[path.name] = Subject(load(path, verify=False), kind or "unknown", str(path))
    manifest = next(reversed(manifests.values()), {})
    with TerminalProgress() as progress:
        record = evaluate(
            subjects, text, tokenizer, options.evaluation, progress, manifest=manifest
        )
    if options.tasks:
        for entry, subject in zip(record["models"], subjects.values(), strict=True):
            found = evaluate_tasks(subject.model, tokenizer, options.tasks)
            entry["tasks"] = {name: task.metrics for name, task in found.items()}
    write_json(options.output, record)
    report = options.output.with_suffix(".html")
    write_report(record, report)
    if not options.json:
        show_table(record)
    show({"record": str(options.output), "report": str(report)}, as_json=options.json)
    return 0
