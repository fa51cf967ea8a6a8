"""The results of a comparison: a file of JSON lines, one for each finished cell.

The file is always whole: a line is added by writing it anew beside its place and renaming it, so a
run that is killed loses the cell it was in and nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

from moesaic._errors import CheckpointError
from moesaic._files import write_text
from moesaic.recipes.comparison.cells import Cell

NAME = "results.jsonl"


def read_lines(directory: Path, kind: type = Cell) -> list[dict[str, Any]]:
    """Read the results of a directory; none if there are none yet.

    Args:
        directory: Where they are.
        kind: What their cells are.

    Raises:
        CheckpointError: If a line was edited into something else.
    """
    path = directory / NAME
    if not path.is_file():
        return []
    lines = []
    for number, text in enumerate(path.read_text("utf-8").splitlines(), start=1):
        try:
            line = json.loads(text)
            cell_of(line, kind)
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{path}, line {number}, is no result of a cell ({error!r}); delete the line"
            ) from error
        lines.append(line)
    return lines


def cell_of(line: dict[str, Any], kind: type = Cell) -> Any:
    """The cell, of some kind, that a line is the result of."""
    return kind(**{f.name: line[f.name] for f in fields(kind)})


def add_line(directory: Path, line: dict[str, Any], kind: type = Cell) -> None:
    """Add the result of a cell; an earlier one of the same cell goes."""
    cell = cell_of(line, kind)
    kept = [old for old in read_lines(directory, kind) if cell_of(old, kind) != cell]
    write_lines(directory, [*kept, line])


def write_lines(directory: Path, lines: Iterable[dict[str, Any]]) -> None:
    """Replace the file as a whole."""
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    write_text(directory / NAME, text)
