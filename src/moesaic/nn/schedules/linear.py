"""A value that changes by the same amount at every step.

Source: EvoMoE, arXiv 2112.14397, for the temperature of its gate.
"""

from __future__ import annotations


def linear(progress: float, start: float, end: float) -> float:
    """Go from start to end along a line.

    Args:
        progress: Part of the steps done, in [0, 1].
        start: Value at 0.
        end: Value at 1.

    Returns:
        The value.
    """
    return start + progress * (end - start)
