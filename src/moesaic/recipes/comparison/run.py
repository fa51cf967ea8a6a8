"""Run a comparison: every cell in a process of its own, its line on disk before the next begins."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from moesaic._config import build_config, plain_defaults, to_plain
from moesaic._errors import InputError
from moesaic._files import read_json, write_text
from moesaic._progress import SILENT, Progress
from moesaic.analysis import (
    Comparison,
    comparison_markdown,
    predictions_markdown,
    render_comparison,
)
from moesaic.analysis.suggestion import Prediction
from moesaic.evaluation.machine import flops_per_s
from moesaic.models.architectures import ARCHITECTURES
from moesaic.models.checkpoint import check_weights, read_config
from moesaic.recipes.comparison.cells import Cell, Selection, all_cells, select
from moesaic.recipes.comparison.grid import Grid, Runner, fill, gather_lines, list_cells
from moesaic.recipes.comparison.lines import PREDICTIONS
from moesaic.recipes.comparison.measure import resolved
from moesaic.recipes.comparison.pairs import paired
from moesaic.recipes.comparison.process import run_piece
from moesaic.recipes.comparison.protocol import Protocol
from moesaic.recipes.plan import check_model, check_positions, check_train, estimate_parameters
from moesaic.training.config import TrainConfig

# A network runs at about half the rate of one large product.
_EFFICIENCY = 0.5
# Forward and backward of the model, and a forward of its teacher, against one forward.
_TRAINING_PASSES = 4


def compare(
    protocol: Protocol,
    directory: Path,
    selection: Selection | None = None,
    progress: Progress = SILENT,
    *,
    redo: bool = False,
    run: Runner = run_piece,
) -> list[dict[str, Any]]:
    """Convert or compress one dense model in many ways and measure what is not measured yet.

    A cell is one method at one budget, with one seed, before or after training;
    `moesaic.recipes.architectures.compare_architectures` instead trains models from fresh weights.

    A cell is done when its line is in the directory and its settings are still those of the
    protocol; one that ended in an error is tried again. Run again after an interruption, it goes on
    inside the cell it was in.

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
    cells = select(all_cells(protocol), selection or Selection())
    check(protocol)
    return fill(grid_of(protocol), directory, cells, progress, redo=redo, run=run)


def check(protocol: Protocol) -> None:
    """Refuse a protocol that cannot work, before anything expensive.

    Raises:
        InputError: Naming the field, the value and the remedy.
        ImportError: If it asks questions and lm-eval is not installed.
    """
    config = read_config(protocol.model)
    if config.model_type not in ARCHITECTURES:
        raise InputError(f"model {protocol.model!r} is converted already; give its dense parent")
    check_weights(protocol.model)
    block = protocol.data.block
    check_positions({"data.block": block}, getattr(config, "max_position_embeddings", None))
    if protocol.calibration.tokens < block:
        raise InputError(
            f"calibration.tokens must be at least one block of {block}, got "
            f"{protocol.calibration.tokens}; raise it or lower data.block"
        )
    if any(cell.trained for cell in all_cells(protocol)):
        check_train(protocol.train, block)
    if protocol.questions.per_domain and importlib.util.find_spec("lm_eval") is None:
        raise ImportError(
            'questions need lm-eval, which is not installed; pip install "moesaic[eval]", or set '
            "questions.per_domain to 0"
        )


def grid_of(protocol: Protocol) -> Grid:
    """The protocol as cells that can be done one by one."""
    config = functools.cache(lambda: read_config(protocol.model))

    def obstacle(cell: Cell) -> str:
        try:
            check_model(protocol.methods[cell.method].config(cell.active, cell.seed), config())
        except InputError as error:
            return str(error)
        return ""

    return Grid(
        protocol=protocol,
        cells=all_cells(protocol),
        settings=partial(_settings, protocol),
        defaults=lambda cell: {
            "config": plain_defaults(protocol.methods[cell.method].config_class),
            "train": plain_defaults(TrainConfig),
        },
        obstacle=obstacle,
        needs=lambda cells: {"collectors": collectors_for(protocol, cells)},
        facts=lambda cell: {"static": protocol.methods[cell.method].static},
    )


def _settings(protocol: Protocol, cell: Cell) -> dict[str, Any]:
    """What a line says of its settings; without the refused ones, where there are none."""
    try:
        return resolved(protocol, cell)
    except InputError:
        method = protocol.methods[cell.method]
        options = to_plain(method.options)
        return {"kind": method.kind, "registered": method.method, "options": options}


def collectors_for(protocol: Protocol, cells: Iterable[Cell]) -> list[str]:
    """Everything that must be measured on the dense parent for the cells that have settings."""
    needed: set[str] = set()
    for cell in cells:
        with contextlib.suppress(InputError):
            config = protocol.methods[cell.method].config(cell.active, cell.seed)
            needed.update(config.collectors())
    return sorted(needed)


def estimate(protocol: Protocol, directory: Path, cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """Say how long cells will take, and which are done.

    From cells of the same method in this directory where there are some; else from the arithmetic
    of the model at the rate of this machine, with the conversion taken for one reading of the
    calibration text.

    Args:
        protocol: What is compared.
        directory: Of the results; it need not exist.
        cells: Which to list.

    Returns:
        Plain data, one entry for each cell.

    Raises:
        InputError: If the protocol cannot work.
    """
    check(protocol)
    config = read_config(protocol.model)
    parameters = estimate_parameters(config)
    dtype = "float32" if protocol.dtype == "auto" else protocol.dtype
    token_s = 2 * parameters / (_EFFICIENCY * flops_per_s(dtype))
    heldout = protocol.data.block * protocol.heldout.blocks_per_domain * len(protocol.data.sources)

    def guess(cell: Cell) -> float:
        tokens = heldout + protocol.calibration.tokens
        if cell.trained:
            tokens += _TRAINING_PASSES * protocol.train.tokens
        return token_s * tokens

    return list_cells(
        grid_of(protocol), directory, cells, guess, lambda cell: (cell.method, cell.trained)
    )


def gather(protocol: Protocol, directories: Sequence[Path]) -> Comparison:
    """Bring the results of one or several directories together, as those of shards.

    Raises:
        InputError: If a directory holds the results of another protocol, or none.
    """
    grid = grid_of(protocol)
    lines = gather_lines(grid, directories)
    dense = next((d / "dense.json" for d in directories if (d / "dense.json").is_file()), None)
    return Comparison(
        protocol=protocol.plain(),
        dense=None if dense is None else read_json(dense),
        lines=lines,
        pairs=paired(lines, protocol.heldout.quality),
        predictions=[
            build_config(Prediction, line["prediction"], where=f"{PREDICTIONS}: prediction")
            for line in gather_lines(grid, directories, PREDICTIONS)
        ],
    )


def write_comparison(
    protocol: Protocol, directory: Path, others: Sequence[Path] = ()
) -> tuple[Comparison, dict[str, str]]:
    """Write the report of a comparison: a page for people and a table for documents.

    Args:
        protocol: What is compared.
        directory: Of results; `report.html` and `report.md` go there.
        others: Directories of other shards, whose results count too.

    Returns:
        What is reported, and the two files.
    """
    comparison = gather(protocol, [directory, *others])
    files = {
        "report": (directory / "report.html", render_comparison(comparison)),
        "markdown": (
            directory / "report.md",
            comparison_markdown(comparison) + predictions_markdown(comparison),
        ),
    }
    for path, text in files.values():
        write_text(path, text)
    return comparison, {name: str(path) for name, (path, _) in files.items()}
