"""The history of training health as one HTML page that needs no network and no script.

It reads the JSON lines that `moesaic.training.health` writes, and draws, for every layer, how busy
each expert was over the steps.

Shapes: E experts, of one layer.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moesaic._errors import InputError
from moesaic._files import atomic_write
from moesaic.analysis import _charts, _colours, _format
from moesaic.analysis._activation import Legend
from moesaic.analysis._page import clean, environment

NAME = "health.jsonl"
_MEASURES = (
    ("load", "Load of the busiest expert over the mean", "times the mean", max),
    ("dead", "Experts without a token", "experts", max),
    ("entropy", "Entropy of the router over its largest", "part of log E", min),
    ("saturation", "Gates above 0.99", "part of the gates", max),
)
_KNOWN = ("entropy", "saturation")
# Columns of a heatmap; more steps are summed up.
_COLUMNS = 240
# Loads at and beyond this many times the mean have one colour.
_BUSIEST = 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerMap:
    """One layer over time: its heatmap, and its numbers over all steps."""

    name: str
    num_experts: int
    num_columns: int
    picture: str
    ticks: list[_charts.Tick]
    description: str
    load: float
    least: float
    unused: int
    entropy: float | None
    saturation: float | None


def read_health(path: Path) -> list[dict[str, Any]]:
    """Read a history, from its file or the directory that holds it.

    A last line that was cut short is left out.

    Raises:
        InputError: If there is none, it is empty or it is something else.
    """
    file = path / NAME if path.is_dir() else path
    if not file.is_file():
        raise InputError(
            f"{file} does not exist; train with moesaic train, or with the callback "
            "moesaic.training.health.TrainingHealth"
        )
    lines: list[dict[str, Any]] = []
    texts = file.read_text("utf-8").splitlines()
    for number, text in enumerate(texts, start=1):
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            if number == len(texts):
                break
            line = None
        if not _is_line(line):
            raise InputError(f"{file}, line {number}, is no line of training health; delete it")
        lines.append(line)
    if not lines:
        raise InputError(f"{file} has no line yet; wait for the first optimiser step")
    return lines


def _is_line(line: Any) -> bool:
    """Whether a line holds what a page needs."""
    if not isinstance(line, dict) or not isinstance(line.get("layers"), list):
        return False
    numbers = [line.get("step"), line.get("tokens")]
    for layer in line["layers"]:
        if not isinstance(layer, dict) or not isinstance(layer.get("name"), str):
            return False
        if not isinstance(layer.get("counts"), list) or not layer["counts"]:
            return False
        known = [value for name in _KNOWN if (value := layer.get(name)) is not None]
        numbers += [*layer["counts"], *known]
    warnings = line.get("warnings")
    sound = isinstance(warnings, list) and all(
        isinstance(warning, dict) and "sentence" in warning for warning in warnings
    )
    return sound and all(type(value) in (int, float) for value in numbers)


def write_health(lines: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write the page of a history as one self-contained HTML file."""
    page = render_health(lines)
    with atomic_write(path) as temporary:
        temporary.write_text(page, "utf-8")


