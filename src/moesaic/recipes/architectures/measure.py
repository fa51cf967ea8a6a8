"""The work of one cell: make the model, train it from scratch, and measure it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moesaic._config import to_plain
from moesaic._errors import InputError
from moesaic._progress import Progress
from moesaic.analysis._charts import thin
from moesaic.data import DataSplit, TokenBlocks, prepare
from moesaic.evaluation import QualityResult, choose_blocks, evaluate_perplexity
from moesaic.evaluation.balance import balance_section
from moesaic.evaluation.record import cost_section
from moesaic.models.byte_level import byte_tokenizer
from moesaic.models.checkpoint import load_tokenizer
from moesaic.models.mixture import build_mixture
from moesaic.recipes.architectures.cells import ArchitectureCell
from moesaic.recipes.architectures.matching import Matched, match
from moesaic.recipes.architectures.protocol import ArchitectureProtocol, build_architectures
from moesaic.recipes.comparison.piece import RefusedError, circumstances, claim_cell, timed
from moesaic.training.run import METRICS, clean, train

# Points of a learning curve that are kept, each a mean of its steps.
_CURVE_POINTS = 60


@cache
def tokenizer_of(source: str) -> PreTrainedTokenizerBase:
    """The tokenizer that a protocol names."""
    return byte_tokenizer() if source == "bytes" else load_tokenizer(source)


def device_of(protocol: ArchitectureProtocol) -> str:
    """Where the cells of a protocol are done."""
    if protocol.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return protocol.device


def matched(protocol: ArchitectureProtocol, name: str) -> Matched:
    """An architecture of a protocol at its width."""
    return match(protocol, name, len(tokenizer_of(protocol.tokenizer)))


def resolved(
    protocol: ArchitectureProtocol, cell: ArchitectureCell, found: Matched
) -> dict[str, Any]:
    """Everything of its own that decides the result of a cell, as plain data."""
    held = protocol.architectures[cell.architecture].hold
    active = min(1.0, found.active_fraction) if held else 0.0
    return {
        "config": to_plain(found.mixture),
        "active_experts": found.active,
        "held": held,
        "train": to_plain(protocol.training(cell.architecture, active, cell.seed)),
    }


def do_architectures(piece: dict[str, Any], progress: Progress) -> dict[str, Any] | None:
    """Do a piece of a comparison of architectures.

    Args:
        piece: `directory` and `protocol`, and `cell` to measure one; without it the text is
            prepared, which cells share.
        progress: Told of every stage.

    Returns:
        The line of the cell; none where there is no cell.
    """
    directory = Path(piece["directory"])
    protocol = build_architectures(piece["protocol"])
    if "cell" not in piece:
        make_text(protocol, directory, progress)
        return None
    cell = ArchitectureCell(**piece["cell"])
    return measure(protocol, directory, cell, progress)


def make_text(protocol: ArchitectureProtocol, directory: Path, progress: Progress) -> None:
    """Prepare the text that all cells read, once.

    Raises:
        InputError: If there is less than the training asks for, so that it would repeat.
    """
    if not (directory / "text").is_dir():
        tokenizer = tokenizer_of(protocol.tokenizer)
        split = prepare(protocol.data, tokenizer, progress=progress)
        split.save(directory / "text")
    text = DataSplit.load(directory / "text").train
    if protocol.train.tokens > text.num_tokens:
        raise InputError(
            f"train.tokens is {protocol.train.tokens}, the text has {text.num_tokens}; lower it, "
            "raise data.max_tokens_per_domain or give more text"
        )


def measure(
    protocol: ArchitectureProtocol, directory: Path, cell: ArchitectureCell, progress: Progress
) -> dict[str, Any]:
    """Do a cell from fresh weights on; an interrupted one goes on from its last checkpoint.

    Raises:
        RefusedError: If its architecture cannot be made or trained as the protocol says.
    """
    work = directory / "cells" / cell.key
    try:
        found = matched(protocol, cell.architecture)
        settings = resolved(protocol, cell, found)
    except InputError as error:
        raise RefusedError(str(error)) from error
    resumed = claim_cell(work, settings)
    split = DataSplit.load(directory / "text")
    seconds: dict[str, float] = {}
    torch.manual_seed(cell.seed)
    model: Any = build_mixture(found.mixture)
    model.to(device_of(protocol))
    config = protocol.training(cell.architecture, settings["train"]["active"], cell.seed)
    with timed(seconds, "training"):
        model, results = train(model, split.train, config, work / "training", progress)
    with timed(seconds, "evaluation"):
        quality = _read(protocol, model, split.heldout, progress, cell.key)
    line = {
        **cell.plain(),
        "status": "done",
        **settings,
        "sees_batch": protocol.architectures[cell.architecture].sees_batch,
        "quality": quality_of(quality),
        **_cost(model, quality, found, split.heldout.block),
        "balance": None if quality.activation is None else balance_section(quality.activation),
        "trained_tokens": results["tokens"],
        "curve": curve_of(results["log"]),
        "speed": {
            "train_tokens_per_s": None if resumed else results["tokens"] / seconds["training"],
            "read_tokens_per_s": quality.losses.tokens_N.sum() / seconds["evaluation"],
        },
        **circumstances(model, seconds, resumed=resumed),
    }
    clean(work / "training")
    (work / "training" / METRICS).unlink()
    return line


def _read(
    protocol: ArchitectureProtocol,
    model: PreTrainedModel,
    heldout: TokenBlocks,
    progress: Progress,
    name: str,
) -> QualityResult:
    """Read the held-out blocks that every model reads."""
    wanted = protocol.heldout
    blocks = choose_blocks(heldout, wanted.blocks_per_domain, wanted.seed)
    return evaluate_perplexity(model, heldout, wanted.quality, progress, block_N=blocks, name=name)


def quality_of(quality: QualityResult) -> dict[str, Any]:
    """Loss in nats per token, over all held-out tokens and of each domain with its interval."""
    losses = quality.losses
    return {
        "loss": float(losses.nll_N.sum() / losses.tokens_N.sum()),
        "domains": {
            name: {
                "loss": math.log(domain.perplexity.value),
                "low": math.log(domain.perplexity.low),
                "high": math.log(domain.perplexity.high),
            }
            for name, domain in quality.domains.items()
        },
        "tokens": int(losses.tokens_N.sum()),
    }


def _cost(
    model: PreTrainedModel, quality: QualityResult, found: Matched, context: int
) -> dict[str, Any]:
    """What was counted: the cost at the measured use, the plan, and the experts of a token."""
    assert quality.activation is not None, "every network is a layer"
    experts = [sum(shares) for shares in quality.activation.experts_per_layer() if shares]
    cost = cost_section(model, quality, context)
    return {
        "cost": cost,
        "flops": {
            "reference": found.reference_flops,
            "planned": found.flops,
            "measured": cost["flops_per_token"],
            "ratio": cost["flops_per_token"] / found.reference_flops,
        },
        "experts_used": experts,
    }


def curve_of(log: list[Mapping[str, Any]]) -> list[list[float]]:
    """The learning curve: tokens so far and training loss without the losses of routers."""
    losses, size = thin([step["language"] for step in log], limit=_CURVE_POINTS)
    last = [log[min((i + 1) * size, len(log)) - 1]["tokens"] for i in range(len(losses))]
    return [[tokens, round(loss, 4)] for tokens, loss in zip(last, losses, strict=True)]
