"""One cell of a benchmark: every method checked against the reference, then timed in turns."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import psutil
import torch
from torch import Tensor

from moesaic._errors import InputError, RunError
from moesaic.evaluation.bench.roof import Probe, Roof
from moesaic.evaluation.bench.timing import in_turns, measure
from moesaic.evaluation.machine import machine_info, source_commit
from moesaic.ops.cpu import library

# Relative root mean square difference to the float32 reference that rounding explains.
TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2}
# Of the logits of a whole model, where every layer rounds what the one before gave. SmolLM2-135M
# cut to 3/8 and not trained makes up to 0.12 of what is 0.02 in its parent, and 0.32 of int8's 0.1.
MODEL_TOLERANCE = {"float32": 1e-3, "bfloat16": 2e-1, "int8": 5e-1}
OURS, DENSE = "moesaic", "dense"


@dataclass(frozen=True, slots=True)
class Method:
    """One way to compute the cell.

    Attributes:
        calls: The same computation on copies of the weights, which run in turn.
        expected: Output of the float32 reference.
        checked: What gives the output to compare where a call gives something else.
        weights: How weights are stored where not in the dtype; has its own tolerance and no roof.
    """

    calls: Sequence[Callable[[], object]]
    expected: Tensor
    checked: Callable[[], Tensor] | None = None
    weights: str = ""


@dataclass(slots=True)
class Methods:
    """The methods of a cell, and why others are not in it."""

    running: dict[str, Method] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)


def check(
    methods: Mapping[str, Method], dtype: str, tolerance: Mapping[str, float] = TOLERANCE
) -> dict[str, float]:
    """Compare every method with its reference.

    Args:
        methods: By name.
        dtype: Of their weights.
        tolerance: Largest difference, by how weights are stored.

    Returns:
        Relative root mean square difference by name.

    Raises:
        RunError: In one sentence, if one differs by more than rounding does.
    """
    differences = {}
    for name, method in methods.items():
        found = (method.checked or method.calls[0])()
        assert isinstance(found, Tensor)
        difference = relative_rms(found, method.expected)
        weights = method.weights or dtype
        if not difference <= tolerance[weights]:
            raise RunError(
                f"{name} differs from the float32 reference by {difference:.2g} (relative root "
                f"mean square), more than the {tolerance[weights]:g} of {weights}; no speed is "
                "reported until it is right"
            )
        differences[name] = difference
    return differences


def relative_rms(found: Tensor, expected: Tensor) -> float:
    """Root mean square of the difference over that of the expected."""
    wide = expected.double()
    return float((found.double() - wide).square().mean().sqrt() / wide.square().mean().sqrt())


def time_cell(
    methods: Methods,
    dtype: str,
    *,
    seconds: float,
    probes: Mapping[str, Probe] | None = None,
    tolerance: Mapping[str, float] = TOLERANCE,
) -> tuple[float, list[dict[str, Any]]]:
    """Check the methods, then time them and what the machine could do at best, in turns.

    Args:
        methods: What runs and what does not.
        dtype: Of the weights.
        seconds: Budget for all methods together.
        probes: Of the physical limit, where it is known.
        tolerance: Largest difference to the reference, by how weights are stored.

    Returns:
        The shortest time that the machine allowed, in seconds (0 without probes), and a row per
        method, the skipped ones with their reason.

    Raises:
        RunError: If a method is wrong; nothing is timed then.
    """
    differences = check(methods.running, dtype, tolerance)
    calls = {name: in_turns(method.calls) for name, method in methods.running.items()}
    probes = {f"the limit of {name}": probe for name, probe in (probes or {}).items()}
    limits = {name: probe.call for name, probe in probes.items()}
    # The check has warmed up every method.
    times = measure(calls | limits, seconds=seconds, warmup=1)
    least = [times.pop(name).median_s * probe.times for name, probe in probes.items()]
    roof_s = max(least, default=0.0)
    dense = times.get(DENSE)
    rows: list[dict[str, Any]] = [
        {
            "method": name,
            "median_ms": 1e3 * timing.median_s,
            "low_ms": 1e3 * timing.low_s,
            "high_ms": 1e3 * timing.high_s,
            "samples": timing.samples,
            "calls_per_sample": timing.calls,
            "faster_than_dense": None if dense is None else dense.median_s / timing.median_s,
            "times_roof": None
            if not roof_s or methods.running[name].weights
            else timing.median_s / roof_s,
            "difference": differences[name],
        }
        for name, timing in times.items()
    ]
    rows += [{"method": name, "skipped": why} for name, why in methods.skipped.items()]
    return roof_s, rows


def document(
    kind: str, config: Any, cells: list[dict[str, Any]], *, dtype: str, roof: Roof | None = None
) -> dict[str, Any]:
    """Put a benchmark together: what was measured, where, when and by which commit."""
    return {
        "schema": 1,
        "kind": f"bench {kind}",
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": source_commit(),
        "machine": machine_info(dtype),
        "native_kernels": library.state(),
        "config": config.to_plain(),
        "roof": None if roof is None else roof.to_plain(),
        "cells": cells,
    }


def require_memory(num_bytes: float, what: str) -> None:
    """Refuse what does not fit into the free memory.

    Raises:
        InputError: If it does not.
    """
    free = psutil.virtual_memory().available
    if num_bytes > free:
        raise InputError(
            f"{what} needs about {num_bytes / 1e9:.1f} GB of memory and {free / 1e9:.1f} GB are "
            "free; choose a smaller shape or lower working_set_mb"
        )


def use_threads(threads: int) -> None:
    """Make torch use so many threads; 0 leaves what it has."""
    if threads:
        torch.set_num_threads(threads)
