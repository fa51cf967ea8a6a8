"""What routers and experts have in common: optimiser steps, and rates to learn at."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from types import MappingProxyType

from torch import nn

_NO_FACTORS: Mapping[str, float] = MappingProxyType({})


class Part(nn.Module, ABC):
    """A part of a layer that trains.

    Attributes:
        rate_factors: By name, its parameters that learn at so many times the rate of others and
            without weight decay; see `moesaic.nn.groups`.
    """

    rate_factors: Mapping[str, float] = _NO_FACTORS

    @abstractmethod
    def reset_parameters(self) -> None:
        """Draw fresh weights."""

    def end_step(self) -> None:
        """Act on the optimiser step that just ended; most parts do nothing.

        Some move a bias by the loads of its passes, some hand on what its gradients said; those
        with a schedule count it on their `StepClock`.
        """

    def forget_step(self) -> None:
        """Forget what passes left behind that no checkpoint holds; most parts keep nothing."""
