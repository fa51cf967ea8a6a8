"""The partition of LLaMA-MoE, arXiv:2406.16554: equal random blocks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from moesaic.conversion.partition._base import PartitionInput
from moesaic.conversion.partition._common import order_by_block


@dataclass(frozen=True, slots=True, kw_only=True)
class RandomConfig:
    """Random blocks have no settings; the seed comes with the input."""


def random(source: PartitionInput, config: RandomConfig) -> Tensor:
    """Deal the neurons to the experts at random, equally many to each.

    LLaMA-MoE, arXiv:2406.16554: the list of expert numbers, each repeated F / E times, is shuffled.
    Its authors found it the best start when much training follows.

    Returns:
        The permutation, (F,) int64; a block keeps its neurons in their old order.
    """
    rng = np.random.default_rng(source.seed)
    label_F = rng.permutation(np.arange(source.num_neurons) % source.num_experts)
    return order_by_block(label_F)
