"""Predictions for the cells of a comparison that need no training, kept beside its results."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from moesaic._errors import InputError
from moesaic._progress import SILENT, Progress
from moesaic.analysis.suggestion import Prediction
from moesaic.recipes.claim import claim, held
from moesaic.recipes.comparison.cells import Cell
from moesaic.recipes.comparison.predictions import read_predictions, write_predictions
from moesaic.recipes.comparison.protocol import Protocol
from moesaic.recipes.comparison.run import check, collectors_for
from moesaic.recipes.comparison.shared import Shared
from moesaic.recipes.suggestion.reading import Reading, TrialConfig
from moesaic.recipes.suggestion.run import predict
from moesaic.recipes.suggestion.trials import Parent


def suggest_cells(
    protocol: Protocol,
    directory: Path,
    cells: Sequence[Cell],
    trials: TrialConfig | None = None,
    progress: Progress = SILENT,
) -> list[Prediction]:
    """Predict what methods of a protocol lose without training, and keep it in its directory.

    The trials read the text that the protocol calibrates and trains on, never what it measures on.

    Args:
        protocol: What is compared.
        directory: Of the results.
        cells: Which to predict; those that are trained are passed over.
        trials: How much work they are.
        progress: Told of every stage.

    Returns:
        All predictions of the directory.

    Raises:
        InputError: Before any work, if the protocol cannot work or the directory is another's.
    """
    trials = trials or TrialConfig()
    check(protocol)
    cells = [cell for cell in cells if not cell.trained]
    if not cells:
        raise InputError(
            "predictions are of cells without training, and none is selected; add false to "
            "protocol.trained or leave out trained=true"
        )
    wanted = dict.fromkeys((cell.method, cell.active) for cell in cells)
    seed = protocol.seeds[0]
    with held(directory):
        claim(directory, protocol.common(), "protocol")
        shared = Shared(protocol, directory, progress)
        needed = collectors_for(protocol, cells)
        shared.make(needed)
        kept = {(p.method, p.budget): p for p in read_predictions(directory)}
        stats = shared.stats(tuple(needed))
        dense = shared.dense()
        parent = Parent(dense=dense, stats=stats, config=trials, progress=progress)
        methods = {
            name: parent.trial(name, method.kind, method.method, partial(method.config, seed=seed))
            for name, method in protocol.methods.items()
            if name in {cell.method for cell in cells}
        }
        calibration = protocol.calibration
        num_calibrated = calibration.tokens // protocol.data.block
        reading = Reading(
            dense, shared.split.train, num_calibrated, calibration.seed, trials, progress
        )
        for prediction in predict(
            [(methods[name], active) for name, active in wanted], reading, dense, progress
        ):
            kept[prediction.method, prediction.budget] = prediction
        write_predictions(directory, kept.values())
    return list(kept.values())
