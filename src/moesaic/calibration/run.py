"""Calibrate: run the text through the model once and keep, per layer, what was asked for.

Memory: the model, the hidden states of all tokens (T * D floats), the network inputs of one layer
(as much again), and what the collectors hold for one layer; see `walk` and `collectors`. After that
comes what looks at the whole model, one after the other; see `passes`.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from moesaic._config import to_plain
from moesaic._errors import InputError, RunError
from moesaic._files import atomic_write, read_json, require_space, write_json
from moesaic._progress import SILENT, Progress
from moesaic._registry import unknown_name
from moesaic.calibration.collectors import COLLECTORS, Collector
from moesaic.calibration.passes import PASSES
from moesaic.calibration.stats import (
    MANIFEST,
    CalibrationStats,
    layer_file,
    open_stats,
    pass_file,
    write_pass,
)
from moesaic.calibration.walk import walk_layers
from moesaic.data.blocks import TokenBlocks
from moesaic.models.architectures import architecture_of
from moesaic.models.checkpoint import fingerprint
from moesaic.models.ffn import FFN, decoder_layers, ffn_module, read_ffn
from moesaic.nn.layer import MoELayer

# Tokens that a collector works on at a time.
_CHUNK = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationConfig:
    """Settings of a calibration.

    Attributes:
        tokens: Tokens to read, rounded down to whole blocks.
        batch_blocks: Blocks that run together.
        seed: Which blocks are drawn.
    """

    tokens: int = 16384
    batch_blocks: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        if self.tokens < 1 or self.batch_blocks < 1:
            raise InputError(
                f"calibration tokens and batch_blocks must be at least 1, got {self.tokens} and "
                f"{self.batch_blocks}; 16384 and 4 are usual"
            )


def calibrate(
    model: PreTrainedModel,
    text: TokenBlocks,
    collectors: tuple[str, ...],
    config: CalibrationConfig,
    directory: Path,
    progress: Progress = SILENT,
) -> CalibrationStats:
    """Measure a model's feed-forward networks on text.

    Run again after an interruption, it goes on with the first layer that is not on disk, and where
    it looks at the whole model with the first block; run again after the end, it opens what is
    there.

    Args:
        model: Dense or converted, in evaluation mode.
        text: Training text; held-out text must not be given.
        collectors: Names of what to collect.
        config: Settings.
        directory: Where the statistics go.
        progress: Told of every token.

    Returns:
        The statistics.

    Raises:
        InputError: If a collector is unknown or does not fit the model, the text is too short, or
            the directory holds the statistics of something else.
        RunError: If a layer's network or an expert saw no token.
    """
    for name in collectors:
        if name not in COLLECTORS and name not in PASSES:
            raise InputError(unknown_name("collector", name, [*COLLECTORS, *PASSES]))
    num_blocks = config.tokens // text.ids_NS.shape[1]
    if num_blocks < 1:
        raise InputError(
            f"calibration tokens must be at least one block of {text.ids_NS.shape[1]}, got "
            f"{config.tokens}; raise it"
        )
    if num_blocks > len(text.ids_NS):
        raise InputError(
            f"calibration asks for {config.tokens} tokens, the text has {text.num_tokens}; "
            "lower calibration tokens or give more text"
        )
    walked = tuple(name for name in collectors if name in COLLECTORS)
    passes = {name: PASSES[name](model) for name in sorted(collectors) if name in PASSES}
    for layer in decoder_layers(model):
        _begin(model, layer, walked)
    sample = text.take(num_blocks, seed=config.seed)
    record = {
        "model": fingerprint(model),
        "blocks": sample.fingerprint(),
        "collectors": sorted(collectors),
        "config": to_plain(config),
    }
    key = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
    _claim(directory, key)
    store = directory / "hidden.safetensors"
    if (directory / MANIFEST).is_file():
        store.unlink(missing_ok=True)
        return open_stats(directory)

    require_space(directory, _bytes_needed(model, sample, collectors), what="calibration")
    if walked:
        _walk(model, sample, walked, config, directory, store, progress)
    for name, measurement in passes.items():
        unfinished = directory / f"{name}.unfinished"
        if not pass_file(directory, name).is_file():
            measured = measurement.measure(sample, config.seed, progress, unfinished)
            write_pass(directory, name, measured)
        unfinished.unlink(missing_ok=True)
    write_json(
        directory / MANIFEST,
        {
            "num_layers": model.config.num_hidden_layers,
            "num_tokens": sample.num_tokens,
            "collectors": sorted(collectors),
            "passes": list(passes),
            "text": {"blocks": record["blocks"], "sources": to_plain(sample.provenance)},
        },
    )
    store.unlink(missing_ok=True)
    return open_stats(directory)


def _walk(
    model: PreTrainedModel,
    sample: TokenBlocks,
    collectors: tuple[str, ...],
    config: CalibrationConfig,
    directory: Path,
    store: Path,
    progress: Progress,
) -> None:
    """Measure layer after layer, from the first that is not on disk."""
    ids_NS = torch.from_numpy(sample.ids_NS).long()
    for visit in walk_layers(
        model, ids_NS, batch_blocks=config.batch_blocks, store=store, progress=progress
    ):
        tensors = _measure(model, visit.index, visit.layer, visit.h_TD, collectors)
        with atomic_write(layer_file(directory, visit.index)) as temporary:
            save_file(tensors, temporary)
        # Not held while the next layer is measured.
        del tensors


def _begin(
    model: PreTrainedModel, layer: nn.Module, collectors: tuple[str, ...]
) -> dict[str, Collector]:
    """Make the collectors of a layer, which refuse a layer that they cannot measure."""
    row = architecture_of(model.config.model_type)
    module = ffn_module(layer, row)
    ffn: FFN | MoELayer = (
        module
        if isinstance(module, MoELayer)
        else read_ffn(layer, row, getattr(model.config, row.activation))
    )
    return {name: COLLECTORS[name](ffn) for name in collectors}


def _measure(
    model: PreTrainedModel,
    index: int,
    layer: nn.Module,
    h_TD: Tensor,
    collectors: tuple[str, ...],
) -> dict[str, Tensor]:
    """Show a layer's inputs to its collectors; gives `collector.tensor` to tensor."""
    active = _begin(model, layer, collectors)
    for piece_TD in h_TD.split(_CHUNK):
        for collector in active.values():
            collector.update(piece_TD)
    try:
        return {
            f"{name}.{key}": value.contiguous()
            for name, collector in active.items()
            for key, value in collector.result().items()
        }
    except RunError as error:
        raise RunError(f"in layer {index} {error}") from error


