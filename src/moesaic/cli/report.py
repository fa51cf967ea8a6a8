"""Turn an evaluation record into one HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from moesaic._errors import InputError
from moesaic._files import read_json
from moesaic.analysis import write_report
from moesaic.cli._common import parse, show


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Turn an evaluation record into one self-contained HTML page.

    Attributes:
        record: What `moesaic eval` or a recipe wrote.
        output: The page.
        json: Print one JSON document.
    """

    record: tyro.conf.Positional[Path]
    output: Path = Path("report.html")
    json: bool = False


def run(argv: Sequence[str]) -> int:
    """Run the command."""
    options = parse(Options, argv, "report")
    if not options.record.is_file():
        raise InputError(f"record {options.record} does not exist; make it with moesaic eval")
    write_report(read_json(options.record), options.output)
    show({"report": str(options.output)}, as_json=options.json)
    return 0
