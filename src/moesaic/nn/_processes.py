"""Sums over the processes that train together."""

from __future__ import annotations

from torch import Tensor, distributed


def sum_over_processes(values: Tensor) -> Tensor:
    """Sum a tensor over all processes, in place; one process alone keeps it as it is.

    Returns:
        The same tensor.
    """
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(values)
    return values
