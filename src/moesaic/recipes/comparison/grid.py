"""Cells done one by one, each in a process of its own, its line on disk before the next begins.

It knows nothing of what a cell measures, so every kind of protocol runs by it.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from moesaic._errors import InputError, RunError
from moesaic._progress import Progress
from moesaic.recipes.claim import claim, held, holds_run
from moesaic.recipes.comparison.lines import RESULTS, add_line, cell_of, read_lines
from moesaic.recipes.comparison.process import Outcome

logger = logging.getLogger(__name__)

Runner = Callable[[dict[str, Any], Path, Progress], Outcome]
_ABSENT = object()


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """A protocol as cells.

    Attributes:
        protocol: Has `plain`, itself as data, and `common`, what a directory belongs to.
        cells: All of them, frozen dataclasses with `key`, `seed` and `plain`.
        settings: What decides the result of a cell, as data; a line that has others is no result.
        obstacle: Why a cell cannot be done, in one sentence; empty if it can.
        needs: What must be made for some cells before them, as data of a piece of work.
        facts: What the line of a cell says that was not measured.
        defaults: Of settings that are mappings, what a key has that a line does not name, since
            the line is older than the key.
    """

    protocol: Any
    cells: Sequence[Any]
    settings: Callable[[Any], dict[str, Any]]
    obstacle: Callable[[Any], str]
    needs: Callable[[Sequence[Any]], dict[str, Any]]
    facts: Callable[[Any], dict[str, Any]]
    defaults: Callable[[Any], dict[str, Mapping[str, Any]]] = lambda cell: {}

    @property
    def cell_class(self) -> type:
        """What its cells are."""
        return type(self.cells[0])

    def lines(self, directory: Path, name: str = RESULTS) -> dict[Any, dict[str, Any]]:
        """The lines of a file in a directory, by their cells."""
        cell_class = self.cell_class
        return {cell_of(line, cell_class): line for line in read_lines(directory, cell_class, name)}

    def is_current(self, cell: Any, line: Mapping[str, Any]) -> bool:
        """Whether the present settings gave a line."""
        defaults = self.defaults(cell)
        for name, value in self.settings(cell).items():
            if not _same(line.get(name, _ABSENT), value, defaults.get(name, {})):
                return False
        return True

    def is_done(self, lines: Mapping[Any, dict[str, Any]], cell: Any) -> bool:
        """Whether a cell has a line that is no error and that its present settings gave."""
        line = lines.get(cell)
        return line is not None and line["status"] != "error" and self.is_current(cell, line)


def _same(found: Any, value: Any, defaults: Any) -> bool:
    """Whether a line says of a setting what is set; what it does not name had its default."""
    if not isinstance(found, Mapping) or not isinstance(value, Mapping):
        return bool(found == value)
    known = defaults if isinstance(defaults, Mapping) else {}
    return found.keys() <= value.keys() and all(
        _same(found.get(key, known.get(key, _ABSENT)), value[key], known.get(key)) for key in value
    )


def fill(
    grid: Grid,
    directory: Path,
    cells: Sequence[Any],
    progress: Progress,
    *,
    redo: bool,
    run: Runner,
) -> list[dict[str, Any]]:
    """Do cells that are not done yet, or with `redo` all of them; returns the directory's lines.

    Raises:
        InputError: If the directory is another's.
        RunError: If what cells share cannot be made.
    """
    with held(directory):
        claim(directory, grid.protocol.common(), "protocol")
        results = grid.lines(directory)
        pending = [cell for cell in cells if redo or not grid.is_done(results, cell)]
        if redo:
            for cell in pending:
                shutil.rmtree(directory / "cells" / cell.key, ignore_errors=True)
        _work(grid, directory, pending, progress, run)
        return read_lines(directory, grid.cell_class)


def _work(
    grid: Grid, directory: Path, cells: Sequence[Any], progress: Progress, run: Runner
) -> None:
    """Do cells one by one; those that cannot be done first, since they take no time."""
    runnable = []
    for cell in cells:
        if reason := grid.obstacle(cell):
            _add(grid, directory, cell, Outcome(status="refused", reason=reason))
        else:
            runnable.append(cell)
    if not runnable:
        return
    piece = {"directory": str(directory), "protocol": grid.protocol.plain()}
    log = directory / "logs" / "shared.log"
    made = run({**piece, **grid.needs(runnable)}, log, progress)
    if made.status != "done":
        raise RunError(f"what the cells share cannot be made: {made.reason}")
    with progress.stage("cells", len(runnable), "cells") as stage:
        for cell in runnable:
            start = time.monotonic()
            log = directory / "logs" / f"{cell.key}.log"
            outcome = run({**piece, "cell": cell.plain()}, log, progress)
            _add(grid, directory, cell, outcome, time.monotonic() - start)
            stage.advance()


def _add(grid: Grid, directory: Path, cell: Any, outcome: Outcome, seconds: float = 0.0) -> None:
    """Write the line of a cell."""
    line = outcome.value
    if line is None:
        line = {
            **cell.plain(),
            "status": outcome.status,
            "reason": outcome.reason,
            **grid.settings(cell),
            **grid.facts(cell),
            "seconds": {},
        }
        logger.warning("%s: %s, %s", cell.key, outcome.status, outcome.reason)
    line["seconds"]["total"] = round(seconds, 2)
    add_line(directory, line, grid.cell_class)


def list_cells(
    grid: Grid,
    directory: Path,
    cells: Sequence[Any],
    guess: Callable[[Any], float],
    kin: Callable[[Any], Hashable],
) -> list[dict[str, Any]]:
    """Say how long cells will take, and which are done.

    Args:
        grid: Of the cells.
        directory: Of the results; it need not exist.
        cells: Which to list.
        guess: Seconds of a cell, where nothing like it was measured here.
        kin: What cells that take alike have in common.

    Returns:
        Plain data, one entry for each cell.
    """
    results = grid.lines(directory)
    measured: dict[Hashable, list[float]] = {}
    for cell, line in results.items():
        # What went on after an interruption says what its last part took.
        if line["status"] == "done" and not line["resumed"]:
            measured.setdefault(kin(cell), []).append(line["seconds"]["total"])
    listed = []
    for cell in cells:
        known = measured.get(kin(cell))
        seconds = mean(known) if known else guess(cell)
        done = grid.is_done(results, cell)
        listed.append({**cell.plain(), "done": done, "seconds": round(seconds, 1)})
    return listed


def gather_lines(
    grid: Grid, directories: Sequence[Path], name: str = RESULTS
) -> list[dict[str, Any]]:
    """Bring the current lines of directories together, as those of shards, in order of cells.

    Raises:
        InputError: If a directory holds the results of another protocol, or none.
    """
    lines: dict[Any, dict[str, Any]] = {}
    wanted = set(grid.cells)
    for directory in directories:
        if not holds_run(directory, grid.protocol.common()):
            raise InputError(
                f"{directory} holds no results of this protocol; give a directory that it wrote"
            )
        for cell, line in grid.lines(directory, name).items():
            # Of two lines of a cell the one that says something counts.
            better = cell not in lines or lines[cell]["status"] != "done"
            if cell in wanted and better and grid.is_current(cell, line):
                lines[cell] = line
    return [lines[cell] for cell in grid.cells if cell in lines]
