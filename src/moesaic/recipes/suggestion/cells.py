"""Predictions for the cells of a comparison that need no training, kept beside its results."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from moesaic._config import to_plain
from moesaic._errors import InputError
from moesaic._progress import SILENT, Progress
from moesaic.analysis.comparison import BOUND
from moesaic.analysis.suggestion import Prediction
from moesaic.recipes.claim import claim, held
from moesaic.recipes.comparison.cells import Cell
from moesaic.recipes.comparison.lines import PREDICTIONS, add_line
from moesaic.recipes.comparison.piece import circumstances
from moesaic.recipes.comparison.protocol import Protocol
from moesaic.recipes.comparison.run import check, collectors_for, gather, grid_of
from moesaic.recipes.comparison.shared import Shared
from moesaic.recipes.suggestion.reading import Reading, TrialConfig
from moesaic.recipes.suggestion.run import predict
from moesaic.recipes.suggestion.trials import Parent, Trial


def suggest_cells(
    protocol: Protocol,
    directory: Path,
    cells: Sequence[Cell],
    trials: TrialConfig | None = None,
    progress: Progress = SILENT,
    *,
    redo: bool = False,
) -> Sequence[Prediction]:
    """Predict what methods of a protocol lose without training, and keep it in its directory.

    The trials read the text that the protocol calibrates and trains on, never what it measures on.
    Every prediction is on disk before the next begins, so the same call goes on after an
    interruption.

    Args:
        protocol: What is compared.
        directory: Of the results.
        cells: Which to predict; those that are trained and bounds are passed over, and of those
            that differ by their seed one is predicted.
        trials: How much work they are.
        progress: Told of every stage.
        redo: Whether to predict again what these settings and trials have predicted.

    Returns:
        All predictions of the directory that are of the protocol's settings.

    Raises:
        InputError: Before any work, if the protocol cannot work or the directory is another's.
    """
    trials = trials or TrialConfig()
    check(protocol)
    seed = protocol.seeds[0]
    wanted = dict.fromkeys(
        dataclasses.replace(cell, seed=seed)
        for cell in cells
        if not cell.trained and protocol.methods[cell.method].kind != BOUND
    )
    if not wanted:
        raise InputError(
            "predictions are of methods without training, and none is selected; add false to "
            "protocol.trained, or leave out trained=true and names of bounds"
        )
    grid = grid_of(protocol)
    with held(directory):
        claim(directory, protocol.common(), "protocol")
        lines = grid.lines(directory, PREDICTIONS)
        work = to_plain(trials)
        pending = [
            cell
            for cell in wanted
            if redo or not grid.is_done(lines, cell) or lines[cell]["trials"] != work
        ]
        if pending:
            _predict(protocol, directory, pending, trials, progress)
    return gather(protocol, [directory]).predictions


def _predict(
    protocol: Protocol,
    directory: Path,
    cells: Sequence[Cell],
    trials: TrialConfig,
    progress: Progress,
) -> None:
    """Predict cells, one line after the other."""
    shared = Shared(protocol, directory, progress)
    needed = collectors_for(protocol, cells)
    shared.make(needed)
    stats = shared.stats(tuple(needed))
    dense = shared.dense()
    parent = Parent(dense=dense, stats=stats, config=trials, progress=progress)

    def trial(cell: Cell) -> Trial:
        method = protocol.methods[cell.method]
        at = partial(method.config, seed=cell.seed)
        return parent.trial(cell.method, method.kind, method.method, at)

    calibration = protocol.calibration
    num_calibrated = calibration.tokens // protocol.data.block
    reading = Reading(dense, shared.split.train, num_calibrated, calibration.seed, trials, progress)
    settings = grid_of(protocol).settings
    start = time.perf_counter()
    found = predict([(trial(cell), cell.active) for cell in cells], reading, dense, progress)
    for cell, prediction in zip(cells, found, strict=True):
        seconds = {"total": round(time.perf_counter() - start, 2)}
        line = {
            **cell.plain(),
            "status": "refused" if prediction.ratio is None else "done",
            **settings(cell),
            "trials": to_plain(trials),
            "prediction": to_plain(prediction),
            **circumstances(dense, seconds, resumed=False),
        }
        add_line(directory, line, name=PREDICTIONS)
        start = time.perf_counter()
