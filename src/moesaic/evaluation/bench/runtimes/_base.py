"""The interface of a runtime that holds one form of a model.

Shapes: N chunks, S tokens of a chunk.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
import torch.nn.functional as nnf
from torch import Tensor

Ids = Sequence[Sequence[int]]

# Chunks of text beyond those scored: llama-perplexity may end before it has said its last lines.
SPARE_CHUNKS = 2


class Runtime(ABC):
    """A model, ready to run."""

    @abstractmethod
    def write(self, prompts: Ids, new_tokens: int) -> list[list[int]]:
        """Continue prompts of one length greedily, all at once; no token ends them."""

    @abstractmethod
    def nll(self, chunks_NS: Tensor) -> float:
        """Mean loss of the second half of each chunk, as `llama-perplexity` takes it.

        Args:
            chunks_NS: Token ids of consecutive text.

        Returns:
            In nats per token.
        """

    @abstractmethod
    def close(self) -> None:
        """End what it started."""


def first_scored(length: int) -> int:
    """Position of the first token that is scored in a chunk; those before it are context."""
    return length // 2 + 1


def half_nll(logits_RV: Tensor, chunk_S: Tensor) -> float:
    """Mean loss of the second half of a chunk.

    Args:
        logits_RV: After each position from half of the chunk to its last but one.
        chunk_S: The chunk.
    """
    targets_R = chunk_S[first_scored(len(chunk_S)) :]
    return float(nnf.cross_entropy(logits_RV.float(), targets_R))


def mean(values: list[float]) -> float:
    """The mean of some losses."""
    return float(torch.tensor(values, dtype=torch.float64).mean())
