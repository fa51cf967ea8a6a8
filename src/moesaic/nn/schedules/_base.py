"""What a schedule is as data, and the count of training steps that it follows."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moesaic._errors import InputError
from moesaic.nn.schedules._table import SCHEDULES


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduleConfig:
    """A value that changes over the first optimiser steps of training and then stays.

    Attributes:
        start: Value at the first step.
        end: Value from step `steps` on.
        steps: Optimiser steps it takes; at 0 the value is `end` from the beginning.
        shape: Name of how it gets from one to the other.
    """

    start: float
    end: float
    steps: int
    shape: str = "linear"

    def __post_init__(self) -> None:
        if not (math.isfinite(self.start) and math.isfinite(self.end)):
            raise InputError(f"start and end must be finite, got {self.start} and {self.end}")
        if self.steps < 0:
            raise InputError(f"steps must be at least 0, got {self.steps}; 0 is over at once")
        # A name or values that do not fit are refused here and not at the first step.
        SCHEDULES.load(self.shape)(0.0, self.start, self.end)

    def at(self, step: int) -> float:
        """Value after this many optimiser steps."""
        if step >= self.steps:
            return self.end
        value: float = SCHEDULES.load(self.shape)(step / self.steps, self.start, self.end)
        return value


class StepClock(nn.Module):
    """The optimiser steps that a router has been trained for; they are saved with its weights.

    A run that is resumed, or a layer that is loaded, goes on where its schedules were.

    Attributes:
        steps_done: Their number, an int64 scalar.
    """

    steps_done: Tensor

    def __init__(self) -> None:
        super().__init__()
        # Part of the checkpoint format.
        self.register_buffer("steps_done", torch.empty((), dtype=torch.int64))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Go back to the first step."""
        nn.init.zeros_(self.steps_done)

    def end_step(self) -> None:
        """Count an optimiser step."""
        self.steps_done += 1

    def step(self) -> int:
        """How many steps have ended."""
        return int(self.steps_done)
