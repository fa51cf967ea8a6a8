"""The partition of DSMoE, arXiv:2502.12455: equal blocks, order unchanged."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moesaic.conversion.partition._base import PartitionInput


@dataclass(frozen=True, slots=True, kw_only=True)
class ContiguousConfig:
    """Contiguous blocks have no settings."""


def contiguous(source: PartitionInput, config: ContiguousConfig) -> Tensor:
    """Keep the neurons in their order.

    The cut of DSMoE, arXiv:2502.12455. In a pretrained FFN the order of neurons means nothing, so
    this behaves like a random partition; use it to reproduce the paper.

    Returns:
        The identity permutation, (F,) int64.
    """
    return torch.arange(source.num_neurons)
