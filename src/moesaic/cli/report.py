"""Turn an evaluation record, or the history of a training's experts, into one HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from moesaic._errors import InputError
from moesaic._files import read_json
from moesaic.analysis import health_summary, read_health, write_health, write_report
from moesaic.cli._common import parse, show


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Turn an evaluation record into one self-contained HTML page.

    `moesaic report health DIR` draws the history of a training's experts.

    Attributes:
        record: What `moesaic eval` or a recipe wrote.
        output: The page.
        json: Print one JSON document.
    """

    record: tyro.conf.Positional[Path]
    output: Path = Path("report.html")
    json: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class HealthOptions:
    """Draw loads, dead experts, entropy and saturation of a training as one HTML page.

    Attributes:
        run: Directory of the run, or its health.jsonl.
        output: The page.
        json: Print one JSON document.
    """

    run: tyro.conf.Positional[Path]
    output: Path = Path("health.html")
    json: bool = False


def run(argv: Sequence[str]) -> int:
    """Run the command."""
    if argv and argv[0] == "health":
        return _health(argv[1:])
    options = parse(Options, argv, "report")
    if not options.record.is_file():
        raise InputError(f"record {options.record} does not exist; make it with moesaic eval")
    write_report(read_json(options.record), options.output)
    show({"report": str(options.output)}, as_json=options.json)
    return 0


def _health(argv: Sequence[str]) -> int:
    options = parse(HealthOptions, argv, "report health")
    lines = read_health(options.run)
    write_health(lines, options.output)
    show({**health_summary(lines), "report": str(options.output)}, as_json=options.json)
    return 0
