"""What to do with a dense model, and what it will cost, before any of the work is done.

A prediction here is a small measurement. Every method is put in place at every budget, at little
cost (`trials`), and reads a few blocks of the training text, of documents that calibration did not
see where there are such (`reading`); the ratio of perplexities to the dense parent's on them is
what is predicted of the method at full size, on held-out text.

Why not from the errors of layers alone: to second order the divergence is the sum of s_l * e_l,
the sensitivity of each layer (`moesaic.calibration.sensitivity`) times the relative error of its
output. It ranks and shares a budget well, but is no ratio: errors add up over depth, more than in
proportion where little is active, and by how much in another method or model only a forward pass
tells.

How far predictions are off, `moesaic compare --suggest` says of any protocol that was measured.
Large ratios differ more from text to text, so their predictions do too.
"""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from moesaic._errors import CheckpointError, InputError, RunError
from moesaic._progress import SILENT, Progress
from moesaic.analysis.comparison import BOUND
from moesaic.analysis.suggestion import THRESHOLDS, Prediction, Suggestion
from moesaic.calibration import CalibrationConfig, CalibrationStats, calibrate
from moesaic.compression.pruning.flap import FLAP
from moesaic.compression.pruning.wanda import Wanda
from moesaic.compression.sparsity.teal import TEAL
from moesaic.conversion.api import conversion_of
from moesaic.conversion.dsmoe import DSMoE
from moesaic.data import DataConfig, TokenBlocks, prepare
from moesaic.models.checkpoint import load_dense, load_tokenizer
from moesaic.recipes.comparison.shared import ffn_weights
from moesaic.recipes.suggestion.reading import Reading, TrialConfig
from moesaic.recipes.suggestion.trials import Parent, Trial

BUDGETS = (0.75, 0.625, 0.5, 0.375, 0.25)
# Compressions that could be done instead of a conversion.
_INSTEAD: dict[str, Any] = {"flap": FLAP(), "wanda": Wanda(), "teal": TEAL()}


def suggest(
    model: str | PreTrainedModel,
    config: Any = None,
    *,
    budgets: Sequence[float] = BUDGETS,
    stats: CalibrationStats | None = None,
    text: TokenBlocks | None = None,
    calibration: CalibrationConfig | None = None,
    trials: TrialConfig | None = None,
    progress: Progress = SILENT,
) -> Suggestion:
    """Predict what a conversion loses without training, and what could be done instead.

    Beside it are static pruning of neurons (FLAP) and of single weights (Wanda), thresholds on
    activations (TEAL) and the bound on neurons; for DSMoE with fitted routers also itself with
    thresholds within its blocks, unless it has some, and the bound on its blocks.
    `moesaic.analysis.advice` puts the answer into words. Takes memory for four models.

    Args:
        model: A dense model, which stays as it is, or where to load one from.
        config: Settings of a conversion; DSMoE's default ones if none. Their `active` does not
            count.
        budgets: Active fractions, in (0, 1).
        stats: Statistics with `collectors_of(config)`, drawn from `text` as `calibration` says, if
            they were measured before; `convert` takes the same.
        text: Training text; the built-in text if none and `model` says where its tokenizer is.
        calibration: How much of the text is read to calibrate.
        trials: How much work the trials are.
        progress: Told of every stage.

    Raises:
        InputError: If the settings do not fit the model, a budget is out of range, or there is no
            text beyond what is calibrated on.
    """
    budgets = checked_budgets(budgets)
    config = DSMoE() if config is None else config
    conversion_of(config)
    calibration = calibration or CalibrationConfig()
    if text is None:
        if not isinstance(model, str):
            raise InputError(
                "suggest reads text; give some, such as "
                "moesaic.prepare(DataConfig(), tokenizer).train"
            )
        text = prepare(DataConfig(), load_tokenizer(model), progress=progress).train
    dense = load_dense(model) if isinstance(model, str) else model
    place: AbstractContextManager[str] = nullcontext("")
    if stats is None:
        place = tempfile.TemporaryDirectory()
    with place as directory:
        if stats is None:
            collectors = collectors_of(config)
            stats = calibrate(dense, text, collectors, calibration, Path(directory), progress)
        return suggest_from(
            dense,
            config,
            stats,
            text,
            budgets=budgets,
            seed=calibration.seed,
            trials=trials or TrialConfig(),
            progress=progress,
        )


