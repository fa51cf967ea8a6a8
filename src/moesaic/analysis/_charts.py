"""Charts as positions in percent of their plot area; the template draws them as inline SVG.

Percentages let a chart take any width while its text keeps its size, from a phone to paper.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

# A line is one path in a square of this size that is stretched over the plot area.
_PATH_SIZE = 1000
_MAX_POINTS = 400
# How many colours, dashes and shapes of points the template has.
NUM_STYLES = 6
# Above this ratio of largest to smallest value, a linear axis hides the small ones.
_LOG_FROM = 8.0
# Spans below this, absolute or relative to the values, are rounding and not a range.
_TINY = 1e-12


@dataclass(frozen=True, slots=True, kw_only=True)
class Tick:
    """A labelled position of an axis, in percent of the plot area."""

    at: float
    label: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """One point: its place in percent, the text shown on hover, its name and interval."""

    x: float
    y: float
    title: str
    label: str = ""
    label_left: bool = False
    y_low: float | None = None
    y_high: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """A line through points, or points alone; `style` numbers its colour, dashes and shape."""

    name: str
    style: int
    marks: list[Mark]
    path: str = ""
    strong: bool = False

    @property
    def colour(self) -> int:
        """Number of the colour, 0 to 5."""
        return self.style % NUM_STYLES

    @property
    def shape(self) -> int:
        """Number of the shape and the dashes, 0 to 5; with `colour` it repeats after 36."""
        return (self.style + self.style // NUM_STYLES) % NUM_STYLES


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """Everything the template needs to draw one chart."""

    title: str
    x_title: str
    y_title: str
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    series: list[Series]
    description: str
    reference: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """Maps values to percent along an axis, linear or logarithmic."""

    low: float
    high: float
    log: bool = False

    def at(self, value: float) -> float:
        """Get the place of a value, 0 to 100."""
        low, high = self.low, self.high
        if self.log:
            low, high, value = math.log(low), math.log(high), math.log(value)
        return round(100 * (value - low) / (high - low), 2)


@dataclass(frozen=True, slots=True, kw_only=True)
class Points:
    """The values of a series before they have a place."""

    name: str
    x: list[float]
    y: list[float]
    titles: list[str]
    line: bool = True
    strong: bool = False
    low: list[float | None] = field(default_factory=list)
    high: list[float | None] = field(default_factory=list)
    style: int | None = None


def axis_for(values: Sequence[float], *, allow_log: bool = False) -> Axis:
    """Fit an axis around values, with a margin."""
    low, high = min(values), max(values)
    if allow_log and low > _TINY and high / low >= _LOG_FROM:
        margin = (high / low) ** 0.05
        return Axis(low=low / margin, high=high * margin, log=True)
    size = max(abs(low), abs(high))
    span = high - low
    if span <= _TINY * size or size < _TINY:
        span = 0.2 * size if size >= _TINY else 1.0
    return Axis(low=low - 0.06 * span, high=high + 0.06 * span)


def ticks_for(axis: Axis, write: Callable[[float], str], *, count: int = 5) -> list[Tick]:
    """Choose about `count` round positions inside an axis."""
    values = _log_steps(axis, count) if axis.log else _steps(axis, count)
    return [Tick(at=axis.at(value), label=write(value)) for value in values]


def _steps(axis: Axis, count: int) -> list[float]:
    rough = (axis.high - axis.low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
    first = math.ceil(axis.low / step - 1e-9)
    last = math.floor(axis.high / step + 1e-9)
    return [float(f"{i * step:.15g}") for i in range(first, last + 1)]


def _log_steps(axis: Axis, count: int) -> list[float]:
    low, high = math.floor(math.log10(axis.low)), math.ceil(math.log10(axis.high))
    inside: list[float] = []
    for factors in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7)):
        candidates = [m * 10.0**p for p in range(low, high + 1) for m in factors]
        inside = [c for c in candidates if axis.low <= c <= axis.high]
        if len(inside) >= min(count, 4):
            break
    stride = max(1, math.ceil(len(inside) / (2 * count)))
    return inside[::stride]


def integer_ticks(count: int, axis: Axis, *, wanted: int = 8) -> list[Tick]:
    """Label the integers 0 to count - 1 at round distances."""
    step = next(s for s in (1, 2, 5, 10, 20, 50, 100, 500, 10**9) if count / s <= wanted)
    return [Tick(at=axis.at(i), label=str(i)) for i in range(0, count, step)]


def place(points: Points, x_axis: Axis, y_axis: Axis, style: int) -> Series:
    """Give every point of a series its place; points that are not finite are dropped."""
    marks = []
    for index, (x, y) in enumerate(zip(points.x, points.y, strict=True)):
        if not (math.isfinite(x) and math.isfinite(y)):
            continue
        low = points.low[index] if points.low else None
        high = points.high[index] if points.high else None
        bounded = low is not None and high is not None and low != high and _finite(low, high)
        marks.append(
            Mark(
                x=x_axis.at(x),
                y=100 - y_axis.at(y),
                title=points.titles[index],
                y_low=100 - y_axis.at(low) if bounded and low is not None else None,
                y_high=100 - y_axis.at(high) if bounded and high is not None else None,
            )
        )
    path = ""
    if points.line and len(marks) > 1:
        scale = _PATH_SIZE / 100
        path = "M" + "L".join(f"{m.x * scale:.0f} {m.y * scale:.0f}" for m in marks)
    return Series(name=points.name, style=style, marks=marks, path=path, strong=points.strong)


def line_chart(
    series: Sequence[Points],
    *,
    title: str,
    x_title: str,
    y_title: str,
    write_x: Callable[[float], str],
    write_y: Callable[[float], str],
    x_axis: Axis | None = None,
    y_axis: Axis | None = None,
    x_ticks: list[Tick] | None = None,
    allow_log: bool = False,
    reference: float | None = None,
) -> Chart | None:
    """Lay out a chart of lines and points; None where no value is finite."""
    xs = [x for p in series for x, y in zip(p.x, p.y, strict=True) if _finite(x, y)]
    ys = [y for p in series for x, y in zip(p.x, p.y, strict=True) if _finite(x, y)]
    if not xs:
        return None
    x_axis = x_axis or axis_for(xs)
    bounds = [b for p in series for b in (*p.low, *p.high) if b is not None and _finite(b)]
    around = [*ys, *bounds, *([] if reference is None else [reference])]
    y_axis = y_axis or axis_for(around, allow_log=allow_log)
    placed = [
        place(p, x_axis, y_axis, i if p.style is None else p.style) for i, p in enumerate(series)
    ]
    names = ", ".join(s.name for s in placed)
    return Chart(
        title=title,
        x_title=x_title,
        y_title=y_title + (" (logarithmic)" if y_axis.log else ""),
        x_ticks=ticks_for(x_axis, write_x) if x_ticks is None else x_ticks,
        y_ticks=ticks_for(y_axis, write_y),
        series=placed,
        description=(
            f"{title}. {y_title}, from {write_y(min(ys))} to {write_y(max(ys))}, against "
            f"{x_title}, from {write_x(min(xs))} to {write_x(max(xs))}. Shown: {names}."
        ),
        reference=None if reference is None else 100 - y_axis.at(reference),
    )


def _finite(*values: float) -> bool:
    return all(math.isfinite(v) for v in values)


def label_points(chart: Chart) -> Chart:
    """Name single points beside them, except where it would cover another point or name."""
    places = [(m.x, m.y) for s in chart.series for m in s.marks]
    labelled: list[Series] = []
    spans: list[tuple[float, float, float]] = []
    for one in chart.series:
        if len(one.marks) != 1:
            labelled.append(one)
            continue
        mark = one.marks[0]
        left = mark.x > 70
        width = 2 + 1.1 * len(one.name)
        start, end = (mark.x - width, mark.x - 0.5) if left else (mark.x + 0.5, mark.x + width)
        crowded = any(start <= x <= end and abs(y - mark.y) < 6 for x, y in places)
        crowded |= any(a <= end and b >= start and abs(y - mark.y) < 6 for a, b, y in spans)
        if crowded or start < 0 or end > 100:
            labelled.append(one)
            continue
        spans.append((start, end, mark.y))
        named = replace(mark, label=one.name, label_left=left)
        labelled.append(replace(one, marks=[named]))
    return replace(chart, series=labelled)


def thin(values: Sequence[float], *, limit: int = _MAX_POINTS) -> tuple[list[float], int]:
    """Average neighbours until at most `limit` values are left; returns them and how many each."""
    size = max(1, math.ceil(len(values) / limit))
    groups = [values[i : i + size] for i in range(0, len(values), size)]
    return [sum(group) / len(group) for group in groups], size