def health_summary(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Say in few values how a training went: its size, its last numbers, and every warning."""
    values = {name: _worst(lines[-1], name, worst) for name, _, _, worst in _MEASURES}
    return {
        "step": lines[-1]["step"],
        "tokens": sum(line["tokens"] for line in lines),
        "layers": len(lines[-1]["layers"]),
        **{name: value for name, value in values.items() if value is not None},
        "warnings": [warning["sentence"] for warning in _warnings(lines)],
    }


def render_health(lines: Sequence[Mapping[str, Any]]) -> str:
    """Render a history, as `read_health` gives it, as HTML.

    Every text is escaped, and the page forbids scripts.
    """
    charts = [_chart(lines, *measure, style=style) for style, measure in enumerate(_MEASURES)]
    page = (
        environment()
        .get_template("health.html.j2")
        .render(
            steps=lines[-1]["step"],
            tokens=sum(line["tokens"] for line in lines),
            warnings=_warnings(lines),
            charts=[chart for chart in charts if chart is not None],
            maps=layer_maps(lines),
            legend=Legend(
                levels=list(range(_colours.LEVELS)),
                labels=["none", f"{_BUSIEST / 2:g} times", f"{_BUSIEST:g} times or more"],
            ),
            levels=[
                (level, _colours.hex_colour(level), _colours.text_colour(level))
                for level in range(_colours.LEVELS)
            ],
        )
    )
    return clean(page)


def layer_maps(lines: Sequence[Mapping[str, Any]]) -> list[LayerMap]:
    """Lay out every layer: experts from top to bottom, steps from left to right."""
    size = max(1, math.ceil(len(lines) / _COLUMNS))
    groups = [lines[i : i + size] for i in range(0, len(lines), size)]
    maps = []
    for index, layer in enumerate(lines[-1]["layers"]):
        columns = [_summed([line["layers"][index]["counts"] for line in group]) for group in groups]
        total = [sum(counts) for counts in zip(*columns, strict=True)]
        loads = _loads(total)
        name = layer["name"]
        maps.append(
            LayerMap(
                name=name,
                num_experts=len(total),
                num_columns=len(columns),
                picture=_picture([_loads(column) for column in columns]),
                ticks=_ticks(groups),
                description=(
                    f"Load of each of {len(total)} experts of {name} over {len(lines)} lines of "
                    f"its history. Over all of them the busiest had {max(loads):.2f} times the "
                    f"mean and the least busy {min(loads):.2f} times."
                ),
                load=max(loads),
                least=min(loads),
                unused=total.count(0),
                entropy=layer.get("entropy"),
                saturation=layer.get("saturation"),
            )
        )
    return maps


def _picture(columns: Sequence[Sequence[float]]) -> str:
    scale = _colours.Scale(low=0.0, high=_BUSIEST)
    rows = [[scale.level(load) for load in row] for row in zip(*columns, strict=True)]
    return "data:image/png;base64," + base64.b64encode(_colours.png(rows)).decode("ascii")


def _ticks(groups: Sequence[Sequence[Mapping[str, Any]]]) -> list[_charts.Tick]:
    """Label some columns by the step they end at."""
    stride = max(1, math.ceil(len(groups) / 8))
    axis = _charts.Axis(low=0, high=len(groups))
    return [
        _charts.Tick(at=axis.at(i + 0.5), label=_format.tick(groups[i][-1]["step"]))
        for i in range(0, len(groups), stride)
    ]


def _chart(
    lines: Sequence[Mapping[str, Any]], name: str, title: str, unit: str, worst: Any, *, style: int
) -> _charts.Chart | None:
    """Lay out one measure: the worst layer and the mean of all, against the step."""
    steps, worsts, means = [], [], []
    for line in lines:
        known = _measure(line, name)
        if known:
            steps.append(float(line["step"]))
            worsts.append(float(worst(known)))
            means.append(sum(known) / len(known))
    thinned, size = _charts.thin(steps)
    series = [
        _charts.Points(
            name=label,
            x=thinned,
            y=_charts.thin(values)[0],
            titles=[
                f"step {s:.0f}: {_format.significant(v)}"
                for s, v in zip(thinned, _charts.thin(values)[0], strict=True)
            ],
            strong=label == "worst layer",
            style=style if label == "worst layer" else 5,
        )
        for label, values in (("worst layer", worsts), ("mean of the layers", means))
    ]
    return _charts.line_chart(
        series,
        title=title,
        x_title="step" if size == 1 else f"step (each point is the mean of {size})",
        y_title=unit,
        write_x=_format.tick,
        write_y=_format.tick,
    )


def _measure(line: Mapping[str, Any], name: str) -> list[float]:
    """A measure of every layer that has it."""
    values = []
    for layer in line["layers"]:
        if name == "load":
            values.append(max(_loads(layer["counts"])))
        elif name == "dead":
            values.append(float(layer["counts"].count(0)))
        elif (value := layer.get(name)) is not None:
            values.append(value)
    return values


def _worst(line: Mapping[str, Any], name: str, worst: Any) -> float | None:
    known = _measure(line, name)
    return float(worst(known)) if known else None


def _summed(counts: Sequence[Sequence[int]]) -> list[int]:
    return [sum(of_expert) for of_expert in zip(*counts, strict=True)]


def _loads(counts: Sequence[int]) -> list[float]:
    """Each expert's load over the mean; zeros without tokens."""
    mean = sum(counts) / max(1, len(counts))
    return [count / mean if mean else 0.0 for count in counts]


def _warnings(lines: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Every warning with the step it came at."""
    return [{**warning, "step": line["step"]} for line in lines for warning in line["warnings"]]
