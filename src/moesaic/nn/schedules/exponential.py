"""A value that changes by the same factor at every step.

Source: EvoMoE, arXiv 2112.14397, for the temperature of its gate.
"""

from __future__ import annotations

from moesaic._errors import InputError


def exponential(progress: float, start: float, end: float) -> float:
    """Go from start to end along a line of logarithms.

    Args:
        progress: Part of the steps done, in [0, 1].
        start: Value at 0, above 0.
        end: Value at 1, above 0.

    Returns:
        The value.

    Raises:
        InputError: If a value is not above 0.
    """
    if min(start, end) <= 0.0:
        raise InputError(
            f"an exponential schedule must start and end above 0, got {start} and {end}; use linear"
        )
    value: float = start * (end / start) ** progress
    return value
