"""The work of one cell: make the model, train it if asked, and measure it beside its parent."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from moesaic._config import to_plain
from moesaic._errors import CheckpointError, InputError
from moesaic._progress import Progress
from moesaic.evaluation import evaluate_perplexity
from moesaic.evaluation.record import quality_section
from moesaic.nn.layer import moe_layers
from moesaic.nn.routers.sigmoid_threshold import SigmoidThreshold
from moesaic.recipes.comparison.cells import Cell
from moesaic.recipes.comparison.piece import RefusedError, circumstances, claim_cell, timed
from moesaic.recipes.comparison.protocol import KINDS, Protocol, build_protocol
from moesaic.recipes.comparison.shared import Shared
from moesaic.training.run import clean, train


def resolved(protocol: Protocol, cell: Cell) -> dict[str, Any]:
    """Everything of its own that decides the result of a cell, as plain data.

    Raises:
        InputError: If the settings of its method cannot meet its budget.
    """
    method = protocol.methods[cell.method]
    training = None
    if cell.trained:
        training = to_plain(protocol.training(method, cell.active, cell.seed))
        # Whether the budget is held in training, the model tells.
        del training["active"]
    return {
        "kind": method.kind,
        "registered": method.method,
        "config": to_plain(method.config(cell.active, cell.seed)),
        "train": training,
    }


def do_methods(piece: dict[str, Any], progress: Progress) -> dict[str, Any] | None:
    """Do a piece of a comparison of methods.

    Args:
        piece: `directory` and `protocol`, with either `collectors`, to make what cells share, or
            `cell`, to measure one.
        progress: Told of every stage.

    Returns:
        The line of the cell; none where there is no cell.
    """
    directory = Path(piece["directory"])
    shared = Shared(build_protocol(piece["protocol"]), directory, progress)
    if "cell" not in piece:
        shared.make(piece["collectors"])
        return None
    cell = Cell(**piece["cell"])
    return measure(shared, cell, directory / "cells" / cell.key, progress)


def measure(shared: Shared, cell: Cell, work: Path, progress: Progress) -> dict[str, Any]:
    """Do a cell from the dense parent on.

    Args:
        shared: What it has in common with others.
        cell: What to do.
        work: Its directory. An interrupted cell goes on from what is there.
        progress: Told of every stage.

    Returns:
        Its line, plain data.

    Raises:
        RefusedError: If the method refuses the cell.
    """
    settings = resolved(shared.protocol, cell)
    resumed = claim_cell(work, settings)
    seconds: dict[str, float] = {}
    with timed(seconds, "conversion"):
        model, results = _make(shared, cell, work, progress)
    trained = {"tokens": 0, "budget": 0.0}
    if cell.trained:
        with timed(seconds, "training"):
            model, trained = _train(shared, model, cell, work / "training", progress)
    protocol, heldout = shared.protocol, shared.split.heldout
    method = protocol.methods[cell.method]
    with timed(seconds, "evaluation"):
        quality = evaluate_perplexity(
            model,
            heldout,
            protocol.heldout.quality,
            progress,
            block_N=shared.block_N,
            name=cell.method,
        )
    line: dict[str, Any] = {
        **cell.plain(),
        "status": "done",
        **settings,
        "static": method.static,
        "quality": quality_section(quality, shared.dense_losses(), protocol.heldout.quality),
        # So that any two methods can be paired, document by document.
        "losses": quality.losses.to_plain(),
        "cost": shared.cost(model, quality, results["active"] if method.tells_active else None),
        "accuracy": shared.ask(model),
        "trained_tokens": trained["tokens"],
        "trained_budget": trained["budget"],
        "results": to_plain(results),
    }
    clean(work / "training")
    shutil.rmtree(work / "layers", ignore_errors=True)
    return {**line, **circumstances(model, seconds, resumed=resumed)}


def _make(
    shared: Shared, cell: Cell, work: Path, progress: Progress
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Apply the method to the dense parent."""
    method = shared.protocol.methods[cell.method]
    config = method.config(cell.active, cell.seed)
    apply = KINDS[method.kind].load(method.method)
    stats = shared.stats(config.collectors())
    try:
        made: tuple[PreTrainedModel, dict[str, Any]] = apply(
            shared.dense(), stats, config, store=work / "layers", progress=progress
        )
    except CheckpointError:
        raise
    except InputError as error:
        raise RefusedError(str(error)) from error
    return made


def _train(
    shared: Shared, model: PreTrainedModel, cell: Cell, directory: Path, progress: Progress
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Train as every method is trained: against the dense parent, with a budget if it can hold one.

    The results say the budget that was held, 0 if none.
    """
    protocol = shared.protocol
    held = cell.active if _holds_budget(model) else 0.0
    config = protocol.training(protocol.methods[cell.method], held, cell.seed)
    teacher = shared.dense() if config.needs_teacher else None
    model, results = train(model, shared.split.train, config, directory, progress, teacher=teacher)
    return model, {"tokens": results["tokens"], "budget": held}


def _holds_budget(model: PreTrainedModel) -> bool:
    """Whether a controller can steer how much of the model is active."""
    return "sparsity" in getattr(model, "loss_terms", {}) and all(
        isinstance(layer.router, SigmoidThreshold) for layer in moe_layers(model)
    )
