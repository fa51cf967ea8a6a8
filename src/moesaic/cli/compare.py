"""Compare methods or architectures under one protocol; the same command goes on."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console
from rich.table import Table

from moesaic._config import to_plain
from moesaic._errors import InputError, UnknownNameError
from moesaic._registry import unknown_name
from moesaic.analysis import board_verdicts, check_sentence, checks, forecasts, verdicts
from moesaic.cli._common import Overrides, parse, quiet_libraries, show
from moesaic.cli._progress import TerminalProgress
from moesaic.recipes.architectures import (
    ArchitectureCell,
    architecture_cells,
    build_architectures,
    compare_architectures,
    estimate_architectures,
    write_leaderboard,
)
from moesaic.recipes.comparison import (
    Cell,
    Selection,
    all_cells,
    build_protocol,
    cell_of,
    compare,
    estimate,
    select,
    write_comparison,
)
from moesaic.recipes.recipe import read_values
from moesaic.recipes.suggestion import suggest_cells


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Compare methods at the same measured active fraction; run it again to go on.

    A protocol of the kind `architectures` compares layers trained from scratch at equal FLOPs.

    Attributes:
        protocol: The YAML file, such as `bench/quality.yaml` or `bench/architectures.yaml`.
        out: Directory of the results and the report.
        only: Cells such as `method=flap active=0.5 seed=0 trained=false`, or `architecture=top-p
            seed=0`; values of one field add up, different fields narrow down.
        shard: `i/n`, to do the i-th of n parts; each part has a directory of its own.
        also: Directories of other parts, whose results the report takes in.
        redo: Measure cells that are done once more, or with `suggest` predict them once more.
        report: Write the report of what is there and measure nothing.
        suggest: Predict the cells of methods without training from short trials and measure
            nothing; the report then says how far predictions are off what was measured.
        set: Overrides such as `train.tokens=2000`.
        dry_run: List the cells and how long they take; do nothing.
        json: Print one JSON document.
    """

    protocol: tyro.conf.Positional[Path]
    out: Path
    only: tuple[str, ...] = ()
    shard: str = "1/1"
    also: tuple[Path, ...] = ()
    redo: bool = False
    report: bool = False
    suggest: bool = False
    set: Overrides = ()
    dry_run: bool = False
    json: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class _Kind:
    """What is done with a kind of protocol.

    Attributes:
        build: Plain data to a protocol.
        cells: All its cells.
        cell_class: What they are.
        estimate: Lists cells and how long they take.
        compare: Does cells.
        write: Writes the report.
        sentences: What it says, and what else is printed as JSON.
    """

    build: Callable[[dict[str, Any]], Any]
    cells: Callable[[Any], list[Any]]
    cell_class: type
    estimate: Callable[..., list[dict[str, Any]]]
    compare: Callable[..., list[dict[str, Any]]]
    write: Callable[..., tuple[Any, dict[str, str]]]
    sentences: Callable[[Any], tuple[list[str], dict[str, Any]]]


def _comparison_sentences(comparison: Any) -> tuple[list[str], dict[str, Any]]:
    found = checks(comparison)
    sentences = [*verdicts(comparison), *forecasts(comparison)]
    if found:
        sentences.append(check_sentence(found))
    if not comparison.predictions:
        return sentences, {}
    measured = {(check.method, check.budget): check.measured for check in found}
    return sentences, {
        "predictions": [
            {**to_plain(p), "measured": measured.get((p.method, p.budget))}
            for p in comparison.predictions
        ]
    }


_KINDS = {
    "methods": _Kind(
        build=build_protocol,
        cells=all_cells,
        cell_class=Cell,
        estimate=estimate,
        compare=compare,
        write=write_comparison,
        sentences=_comparison_sentences,
    ),
    "architectures": _Kind(
        build=build_architectures,
        cells=architecture_cells,
        cell_class=ArchitectureCell,
        estimate=estimate_architectures,
        compare=compare_architectures,
        write=write_leaderboard,
        sentences=lambda board: (board_verdicts(board), {}),
    ),
}


def run(argv: Sequence[str]) -> int:
    """Run the command."""
    options = parse(Options, argv, "compare")
    quiet_libraries()
    overrides = tuple(itertools.chain.from_iterable(options.set))
    values = read_values(options.protocol, "protocol", "model and methods", overrides)
    name = str(values.get("kind", "methods"))
    if name not in _KINDS:
        raise UnknownNameError(unknown_name("protocol.kind", name, _KINDS))
    kind, protocol = _KINDS[name], _KINDS[name].build(values)
    selection = Selection(only=options.only, shard=options.shard)
    cells = select(kind.cells(protocol), selection)
    if options.dry_run:
        _list(kind.estimate(protocol, options.out, cells), as_json=options.json)
        return 0
    failed: list[str] = []
    if options.suggest:
        if name != "methods":
            raise InputError(f"suggest must be off for protocol.kind {name!r}; leave it out")
        with TerminalProgress() as progress:
            suggest_cells(protocol, options.out, cells, progress=progress, redo=options.redo)
    elif not options.report:
        with TerminalProgress() as progress:
            lines = kind.compare(protocol, options.out, selection, progress, redo=options.redo)
        failed = [
            cell.key
            for line in lines
            if line["status"] == "error" and (cell := cell_of(line, kind.cell_class)) in cells
        ]
    reported, files = kind.write(protocol, options.out, options.also)
    sentences, more = kind.sentences(reported)
    _show(sentences, {**files, "failed": failed}, more, as_json=options.json)
    return int(bool(failed))


def _list(listed: list[dict[str, Any]], *, as_json: bool) -> None:
    """Print the cells of a dry run."""
    left = sum(cell["seconds"] for cell in listed if not cell["done"])
    if as_json:
        show({"cells": listed, "seconds": round(left, 1)}, as_json=True)
        return
    table = Table(*(listed[0] if listed else ()), box=None)
    for cell in listed:
        table.add_row(*(_written(value) for value in cell.values()))
    Console().print(table)
    show({"cells": len(listed), "seconds left": left}, as_json=False)


def _written(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return value if isinstance(value, str) else f"{value:,g}"


def _show(
    sentences: list[str], result: dict[str, Any], more: dict[str, Any], *, as_json: bool
) -> None:
    """Print the sentences of a report and where it is."""
    if as_json:
        show({**result, **more, "verdicts": sentences}, as_json=True)
        return
    for sentence in sentences:
        print(sentence)
    show({name: value for name, value in result.items() if value}, as_json=False)
