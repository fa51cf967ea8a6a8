"""Compare methods under one protocol; the same command goes on."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console
from rich.table import Table

from moesaic._config import to_plain
from moesaic.analysis import Comparison, check_sentence, checks, verdicts
from moesaic.cli._common import Overrides, parse, quiet_libraries, show
from moesaic.cli._progress import TerminalProgress
from moesaic.recipes.comparison import (
    Selection,
    all_cells,
    cell_of,
    compare,
    estimate,
    read_protocol,
    select,
    write_comparison,
)
from moesaic.recipes.suggestion import suggest_cells


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Compare methods at the same measured active fraction; run it again to go on.

    Attributes:
        protocol: The YAML file, such as `bench/quality.yaml`.
        out: Directory of the results and the report.
        only: Cells such as `method=flap active=0.5 seed=0 trained=false`; values of one field add
            up, different fields narrow down.
        shard: `i/n`, to do the i-th of n parts; each part has a directory of its own.
        also: Directories of other parts, whose results the report takes in.
        redo: Measure cells that are done once more.
        report: Write the report of what is there and measure nothing.
        suggest: Predict the cells without training from short trials and measure nothing; the
            report then says how far predictions are off what was measured.
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


def run(argv: Sequence[str]) -> int:
    """Run the command."""
    options = parse(Options, argv, "compare")
    quiet_libraries()
    overrides = tuple(itertools.chain.from_iterable(options.set))
    protocol = read_protocol(options.protocol, overrides)
    selection = Selection(only=options.only, shard=options.shard)
    cells = select(all_cells(protocol), selection)
    if options.dry_run:
        listed = estimate(protocol, options.out, cells)
        _list(listed, as_json=options.json)
        return 0
    failed: list[str] = []
    if options.suggest:
        with TerminalProgress() as progress:
            suggest_cells(protocol, options.out, cells, progress=progress)
    elif not options.report:
        with TerminalProgress() as progress:
            lines = compare(protocol, options.out, selection, progress, redo=options.redo)
        failed = [
            cell.key
            for line in lines
            if line["status"] == "error" and (cell := cell_of(line)) in cells
        ]
    comparison, files = write_comparison(protocol, options.out, options.also)
    _show(comparison, {**files, "failed": failed}, as_json=options.json)
    return int(bool(failed))


def _list(listed: list[dict[str, Any]], *, as_json: bool) -> None:
    """Print the cells of a dry run."""
    left = sum(cell["seconds"] for cell in listed if not cell["done"])
    if as_json:
        show({"cells": listed, "seconds": round(left, 1)}, as_json=True)
        return
    table = Table("method", "active", "seed", "trained", "done", "seconds", box=None)
    for cell in listed:
        table.add_row(
            cell["method"],
            f"{cell['active']:g}",
            str(cell["seed"]),
            "yes" if cell["trained"] else "no",
            "yes" if cell["done"] else "no",
            f"{cell['seconds']:,.0f}",
        )
    Console().print(table)
    show({"cells": len(listed), "seconds left": left}, as_json=False)


def _show(comparison: Comparison, result: dict[str, Any], *, as_json: bool) -> None:
    """Print the sentences of a comparison and where its report is."""
    sentences = verdicts(comparison)
    compared = checks(comparison)
    if compared:
        sentences.append(check_sentence(compared))
        result = {**result, "predictions": [to_plain(check) for check in compared]}
    if as_json:
        show({**result, "verdicts": sentences}, as_json=True)
        return
    for sentence in sentences:
        print(sentence)
    hidden = ("predictions",)
    show({n: value for n, value in result.items() if value and n not in hidden}, as_json=False)
