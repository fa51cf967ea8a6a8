"""Measure speed beside peers and beside the physical limit of this machine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.table import Table

from moesaic._errors import InputError, UnknownNameError
from moesaic._files import write_json
from moesaic._registry import unknown_name
from moesaic.cli._common import parse, quiet_libraries, show
from moesaic.cli._progress import TerminalProgress
from moesaic.evaluation.bench.ffn import FfnConfig, bench_ffn, ffn_cost
from moesaic.evaluation.bench.layer import bench_layer

_SUMMARIES = {
    "ffn": "one sparse feed-forward network with its router, each token with exactly K experts",
    "layer": "one layer whose gates let the number of experts vary by token",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Measure every combination of the lists: ours and its peers in turns, checked first.

    Attributes:
        bench: What is measured.
        out: File for the JSON document.
        dry_run: Say how many combinations there are, how long they take and what memory they need.
        json: Print one JSON document.
    """

    bench: Annotated[FfnConfig, tyro.conf.arg(name="")]
    out: Path | None = None
    dry_run: bool = False
    json: bool = False


def run(argv: Sequence[str]) -> int:
    """Run the command."""
    if not argv or argv[0] in ("-h", "--help"):
        print(_help())
        return 0 if argv else 2
    kind, *rest = argv
    if kind not in _SUMMARIES:
        raise UnknownNameError(unknown_name("benchmark", kind, _SUMMARIES))
    options = parse(Options, rest, f"bench {kind}")
    if options.out is not None and options.out.is_dir():
        raise InputError(f"out {options.out} is a directory; name a file")
    if options.dry_run:
        show(ffn_cost(options.bench), as_json=options.json)
        return 0
    quiet_libraries()
    measure: dict[str, Callable[..., dict[str, Any]]] = {"ffn": bench_ffn, "layer": bench_layer}
    with TerminalProgress() as progress:
        result = measure[kind](options.bench, progress)
    if options.out is not None:
        write_json(options.out, result)
    if options.json:
        show(result, as_json=True)
    else:
        _print(result)
    return 0


def _help() -> str:
    lines = [f"  {name:<8}  {summary}" for name, summary in _SUMMARIES.items()]
    return "\n".join(
        [
            "usage: moesaic bench KIND [options]",
            "",
            "Measure speed beside peers and beside the physical limit of this machine.",
            "",
            *lines,
            "",
            "Options: --out FILE, --dry-run, --json; moesaic bench KIND --help says more.",
        ]
    )


def _print(result: dict[str, Any]) -> None:
    """Print a table per cell."""
    console = Console(width=None if Console().is_terminal else 110)
    roof, machine = result["roof"], result["machine"]
    peaks = ", ".join(f"{name} {rate / 1e9:.0f}" for name, rate in roof["flops_per_s"].items())
    console.print(
        f"{machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}: reads "
        f"{roof['read_bytes_per_s'] / 1e9:.1f} GB/s, copies {roof['copy_bytes_per_s'] / 1e9:.1f} "
        f"GB/s, GFLOP/s {peaks}"
    )
    for cell in result["cells"]:
        table = Table(
            "method",
            "median ms",
            "quartiles",
            "times faster than dense",
            "times the roof",
            title=(
                f"{cell['shape']} {cell['dtype']}, {cell['tokens']} tokens, {cell['experts']} "
                f"experts, {cell['active']:.3g} active; roof {cell['roof_ms']:.3g} ms"
            ),
            box=None,
            title_justify="left",
        )
        for row in cell["rows"]:
            if "skipped" in row:
                table.add_row(row["method"], "-", row["skipped"])
                continue
            table.add_row(
                row["method"],
                f"{row['median_ms']:.3g}",
                f"{row['low_ms']:.3g} - {row['high_ms']:.3g}",
                f"{row['faster_than_dense']:.2f}",
                f"{row['times_roof']:.2f}",
            )
        console.print(table)
