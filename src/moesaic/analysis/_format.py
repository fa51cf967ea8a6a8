"""Numbers as people read them: three sensible digits, k/M/G, percentages, ranges."""

from __future__ import annotations

import math
from collections.abc import Sequence

NOT_MEASURED = "-"
_SUFFIXES = ("", "k", "M", "G", "T", "P", "E")


def significant(value: float, digits: int = 3) -> str:
    """Write a number with a fixed count of significant digits and no exponent in common ranges."""
    if not math.isfinite(value):
        return str(value)
    if value == 0:
        return "0"
    # Rounding first, so that 9.996 becomes 10.0 and not 10.00.
    rounded = float(f"{value:.{digits - 1}e}")
    exponent = math.floor(math.log10(abs(rounded)))
    if not -4 <= exponent < 9:
        return f"{value:.{digits - 1}e}"
    return f"{rounded:.{max(0, digits - 1 - exponent)}f}"


def scaled(value: float) -> str:
    """Write a count with k, M, G, T, P or E (powers of 1000); below 1000 integers stay exact."""
    if not math.isfinite(value):
        return str(value)
    if abs(value) < 1000 and float(value).is_integer():
        return str(int(value))
    magnitude = value
    for suffix in _SUFFIXES:
        # 999.6 would be written 1000 with three digits, so it moves to the next suffix.
        if abs(magnitude) < 999.5 or suffix == _SUFFIXES[-1]:
            return significant(magnitude) + suffix
        magnitude /= 1000
    raise AssertionError("the last suffix always returns")


def byte_size(value: float) -> str:
    """Write a size in decimal units: 269 MB."""
    text = scaled(value)
    return f"{text[:-1]} {text[-1]}B" if text[-1] in _SUFFIXES else f"{text} B"


def percent(fraction: float) -> str:
    """Write a fraction as a percentage, with a decimal only where it can be read."""
    if not math.isfinite(fraction):
        return str(fraction)
    value = 100 * fraction
    if value == 0 or abs(value) >= 99.95:
        return f"{value:.0f}%"
    return f"{value:.1f}%" if abs(value) >= 1 else f"{value:.2g}%"


def whole_percent(fraction: float) -> str:
    """Write a fraction as a percentage for a sentence: no decimals from 10% on."""
    if abs(fraction) < 0.0995 or not math.isfinite(fraction):
        return percent(fraction)
    return f"{100 * fraction:.0f}%"


def multiple(ratio: float) -> str:
    """Write a ratio as 1.21x."""
    if not math.isfinite(ratio):
        return str(ratio)
    if 0.1 <= ratio < 9.995:
        return f"{ratio:.2f}x"
    return f"{significant(ratio)}x"


def tick(value: float) -> str:
    """Write a round number beside an axis: no trailing zeros."""
    return scaled(value) if abs(value) >= 10_000 else f"{value:.6g}"


def tick_percent(fraction: float) -> str:
    """Write a round fraction beside an axis as a percentage: no trailing zeros."""
    return f"{100 * fraction:.4g}%"


def integer(value: float) -> str:
    """Write a count in full with thousands separated: 33,792."""
    return f"{value:,.0f}" if math.isfinite(value) else str(value)


def markdown_table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lay out a table for a Markdown document."""
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
