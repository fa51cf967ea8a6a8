"""Balanced clustering of weight rows, after MoEfication, arXiv:2110.01786.

Letters: F neurons, D model width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from moesaic._errors import InputError
from moesaic.conversion.partition._base import PartitionInput
from moesaic.conversion.partition._common import balanced_kmeans, number_blocks, order_by_block


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightsConfig:
    """Settings of the clustering on weights.

    Attributes:
        rows: Matrix whose rows are clustered. `auto` takes the one that feeds the activation: the
            gate of a gated FFN, else the up matrix; measured on a gated model, the gate separates
            better than the up matrix or both.
        max_iterations: Bound on the iterations of k-means; more than 50 rarely move anything.
    """

    rows: Literal["auto", "up", "gate", "both"] = "auto"
    max_iterations: int = 50

    def __post_init__(self) -> None:
        if self.max_iterations < 1:
            raise InputError(f"max_iterations must be at least 1, got {self.max_iterations}")


def weights(source: PartitionInput, config: WeightsConfig) -> Tensor:
    """Put neurons with similar weight rows in one block; needs no text.

    MoEfication, arXiv:2110.01786: balanced k-means on the rows of the first FFN matrix, here scaled
    to unit length as in LLaMA-MoE. Our departure: the balanced assignment is solved exactly.

    Returns:
        The permutation, (F,) int64; the block with the lowest neuron comes first.

    Raises:
        InputError: If a matrix that `rows` names is missing or not finite.
    """
    rows = config.rows
    if rows == "auto":
        rows = "up" if source.gate_FD is None else "gate"
    named = {"up": source.up_FD, "gate": source.gate_FD}
    chosen = []
    for name in ("up", "gate") if rows == "both" else (rows,):
        rows_FD = named[name]
        if rows_FD is None:
            raise InputError(
                f"partition 'weights' with rows={rows} needs the {name} matrix; "
                f"choose rows={'up' if name == 'gate' else 'gate'}, or give it"
            )
        if not bool(torch.isfinite(rows_FD).all()):
            raise InputError(f"the {name} matrix has weights that are not finite; check the model")
        chosen.append(functional.normalize(rows_FD.detach().to("cpu", torch.float32), dim=1))
    label_F = balanced_kmeans(
        torch.cat(chosen, dim=1).numpy(),
        source.num_experts,
        max_iterations=config.max_iterations,
        seed=source.seed,
    )
    return order_by_block(number_blocks(label_F, np.zeros(source.num_neurons)))
