"""Measuring without leaving a trace, and without favouring who comes first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import nn

Item = TypeVar("Item")


@contextmanager
def measuring(model: nn.Module) -> Iterator[None]:
    """Put every module in evaluation mode, without gradients; each returns to its own mode."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            # Not `train()`, which would also switch its children.
            module.training = True


def rotated(items: Sequence[Item], by: int) -> list[Item]:
    """Start with another item in each round, so that none always follows the same one."""
    by %= len(items)
    return [*items[by:], *items[:by]]
