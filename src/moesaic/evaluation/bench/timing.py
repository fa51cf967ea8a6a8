"""Times of several calls, measured in turns.

A machine shared with others speeds up and slows down; calls measured one after the other would each
meet another machine. Here every round runs every call, and what is compared is medians.
"""

from __future__ import annotations

import gc
import itertools
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from moesaic._errors import InputError
from moesaic.evaluation._mode import rotated

# A sample shorter than this is mostly the clock and the interpreter.
MIN_SAMPLE_S = 1e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Seconds of one call: the median and the quartiles of its samples.

    Attributes:
        median_s: Of one call.
        low_s: First quartile.
        high_s: Third quartile.
        samples: How many were taken.
        calls: Calls in one sample.
    """

    median_s: float
    low_s: float
    high_s: float
    samples: int
    calls: int


def measure(
    calls: Mapping[str, Callable[[], object]],
    *,
    seconds: float,
    warmup: int = 2,
    min_rounds: int = 5,
    max_rounds: int = 1000,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Time calls in rounds, each round in another order.

    Args:
        calls: By name.
        seconds: Budget of all rounds together; `min_rounds` are made even beyond it.
        warmup: Untimed calls of each before.
        min_rounds: Rounds at least.
        max_rounds: Rounds at most.
        clock: Gives seconds.

    Raises:
        InputError: If there is nothing to time, or no time for it.
    """
    if not calls or seconds <= 0:
        raise InputError(
            f"timing needs calls and seconds above 0, got {len(calls)} calls and {seconds} seconds"
        )
    names = list(calls)
    sizes = {name: _calls_per_sample(calls[name], warmup, clock) for name in names}
    times: dict[str, list[float]] = {name: [] for name in names}
    collecting = gc.isenabled()
    gc.disable()
    try:
        end = clock() + seconds
        for i in range(max_rounds):
            if i >= min_rounds and clock() >= end:
                break
            for name in rotated(names, i):
                times[name].append(_sample(calls[name], sizes[name], clock))
    finally:
        if collecting:
            gc.enable()
    return {name: _summary(times[name], sizes[name]) for name in names}


def in_turns(calls: Sequence[Callable[[], object]]) -> Callable[[], object]:
    """Make one call of several that run in turn, so that none finds its own weights in a cache."""
    order = itertools.cycle(calls)
    return lambda: next(order)()


def _calls_per_sample(call: Callable[[], object], warmup: int, clock: Callable[[], float]) -> int:
    for _ in range(warmup):
        call()
    taken = _sample(call, 1, clock)
    return max(1, math.ceil(MIN_SAMPLE_S / max(taken, 1e-7)))


def _sample(call: Callable[[], object], size: int, clock: Callable[[], float]) -> float:
    """Seconds of one call, as the mean of `size`."""
    start = clock()
    for _ in range(size):
        call()
    return (clock() - start) / size


def _summary(times: list[float], size: int) -> Timing:
    low, high = np.percentile(times, (25, 75))
    return Timing(
        median_s=statistics.median(times),
        low_s=float(low),
        high_s=float(high),
        samples=len(times),
        calls=size,
    )
