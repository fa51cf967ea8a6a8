"""Measure speed beside peers and beside the physical limit of this machine."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import tyro
from rich.console import Console
from rich.table import Table

from moesaic._errors import InputError, UnknownNameError
from moesaic._files import write_json
from moesaic._registry import unknown_name
from moesaic.cli._common import parse, quiet_libraries, show
from moesaic.cli._progress import TerminalProgress


class _Kind(NamedTuple):
    """A benchmark: module, names of its settings and functions, what it measures, and its extra."""

    module: str
    config: str
    measure: str
    cost: str
    summary: str
    extra: str = ""


_KINDS = {
    "ffn": _Kind(
        "ffn",
        "FfnConfig",
        "bench_ffn",
        "ffn_cost",
        "one sparse feed-forward network with its router, each token with exactly K experts",
    ),
    "layer": _Kind(
        "layer",
        "FfnConfig",
        "bench_layer",
        "ffn_cost",
        "one layer whose gates let the number of experts vary by token",
    ),
    "decode": _Kind(
        "models",
        "ModelConfig",
        "bench_decode",
        "model_bench_cost",
        "a whole model, greedy decoding at batch size 1",
    ),
    "prefill": _Kind(
        "models",
        "ModelConfig",
        "bench_prefill",
        "model_bench_cost",
        "a whole model, the reading of a prompt",
    ),
    "gguf": _Kind(
        "gguf",
        "GgufConfig",
        "bench_gguf",
        "gguf_bench_cost",
        "a mosaic and its dense parent as GGUF files in llama.cpp: decoding and a prompt",
    ),
    "train": _Kind(
        "train",
        "TrainBenchConfig",
        "bench_train",
        "train_bench_cost",
        "a training step, its time and memory: dense, DSMoE as published, and with skipping",
    ),
    "runtimes": _Kind(
        "runtimes.bench",
        "RuntimesConfig",
        "bench_runtimes",
        "runtimes_cost",
        "dense and DSMoE in transformers, moesaic, vLLM and llama.cpp: perplexity and speed",
    ),
    "serve": _Kind(
        "serve.bench",
        "ServeBenchConfig",
        "bench_serve",
        "serve_bench_cost",
        "moesaic serve and vllm serve over HTTP beside our engine in process",
        extra="serve",
    ),
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """Measure ours and its peers in turns, each checked for correctness first.

    Attributes:
        out: File for the JSON document.
        dry_run: Say how many cells there are, how long they take and what memory they need.
        json: Print one JSON document.
    """

    out: Path | None = None
    dry_run: bool = False
    json: bool = False


def run(argv: Sequence[str]) -> int:
    """Run the command."""
    if not argv or argv[0] in ("-h", "--help"):
        print(_help())
        return 0 if argv else 2
    name, *rest = argv
    if name not in _KINDS:
        raise UnknownNameError(unknown_name("benchmark", name, _KINDS))
    kind = _KINDS[name]
    try:
        module = importlib.import_module(f"moesaic.evaluation.bench.{kind.module}")
    except ImportError as error:
        if not kind.extra:
            raise
        raise ImportError(
            f"moesaic bench {name} needs {error.name}; pip install 'moesaic[{kind.extra}]'"
        ) from error
    options: Any = parse(_with_settings(getattr(module, kind.config)), rest, f"bench {name}")
    if options.out is not None and options.out.is_dir():
        raise InputError(f"out {options.out} is a directory; name a file")
    quiet_libraries()
    if options.dry_run:
        show(getattr(module, kind.cost)(options.settings), as_json=options.json)
        return 0
    with TerminalProgress() as progress:
        result = getattr(module, kind.measure)(options.settings, progress)
    if options.out is not None:
        write_json(options.out, result)
    if options.json:
        show(result, as_json=True)
    else:
        _print(result)
    return 0


def _with_settings(config: type) -> type:
    """Add the settings of a benchmark to the options, under their own names."""
    settings: Any = Annotated[config, tyro.conf.arg(name="")]
    return dataclasses.make_dataclass(
        "BenchOptions",
        [("settings", settings, field(default_factory=config))],
        bases=(Options,),
        namespace={"__doc__": Options.__doc__},
        frozen=True,
        kw_only=True,
    )


def _help() -> str:
    lines = [f"  {name:<8}  {kind.summary}" for name, kind in _KINDS.items()]
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
    line = f"{machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}"
    if roof is not None:
        peaks = ", ".join(f"{name} {rate / 1e9:.0f}" for name, rate in roof["flops_per_s"].items())
        line += (
            f": reads {roof['read_bytes_per_s'] / 1e9:.1f} GB/s, copies "
            f"{roof['copy_bytes_per_s'] / 1e9:.1f} GB/s, GFLOP/s {peaks}"
        )
    console.print(line)
    for cell in result["cells"]:
        console.print(_TABLES.get(result["kind"], _roof_table)(cell))


def _roof_table(cell: dict[str, Any]) -> Table:
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
        caption_justify="left",
    )
    for row in cell["rows"]:
        if "skipped" in row:
            table.add_row(row["method"], "-", row["skipped"])
            continue
        roof = "-" if row["times_roof"] is None else f"{row['times_roof']:.2f}"
        table.add_row(*_times(row), roof)
        if not row.get("interleaved", True):
            table.caption = "* in a process of its own, before and after the others; not checked"
    return table


def _training_table(cell: dict[str, Any]) -> Table:
    table = Table(
        "method",
        "median ms",
        "quartiles",
        "times faster than dense",
        "active",
        "peak MB",
        "times the dense peak",
        title=(
            f"{cell['shape']} {cell['dtype']}, {cell['tokens']} tokens, {cell['experts']} "
            f"experts, training {cell['trains']}"
        ),
        box=None,
        title_justify="left",
    )
    for row in cell["rows"]:
        memory = ["-", "-"]
        if "peak_bytes" in row:
            memory = [f"{row['peak_bytes'] / 1e6:.0f}", f"{row['memory_ratio']:.2f}"]
        table.add_row(*_times(row), f"{row['active']:.3g}", *memory)
    return table


def _runtimes_table(cell: dict[str, Any]) -> Table:
    many = str(cell["requests"])
    table = Table(
        "runtime",
        "model",
        "perplexity",
        "tokens as ours",
        "tokens/s, 1 request",
        f"{many} requests",
        title=f"{cell['mosaic']} {cell['dtype']}",
        box=None,
        title_justify="left",
    )
    for row in cell["rows"]:
        if "skipped" in row:
            table.add_row(row["runtime"], row["model"], "-", row["skipped"])
            continue
        same, rates = row["same_as_ours"], row["tokens_per_s"]
        table.add_row(
            row["runtime"],
            row["model"],
            f"{row['perplexity']:.4g}",
            "-" if same is None else f"{same['tokens']:.0%}",
            f"{rates['1']['median']:.3g}",
            f"{rates[many]['median']:.3g}",
        )
    return table


def _serve_table(cell: dict[str, Any]) -> Table:
    table = Table(
        *("way", "requests", "tokens/s", "of the engine", "first token ms, p50", "p95"),
        "texts as the engine",
        title=(
            f"{cell['model']} {cell['weights']}, prompts of {cell['prompt_tokens']} tokens, "
            f"answers of {cell['tokens']}"
        ),
        caption="\n".join(
            f"{row['way']}: {row['skipped']}" for row in cell["rows"] if "skipped" in row
        ),
        box=None,
        title_justify="left",
        caption_justify="left",
    )
    for row in cell["rows"]:
        if "skipped" in row:
            continue
        for count, found in row["requests"].items():
            table.add_row(
                row["way"],
                count,
                f"{found['tokens_per_s']:.3g}",
                f"{found['of_engine']:.0%}",
                f"{1e3 * found['first_p50_s']:.3g}",
                f"{1e3 * found['first_p95_s']:.3g}",
                f"{row['same_as_engine']:.0%}",
            )
    return table


def _times(row: dict[str, Any]) -> tuple[str, ...]:
    return (
        row["method"] + ("" if row.get("interleaved", True) else " *"),
        f"{row['median_ms']:.3g}",
        f"{row['low_ms']:.3g} - {row['high_ms']:.3g}",
        f"{row['faster_than_dense']:.2f}",
    )


def _file_table(cell: dict[str, Any]) -> Table:
    table = Table(
        *("method", "median ms", "quartiles", "times faster than dense", "tokens/s"),
        title=(
            f"{cell['shape']} {cell['weights']}, {cell['test']} of {cell['tokens']} tokens, "
            f"{cell['experts']} experts, {cell['active']:.3g} active"
        ),
        box=None,
        title_justify="left",
    )
    for row in cell["rows"]:
        table.add_row(*_times(row), f"{row['tokens_per_s']:.3g}")
    return table


_TABLES = {
    "bench train": _training_table,
    "bench gguf": _file_table,
    "bench runtimes": _runtimes_table,
    "bench serve": _serve_table,
}
