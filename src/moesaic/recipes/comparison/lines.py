"""What a comparison found: files of JSON lines, one for each finished cell or prediction.

The file is always whole: a line is added by writing it anew beside its place and renaming it, so a
run that is killed loses the cell it was in and nothing else.
"""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

from moesaic._errors import CheckpointError
from moesaic._files import write_text
from moesaic.recipes.comparison.cells import Cell

RESULTS = "results.jsonl"
# What short trials said of cells before they were measured.
PREDICTIONS = "predictions.jsonl"


def read_lines(directory: Path, kind: type = Cell, name: str = RESULTS) -> list[dict[str, Any]]:
    """Read the lines of a file in a directory; none if there are none yet.

    Args:
        directory: Where they are.
        kind: What their cells are.
        name: Of the file.

    Raises:
        CheckpointError: If a line was edited into something else.
    """
    path = directory / name
    if not path.is_file():
        return []
    lines = []
    for number, text in enumerate(path.read_text("utf-8").splitlines(), start=1):
        try:
            line = json.loads(text)
            cell_of(line, kind)
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{path}, line {number}, is no line of a cell ({error!r}); delete the line"
            ) from error
        lines.append(line)
    return lines


def cell_of(line: dict[str, Any], kind: type = Cell) -> Any:
    """The cell, of some kind, that a line is about."""
    return kind(**{f.name: line[f.name] for f in fields(kind)})


def add_line(directory: Path, line: dict[str, Any], kind: type = Cell, name: str = RESULTS) -> None:
    """Add the line of a cell to a file; an earlier one of the same cell goes."""
    cell = cell_of(line, kind)
    kept = [old for old in read_lines(directory, kind, name) if cell_of(old, kind) != cell]
    text = "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in [*kept, line])
    write_text(directory / name, text)
