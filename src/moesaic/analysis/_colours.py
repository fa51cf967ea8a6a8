"""A colour scale for fractions: dark blue over teal to yellow, readable in greyscale.

Its lightness in OKLab grows evenly, so lighter is more for every kind of sight; the hue only helps.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

LEVELS = 32
# From here on black text is readable, so a running text need not change its ink.
FIRST_BRIGHT = 16
_FROM_LAB = (0.26, 0.0, -0.10)
_OVER_LAB = (0.60, -0.17, -0.03)
_TO_LAB = (0.94, -0.03, 0.17)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """Maps values in [low, high] to a colour level; outside it the ends are used.

    The levels are `first` to LEVELS - 1.
    """

    low: float
    high: float
    first: int = 0

    def level(self, value: float) -> int:
        """Get the level of a value."""
        share = (value - self.low) / (self.high - self.low)
        count = LEVELS - self.first
        return self.first + min(count - 1, max(0, int(share * count)))


def scale_for(
    values: Sequence[float], *, step: float = 0.05, trim: float = 0.02, first: int = 0
) -> Scale:
    """Fit a scale to values in [0, 1], with round ends, so that small differences can be seen.

    Args:
        values: The values to show; those not finite are ignored.
        step: The ends are multiples of this.
        trim: Share of the values at each end that may lie outside, so that one outlier does not
            flatten all others.
        first: The lowest level to use.
    """
    finite = sorted(v for v in values if math.isfinite(v))
    if not finite:
        return Scale(low=0.0, high=1.0, first=first)
    cut = int(trim * len(finite))
    # The slack keeps 0.6 / 0.05 = 11.999... on the step it stands for.
    low = max(0.0, math.floor(finite[cut] / step + 1e-9) * step)
    high = min(1.0, math.ceil(finite[len(finite) - 1 - cut] / step - 1e-9) * step)
    if high <= low:
        low, high = max(0.0, low - step), min(1.0, low + step)
    if high <= low:
        low = high - step
    return Scale(low=round(low, 6), high=round(high, 6), first=first)


def _linear_rgb(share: float) -> tuple[float, float, float]:
    """Follow a quadratic curve in OKLab (Ottosson 2020) and convert to linear sRGB in [0, 1]."""
    rest = 1 - share
    lightness, a, b = (
        rest * rest * start + 2 * rest * share * over + share * share * end
        for start, over, end in zip(_FROM_LAB, _OVER_LAB, _TO_LAB, strict=True)
    )
    long = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3
    medium = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3
    short = (lightness - 0.0894841775 * a - 1.2914855480 * b) ** 3
    red = 4.0767416621 * long - 3.3077115913 * medium + 0.2309699292 * short
    green = -1.2684380046 * long + 2.6097574011 * medium - 0.3413193965 * short
    blue = -0.0041960863 * long - 0.7034186147 * medium + 1.7076147010 * short
    return tuple(min(1.0, max(0.0, c)) for c in (red, green, blue))  # type: ignore[return-value]


def rgb(level: int) -> tuple[int, int, int]:
    """Get the 8-bit sRGB colour of a level."""
    red, green, blue = (
        12.92 * c if c <= 0.0031308 else 1.055 * c ** (1 / 2.4) - 0.055
        for c in _linear_rgb(level / (LEVELS - 1))
    )
    return round(255 * red), round(255 * green), round(255 * blue)


def luminance(level: int) -> float:
    """Get the relative luminance of a level, as contrast rules define it."""
    red, green, blue = _linear_rgb(level / (LEVELS - 1))
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def hex_colour(level: int) -> str:
    """Write the colour of a level for CSS."""
    return "#{:02x}{:02x}{:02x}".format(*rgb(level))


def text_colour(level: int) -> str:
    """Choose black or white, whichever contrasts more with a level: at least 4.58 to 1."""
    light = luminance(level)
    return "#fff" if 1.05 / (light + 0.05) >= (light + 0.05) / 0.05 else "#000"


def png(rows: Sequence[Sequence[int | None]]) -> bytes:
    """Encode rows of levels as a PNG with a palette; None is transparent.

    Args:
        rows: Equally long rows of levels, the top row first.
    """
    palette = b"".join(bytes(rgb(level)) for level in range(LEVELS)) + b"\0\0\0"
    opacity = b"\xff" * LEVELS + b"\0"
    pixels = b"".join(
        b"\0" + bytes(LEVELS if level is None else level for level in row) for row in rows
    )
    header = struct.pack(">IIBBBBB", len(rows[0]), len(rows), 8, 3, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        _chunk(kind, body)
        for kind, body in (
            (b"IHDR", header),
            (b"PLTE", palette),
            (b"tRNS", opacity),
            (b"IDAT", zlib.compress(pixels, 9)),
            (b"IEND", b""),
        )
    )


def _chunk(kind: bytes, body: bytes) -> bytes:
    checksum = zlib.crc32(kind + body)
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", checksum)
