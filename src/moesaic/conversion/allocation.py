"""How much of the active budget each layer gets.

Ours. The cost of running layer l at the active fraction a is about s_l * e_l(a): its sensitivity
(`moesaic.calibration.sensitivity`) times the error that its fitted router makes there. The cheapest
fractions with a given mean are those where every layer pays the same price for a little less.

Letters: L layers.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def allocate(
    sensitivities_L: Sequence[float],
    errors_L: Sequence[Sequence[float]],
    fractions: Sequence[float],
    active: float,
) -> list[float]:
    """Choose an active fraction for every layer.

    Args:
        sensitivities_L: Sensitivity of every layer.
        errors_L: Error of every layer at each of `fractions`.
        fractions: Ascending; the last is 1.
        active: Mean to meet.

    Returns:
        The fractions; their mean is `active` to 1e-3 where the range allows.
    """
    fine = np.linspace(fractions[0], fractions[-1], 1 + 10 * (len(fractions) - 1))
    cost_LA = np.stack(
        [
            s * np.interp(fine, fractions, _convex(np.asarray(fractions), np.asarray(errors)))
            for s, errors in zip(sensitivities_L, errors_L, strict=True)
        ]
    )
    low, high = 0.0, 1e6 * float(cost_LA.max()) + 1.0
    for _ in range(200):
        price = (low + high) / 2
        chosen_L = fine[(cost_LA + price * fine).argmin(1)]
        if chosen_L.mean() > active:
            low = price
        else:
            high = price
    # Both sides of the step that the last bisection stands on; mixing them meets the mean.
    rich_L = fine[(cost_LA + low * fine).argmin(1)]
    lean_L = fine[(cost_LA + high * fine).argmin(1)]
    gap = rich_L.mean() - lean_L.mean()
    part = 0.0 if gap == 0 else float(np.clip((active - lean_L.mean()) / gap, 0.0, 1.0))
    return [float(value) for value in lean_L + part * (rich_L - lean_L)]


def _convex(x: Floats, y: Floats) -> Floats:
    """Lower convex envelope of a curve, so that prices have one answer."""
    hull = [0]
    for i in range(1, len(x)):
        while len(hull) > 1:
            a, b = hull[-2], hull[-1]
            if (y[b] - y[a]) * (x[i] - x[a]) < (y[i] - y[a]) * (x[b] - x[a]):
                break
            hull.pop()
        hull.append(i)
    envelope: Floats = np.interp(x, x[hull], y[hull])
    return envelope
