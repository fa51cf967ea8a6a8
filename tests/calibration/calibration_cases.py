"""Random text, a model to read it, and runs that are interrupted."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import torch
from model_cases import VOCAB, Case
from torch import Tensor
from transformers import PreTrainedModel

from moesaic.data.blocks import TokenBlocks
from moesaic.models.ffn import decoder_layers, ffn_module

BLOCK = 16
LLAMA = Case("llama", {})
DEEP = Case("llama", {"num_hidden_layers": 4})


def make_text(num_blocks: int = 6, seed: int = 0) -> TokenBlocks:
    """Blocks of random tokens."""
    ids = np.random.default_rng(seed).integers(3, VOCAB, (num_blocks, BLOCK), dtype=np.int32)
    return TokenBlocks(
        ids_NS=ids,
        domain_N=np.zeros(num_blocks, np.int16),
        document_N=np.arange(num_blocks, dtype=np.int32),
        domains=("noise",),
    )


def ids_of(text: TokenBlocks) -> Tensor:
    """The ids as a tensor, [N, S]."""
    return torch.from_numpy(text.ids_NS).long()


@torch.no_grad()
def network_inputs(model: PreTrainedModel, case: Case, ids_NS: Tensor) -> list[Tensor]:
    """What reaches the network of every layer when the whole model runs, [T, D] each."""
    seen: list[Tensor] = []
    handles = [
        ffn_module(layer, case.row).register_forward_pre_hook(
            lambda module, args: seen.append(args[0].reshape(-1, args[0].shape[-1]))
        )
        for layer in decoder_layers(model)
    ]
    model(ids_NS)
    for handle in handles:
        handle.remove()
    return seen


class Killed(BaseException):
    """As final as a signal: no handler for errors sees it."""


class Watch:
    """Counts the units of all stages and, if told to, ends the run after some."""

    def __init__(self, stop_after: float = float("inf")) -> None:
        self.stop_after = stop_after
        self.total = 0.0
        self.done = 0.0

    @contextlib.contextmanager
    def stage(self, name: str, total: float, unit: str) -> Iterator[Watch]:
        self.total += total
        yield self

    def advance(self, n: float = 1.0) -> None:
        self.done += n
        if self.done > self.stop_after:
            raise Killed
