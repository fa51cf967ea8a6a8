"""Text, statistics and counts that compressions are tested with."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import torch
from model_cases import VOCAB, Case, random_ids, read_all
from torch import Tensor
from transformers import PreTrainedModel

from moesaic.calibration import CalibrationConfig, CalibrationStats, calibrate
from moesaic.data.blocks import TokenBlocks
from moesaic.nn.layer import moe_layers

LLAMA = Case("llama", {})


def make_text(num_blocks: int = 8, length: int = 16, seed: int = 0) -> TokenBlocks:
    """Blocks of random tokens, of two domains in turn."""
    ids = np.random.default_rng(seed).integers(3, VOCAB, (num_blocks, length), dtype=np.int32)
    return TokenBlocks(
        ids_NS=ids,
        domain_N=np.arange(num_blocks, dtype=np.int16) % 2,
        document_N=np.arange(num_blocks, dtype=np.int32),
        domains=("noise", "hum"),
    )


def measure(
    model, directory, collectors: tuple[str, ...], text: TokenBlocks | None = None
) -> CalibrationStats:
    """Calibrate on all of some text."""
    text = make_text() if text is None else text
    return calibrate(model, text, collectors, CalibrationConfig(tokens=text.num_tokens), directory)


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(random_ids()).logits


def state(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def weights_in_use(model: PreTrainedModel) -> int:
    """Weights of the feed-forward matrices that are not zero, dense or compressed."""
    matrices: list[Tensor] = []
    for moe in moe_layers(model):
        for part in (moe.shared, moe.experts):
            if part is not None:
                matrices += [part.weights().up, part.weights().down]
    if not matrices:
        for ffn in read_all(model):
            matrices += [x for x in (ffn.gate_FD, ffn.up_FD, ffn.down_DF) if x is not None]
    return sum(int(matrix.count_nonzero()) for matrix in matrices)


class Killed(BaseException):
    """As final as a signal: no handler for errors sees it."""


class Watch:
    """Counts the units of all stages and, if told to, ends the run after some."""

    def __init__(self, stop_after: float = float("inf")) -> None:
        self.stop_after = stop_after
        self.done = 0.0

    @contextlib.contextmanager
    def stage(self, name: str, total: float, unit: str) -> Iterator[Watch]:
        yield self

    def advance(self, n: float = 1.0) -> None:
        self.done += n
        if self.done > self.stop_after:
            raise Killed
