"""A value that changes once.

Source: Sigma-MoE-Tiny, arXiv 2512.16248, whose lower layers use more experts in a first stage.
"""

from __future__ import annotations


def switch(progress: float, start: float, end: float) -> float:
    """Stay at start until all steps are done.

    Args:
        progress: Part of the steps done, in [0, 1].
        start: Value before 1.
        end: Value at 1.

    Returns:
        The value.
    """
    return end if progress >= 1.0 else start