def collectors_of(config: Any) -> tuple[str, ...]:
    """Names of the collectors that a suggestion about some settings needs."""
    needed = {name for other in _INSTEAD.values() for name in other.collectors()}
    return tuple(sorted(needed.union(config.collectors())))


def thresholded(config: Any) -> DSMoE | None:
    """Settings of DSMoE with thresholds within its blocks; none where they have some or cannot."""
    if isinstance(config, DSMoE) and config.kept == config.inputs == 1.0:
        with suppress(InputError):
            return dataclasses.replace(config, kept=None, inputs=None)
    return None


def checked_budgets(budgets: Sequence[float]) -> tuple[float, ...]:
    """Budgets, highest first.

    Raises:
        InputError: If there is none, one is out of range, or one stands twice.
    """
    if not budgets or len(set(budgets)) < len(budgets):
        raise InputError(f"budgets must be a list of distinct fractions, got {list(budgets)}")
    for budget in budgets:
        if not 0.0 < budget < 1.0:
            raise InputError(
                f"budgets must be in (0, 1), got {budget}; 0.5 uses half of the weights"
            )
    return tuple(sorted(budgets, reverse=True))


def suggest_from(
    dense: PreTrainedModel,
    config: Any,
    stats: CalibrationStats,
    text: TokenBlocks,
    *,
    budgets: tuple[float, ...],
    seed: int,
    trials: TrialConfig,
    progress: Progress = SILENT,
) -> Suggestion:
    """Suggest from a model and its statistics; see `suggest`.

    Args:
        dense: The parent, which stays as it is.
        config: Settings of a conversion.
        stats: With `collectors_of(config)`, drawn from the text.
        text: Training text.
        budgets: Highest first.
        seed: With which the statistics drew their text.
        trials: How much work the trials are.
        progress: Told of every stage.
    """
    start = time.monotonic()
    name = conversion_of(config).name
    parent = Parent(dense=dense, stats=stats, config=trials, progress=progress)
    methods = [parent.trial(name, "convert", name, _settings(config))]
    if (cut := thresholded(config)) is not None:
        methods.append(parent.trial(THRESHOLDS, "convert", name, _settings(cut)))
    methods += [
        parent.trial(other, "compress", other, _settings(settings))
        for other, settings in _INSTEAD.items()
    ]
    methods.append(parent.neurons())
    if isinstance(config, DSMoE) and config.init == "gram":
        methods.append(parent.blocks(config))
    reading = Reading(dense, text, stats.num_tokens // text.block, seed, trials, progress)
    cells = [(method, budget) for method in methods for budget in budgets]
    return Suggestion(
        conversion=name,
        budgets=budgets,
        predictions=tuple(predict(cells, reading, dense, progress)),
        seconds=round(time.monotonic() - start, 1),
    )


def _settings(config: Any) -> Any:
    return lambda budget: dataclasses.replace(config, active=budget)


def predict(
    cells: Sequence[tuple[Trial, float]],
    reading: Reading,
    dense: PreTrainedModel,
    progress: Progress = SILENT,
) -> Iterator[Prediction]:
    """Measure trials at their budgets, one after the other.

    Args:
        cells: Trials with the budget of each.
        reading: What they read.
        dense: Their parent.
        progress: Told of every cell.

    Yields:
        One prediction for each; of a trial that refuses its budget, or whose loss is not finite,
        with the reason.
    """
    weights = ffn_weights(dense)
    with progress.stage("trials", len(cells), "cells") as stage:
        for trial, budget in cells:
            about: dict[str, Any] = {
                "method": trial.name,
                "kind": trial.kind,
                "static": trial.static,
                "budget": budget,
            }
            try:
                with trial.at(budget) as (model, active, in_full):
                    # Bounds are slow, and there for orientation.
                    lost = reading.measure(
                        model, f"{trial.name} at {budget:g}", once=trial.kind == BOUND
                    )
                    measured = lost.active if lost.active is not None else active
                    if measured is None:
                        measured = ffn_weights(model) / weights
            except CheckpointError:
                raise
            except (InputError, RunError) as error:
                found = Prediction(**about, reason=str(error))
            else:
                found = Prediction(
                    **about,
                    ratio=lost.ratio.value**in_full,
                    low=lost.ratio.low**in_full,
                    high=lost.ratio.high**in_full,
                    active=round(measured, 4),
                    blocks=lost.blocks,
                )
            stage.advance()
            yield found