def _claim(directory: Path, key: str) -> None:
    """Make the directory ours, or refuse one that belongs to another calibration."""
    path = directory / "key.json"
    if path.is_file():
        if read_json(path) != {"key": key}:
            raise InputError(
                f"{directory} holds the calibration of another model, text or config; choose "
                "another directory or delete it"
            )
        # What a write that was killed left would stay for good.
        for left in directory.glob(".*.tmp"):
            left.unlink(missing_ok=True)
        return
    # What a write that was killed left is ours.
    names = [p.name for p in directory.iterdir()] if directory.exists() else []
    if not all(name.startswith(".key.json.") for name in names):
        raise InputError(f"{directory} is not empty and holds no calibration; choose another")
    shutil.rmtree(directory, ignore_errors=True)
    write_json(path, {"key": key})


def _bytes_needed(model: PreTrainedModel, sample: TokenBlocks, collectors: tuple[str, ...]) -> int:
    """Disk that the statistics take at most."""
    num_tokens, dim = sample.num_tokens, model.config.hidden_size
    # GPT-2 and Qwen name their width otherwise or not at all; four times D is the common case.
    width = getattr(model.config, "intermediate_size", None) or 4 * dim
    per_layer = {
        "adjacency": 4 * width * width,
        "gradients": 4 * width * (2 + len(sample.domains)),
        "inputs": 2 * num_tokens * dim,
        "moments": 4 * dim * dim,
        "neurons": 4 * width * (width + 4),
    }
    layers = sum(per_layer.get(name, 0) for name in collectors) * model.config.num_hidden_layers
    unfinished = 4 * num_tokens * dim
    if "gradients" in collectors:
        # The sums until now, and those that replace them.
        unfinished = max(unfinished, 8 * sum(p.numel() for p in model.parameters()))
    return int(layers + unfinished)
