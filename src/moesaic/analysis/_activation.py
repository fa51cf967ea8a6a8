"""Which experts work where: the layer by expert map, and text coloured by how much each used."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moesaic.analysis import _charts, _colours, _format, _record
from moesaic.analysis._format import percent

# Above this many cells a picture replaces single shapes, or the page would open slowly.
_MAX_CELLS = 4000
_MAX_EXAMPLES = 6
_MAX_TOKENS = 600


@dataclass(frozen=True, slots=True, kw_only=True)
class Legend:
    """A colour scale to draw: its levels from low to high, and the labels along it."""

    levels: list[int]
    labels: list[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class HeatCell:
    """One expert of one layer: its place, its colour level, and its text on hover."""

    x: int
    y: int
    level: int
    title: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Heatmap:
    """Layers from left to right, experts of each layer from most used (top) to least used."""

    num_layers: int
    num_experts: int
    cells: list[HeatCell]
    picture: str
    layers: list[str]
    ticks: list[_charts.Tick]
    legend: Legend
    description: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Token:
    """One token as it is shown: whitespace made visible, coloured by its active fraction."""

    shown: str
    newline: bool
    level: int
    title: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Passage:
    """One example text of a domain."""

    tokens: list[Token]
    mean: float | None
    omitted: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainUse:
    """How much one domain uses: the mean active fraction, as experts too, and its examples."""

    name: str
    mean: float | None
    text: str
    experts: str
    width: float
    passages: list[Passage]
    omitted: int


def heatmap(record: Mapping[str, Any]) -> Heatmap | None:
    """Lay out how often each expert of each layer is active; None where it was not measured.

    The number of an expert means nothing outside its layer, so each layer is sorted.

    Raises:
        InputError: If a layer is not a list of numbers.
    """
    layers = [
        [_record.as_number(v, f"experts_per_layer[{i}]") for v in layer]
        for i, layer in enumerate(_layers(record))
    ]
    num_experts = max((len(layer) for layer in layers), default=0)
    if num_experts == 0:
        return None
    scale = _colours.scale_for([v for layer in layers for v in layer], step=0.1, trim=0.0)
    ranked = [
        sorted(
            ((v, e) for e, v in enumerate(layer) if math.isfinite(v)), key=lambda p: (-p[0], p[1])
        )
        for layer in layers
    ]
    drawn = sum(map(len, ranked)) <= _MAX_CELLS
    cells = [
        HeatCell(
            x=x,
            y=y,
            level=scale.level(value),
            title=f"layer {x}, expert {expert}: active for {percent(value)} of tokens",
        )
        for x, layer in enumerate(ranked if drawn else [])
        for y, (value, expert) in enumerate(layer)
    ]
    axis = _charts.Axis(low=-0.5, high=len(layers) - 0.5)
    return Heatmap(
        num_layers=len(layers),
        num_experts=num_experts,
        cells=cells,
        picture="" if drawn else _picture(ranked, num_experts, scale),
        layers=[] if drawn else [_layer_title(i, layer) for i, layer in enumerate(ranked)],
        ticks=_charts.integer_ticks(len(layers), axis),
        legend=legend_for(scale),
        description=(
            f"Share of tokens for which each of up to {num_experts} experts is active, in each of "
            f"{len(layers)} layers; most used experts on top. Ranges from "
            f"{percent(min(p[0] for r in ranked for p in r[-1:]))} to "
            f"{percent(max(p[0] for r in ranked for p in r[:1]))}."
        )
        if any(ranked)
        else "",
    )


def _layers(record: Mapping[str, Any]) -> list[list[Any]]:
    activation = {"activation": _record.section(record, "activation")}
    layers = _record.items(activation["activation"], "experts_per_layer")
    return [
        _record.items({f"experts_per_layer[{i}]": v}, f"experts_per_layer[{i}]")
        for i, v in enumerate(layers)
    ]


def _layer_title(index: int, ranked: list[tuple[float, int]]) -> str:
    if not ranked:
        return f"layer {index}: no experts"
    mean = sum(value for value, _ in ranked) / len(ranked)
    most, least = ranked[0], ranked[-1]
    return (
        f"layer {index}: mean {percent(mean)}; most used is expert {most[1]} ({percent(most[0])}), "
        f"least used is expert {least[1]} ({percent(least[0])})"
    )


def _picture(ranked: list[list[tuple[float, int]]], num_experts: int, scale: _colours.Scale) -> str:
    rows = [
        [scale.level(layer[y][0]) if y < len(layer) else None for layer in ranked]
        for y in range(num_experts)
    ]
    return "data:image/png;base64," + base64.b64encode(_colours.png(rows)).decode("ascii")


def legend_for(scale: _colours.Scale, *, trimmed: bool = False) -> Legend:
    """Label the ends and the middle of a colour scale; a trimmed one has values beyond its ends."""
    middle = (scale.low + scale.high) / 2
    values = (scale.low, middle, scale.high)
    labels = [_format.tick_percent(v) for v in values]
    if trimmed and scale.low > 0:
        labels[0] += " or less"
    if trimmed and scale.high < 1:
        labels[2] += " or more"
    return Legend(
        levels=list(range(scale.first, _colours.LEVELS)),
        labels=labels,
    )


def layer_chart(record: Mapping[str, Any]) -> _charts.Chart | None:
    """Lay out the mean active fraction of each layer, over all text and per domain.

    The paper's Figure 3 (DSMoE, arXiv:2502.12455) shows this as the layers' W shape.
    """
    activation = _record.section(record, "activation")
    lines = {"all text": _record.numbers(activation, "mean_per_layer")}
    for name in _record.section(activation, "per_domain"):
        lines[str(name)] = _record.numbers(_record.section(activation, "per_domain"), name)
    lines = {name: values for name, values in lines.items() if values}
    if not lines:
        return None
    num_layers = max(map(len, lines.values()))
    axis = _charts.Axis(low=-0.5, high=num_layers - 0.5)
    series = [
        _charts.Points(
            name=name,
            x=[float(i) for i in range(len(values))],
            y=values,
            titles=[f"{name}, layer {i}: {percent(v)} active" for i, v in enumerate(values)],
            strong=name == "all text",
        )
        for name, values in lines.items()
    ]
    return _charts.line_chart(
        series,
        title="Mean active fraction per layer",
        x_title="layer",
        y_title="active experts",
        write_x=_format.tick,
        write_y=_format.tick_percent,
        x_axis=axis,
        x_ticks=_charts.integer_ticks(num_layers, axis),
    )


def token_scale(record: Mapping[str, Any]) -> _colours.Scale:
    """Fit one colour scale to all example tokens, so that domains can be compared by eye."""
    return _colours.scale_for(
        [
            active
            for example in _record.entries(record, "examples")
            for token in _record.entries(example, "tokens")
            if (active := _record.number(token, "active")) is not None
        ],
        first=_colours.FIRST_BRIGHT,
    )


def domain_uses(record: Mapping[str, Any], scale: _colours.Scale) -> list[DomainUse]:
    """Collect, domain by domain, the mean active fraction and the coloured examples."""
    examples: dict[str, list[Mapping[str, Any]]] = {}
    for example in _record.entries(record, "examples"):
        examples.setdefault(_record.text(example, "domain", "text"), []).append(example)
    activation = _record.section(record, "activation")
    measured = _record.section(activation, "per_domain")
    counts = {len(layer) for layer in _layers(record)}
    experts = counts.pop() if len(counts) == 1 else 0
    uses = []
    for name in dict.fromkeys([*map(str, measured), *examples]):
        by_layer = _record.numbers(measured, name)
        passages = [_passage(e, scale) for e in examples.get(name, [])[:_MAX_EXAMPLES]]
        mean = _mean(by_layer) if by_layer else _mean([p.mean for p in passages])
        uses.append(
            DomainUse(
                name=name,
                mean=mean,
                text="" if mean is None else percent(mean),
                experts=f"{mean * experts:.1f} of {experts}"
                if mean is not None and experts
                else "",
                width=0.0 if mean is None else round(100 * min(1.0, max(0.0, mean)), 2),
                passages=[p for p in passages if p.tokens],
                omitted=max(0, len(examples.get(name, [])) - _MAX_EXAMPLES),
            )
        )
    return uses


def _mean(values: list[float] | list[float | None]) -> float | None:
    known = [v for v in values if v is not None and math.isfinite(v)]
    return sum(known) / len(known) if known else None


def _passage(example: Mapping[str, Any], scale: _colours.Scale) -> Passage:
    stored = _record.entries(example, "tokens")
    fractions = [_record.number(token, "active") for token in stored]
    tokens = [
        _token(_record.text(token, "text"), active, scale)
        for token, active in zip(stored[:_MAX_TOKENS], fractions, strict=False)
    ]
    return Passage(tokens=tokens, mean=_mean(fractions), omitted=max(0, len(stored) - _MAX_TOKENS))


def _token(text: str, active: float | None, scale: _colours.Scale) -> Token:
    known = active is not None and math.isfinite(active)
    return Token(
        shown=visible(text),
        newline=text.endswith("\n"),
        level=scale.level(active) if known and active is not None else -1,
        title=f"{percent(active)} active" if known and active is not None else "not measured",
    )


def visible(text: str) -> str:
    """Show what has no ink: line ends and tabs as arrows, blank tokens as dots."""
    if text == "":
        return "\u2205"
    if text.strip(" ") == "" and len(text) > 0:
        return "\u00b7" * len(text)
    shown = []
    for character in text.removesuffix("\n"):
        if character == "\n":
            shown.append("\u21b5\n")
        elif character == "\t":
            shown.append("\u2192\t")
        elif character == "\r":
            shown.append("\u240d")
        elif ord(character) < 32 or ord(character) == 127:
            shown.append("\ufffd")
        else:
            shown.append(character)
    return "".join(shown) + ("\u21b5" if text.endswith("\n") else "")
