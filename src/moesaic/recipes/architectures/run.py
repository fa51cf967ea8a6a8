"""Run a comparison of architectures and write its leaderboard.

Cells, lines, shards and resumption are those of `moesaic.recipes.comparison`, whose parts this
puts together in the same order. What differs: nothing is read of a dense parent and nothing is
calibrated, since every cell starts from fresh weights, and a width is matched to the cost first.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

from moesaic._errors import InputError
from moesaic._files import write_text
from moesaic._progress import SILENT, Progress
from moesaic.analysis import Leaderboard, leaderboard_markdown, render_leaderboard
from moesaic.evaluation.machine import flops_per_s
from moesaic.recipes.architectures.cells import ArchitectureCell, architecture_cells
from moesaic.recipes.architectures.matching import count, dense_model
from moesaic.recipes.architectures.measure import matched, resolved, tokenizer_of
from moesaic.recipes.architectures.protocol import ArchitectureProtocol
from moesaic.recipes.comparison.cells import Selection, select
from moesaic.recipes.comparison.grid import Grid, Runner, fill, gather_lines, list_cells
from moesaic.recipes.comparison.process import run_piece
from moesaic.recipes.plan import check_train

# Forward and backward against one forward.
_TRAINING_PASSES = 3
# Small products, and experts one by one, run far below the rate of one large product.
_EFFICIENCY = 0.1


def compare_architectures(
    protocol: ArchitectureProtocol,
    directory: Path,
    selection: Selection | None = None,
    progress: Progress = SILENT,
    *,
    redo: bool = False,
    run: Runner = run_piece,
) -> list[dict[str, Any]]:
    """Train architectures from fresh weights and measure those that are not measured yet.

    A cell is one architecture with one seed; `moesaic.recipes.comparison.compare` instead changes
    one dense model by methods and budgets. Both go on, run again, inside the cell they were in.

    Args:
        protocol: What is compared.
        directory: Of the results.
        selection: Which of the cells; all if none.
        progress: Told of every stage and every cell.
        redo: Whether to measure the selected cells again that are done.
        run: Does a piece of work; see `moesaic.recipes.comparison.process`.

    Returns:
        The lines of the directory.

    Raises:
        InputError: Before any work, if the protocol cannot work or the directory is another's.
    """
    cells = select(architecture_cells(protocol), selection or Selection())
    check_train(protocol.train, protocol.data.block)
    return fill(grid_of(protocol), directory, cells, progress, redo=redo, run=run)


def grid_of(protocol: ArchitectureProtocol) -> Grid:
    """The protocol as cells that can be done one by one."""
    find = cache(partial(matched, protocol))

    def settings(cell: ArchitectureCell) -> dict[str, Any]:
        try:
            return resolved(protocol, cell, find(cell.architecture))
        except InputError as error:
            return {"refused": str(error)}

    return Grid(
        protocol=protocol,
        cells=architecture_cells(protocol),
        settings=settings,
        obstacle=lambda cell: settings(cell).get("refused", ""),
        needs=lambda cells: {},
        facts=lambda cell: {"sees_batch": protocol.architectures[cell.architecture].sees_batch},
    )


def estimate_architectures(
    protocol: ArchitectureProtocol, directory: Path, cells: Sequence[ArchitectureCell]
) -> list[dict[str, Any]]:
    """Say how long cells will take, and which are done.

    From cells of the same architecture in this directory where there are some; else from the
    counted FLOPs at the rate of this machine's CPU.
    """
    check_train(protocol.train, protocol.data.block)
    dense = dense_model(protocol, len(tokenizer_of(protocol.tokenizer)))
    token_flops = _TRAINING_PASSES * count(dense, 0.0).flops
    seconds = protocol.train.tokens * token_flops / (_EFFICIENCY * flops_per_s())
    return list_cells(
        grid_of(protocol),
        directory,
        cells,
        guess=lambda cell: seconds,
        kin=lambda cell: cell.architecture,
    )


def write_leaderboard(
    protocol: ArchitectureProtocol, directory: Path, others: Sequence[Path] = ()
) -> tuple[Leaderboard, dict[str, str]]:
    """Write the leaderboard: a page for people and a table for documents.

    Args:
        protocol: What is compared.
        directory: Of results; `report.html` and `report.md` go there.
        others: Directories of other shards, whose results count too.

    Returns:
        What is reported, and the two files.
    """
    board = Leaderboard(
        protocol=protocol.plain(), lines=gather_lines(grid_of(protocol), [directory, *others])
    )
    files = {
        "report": (directory / "report.html", render_leaderboard(board)),
        "markdown": (directory / "report.md", leaderboard_markdown(board)),
    }
    for path, text in files.values():
        write_text(path, text)
    return board, {name: str(path) for name, (path, _) in files.items()}
