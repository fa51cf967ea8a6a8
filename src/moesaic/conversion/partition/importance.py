"""A partition by importance (ours): the strongest neurons together, block 0 first."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from moesaic.conversion.partition._base import PartitionInput


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportanceConfig:
    """Blocks by importance have no settings."""


def importance(source: PartitionInput, config: ImportanceConfig) -> Tensor:
    """Sort the neurons by the energy they add to the FFN output, largest first.

    Ours. Block 0 is then worth keeping for nearly every token and the last for few: close to static
    pruning, and the order to choose when one model must be cut to several sizes.

    Returns:
        The permutation, (F,) int64; equal energies keep their old order.

    Raises:
        InputError: If the statistic `energy_F` is missing.
    """
    energy_F = source.stat("energy_F", "importance")
    return energy_F.argsort(descending=True, stable=True)
