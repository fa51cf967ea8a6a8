"""A comparison of methods as one HTML page that needs no network and no script."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from moesaic.analysis import _charts, _format, _history, _record
from moesaic.analysis._page import clean, environment
from moesaic.analysis.comparison import (
    BOUND,
    NOTHING,
    Comparison,
    Entry,
    accuracies,
    cell_text,
    columns,
    entries,
    leaders,
    pareto,
    questions,
    states,
    verdicts_of,
)
from moesaic.analysis.suggestion import (
    PREDICTION_COLUMNS,
    check_sentence,
    checks,
    prediction_rows,
)

# Neutral, so no method has it.
_FRONT_STYLE = 5


def render_comparison(comparison: Comparison) -> str:
    """Render a comparison as HTML.

    Every text is escaped, and the page forbids scripts and outside content.

    Raises:
        InputError: If a line holds a wrong kind of value.
    """
    found = entries(comparison)
    protocol = comparison.protocol
    page = (
        environment()
        .get_template("comparison.html.j2")
        .render(
            model=_record.text(protocol, "model"),
            states=[_state(found, trained, protocol) for trained in states(found)],
            nothing=NOTHING,
            missing=[entry for entry in found if entry.reason],
            costs=[entry for entry in found if entry.ratio is not None],
            domains=_domains(found),
            dense=_dense(comparison.dense),
            tasks=questions(found),
            prediction_columns=PREDICTION_COLUMNS,
            predictions=prediction_rows(comparison),
            predictions_checked=check_sentence(checks(comparison)),
            protocol=_history.raw_json(protocol),
            machines=_history.machines(comparison.lines),
            versions=_history.versions(comparison.lines),
            levels=[],
        )
    )
    return clean(page)


def _state(found: Sequence[Entry], trained: bool, protocol: Mapping[str, Any]) -> dict[str, Any]:
    """What is shown of the methods without training, or with it."""
    of_state = [entry for entry in found if entry.trained == trained]
    methods = [entry for entry in of_state if entry.kind != BOUND]
    bounds = [entry for entry in of_state if entry.kind == BOUND]
    return {
        "title": "After training" if trained else "Without training",
        "id": "trained" if trained else "free",
        "verdicts": verdicts_of(found, trained, protocol),
        "methods": _table(methods, protocol, found),
        "bounds": _table(bounds, protocol, found),
        "chart": pareto_chart(found, trained),
    }


def _table(
    shown: Sequence[Entry], protocol: Mapping[str, Any], found: Sequence[Entry]
) -> dict[str, Any]:
    """Lay out entries of one state, one row for each method."""
    budgets = columns(shown, protocol)
    best = {id(e) for budget in budgets for e in leaders(found, budget, shown[0].trained)}
    rows = []
    for name in dict.fromkeys(entry.method for entry in shown):
        own = {entry.budget: entry for entry in shown if entry.method == name}
        cells = [
            {"entry": entry, "text": cell_text(entry), "best": id(entry) in best}
            for entry in map(own.get, budgets)
        ]
        static = any(entry.static for entry in own.values())
        rows.append({"name": name, "static": static, "cells": cells})
    return {"budgets": budgets, "rows": rows}


def pareto_chart(found: Sequence[Entry], trained: bool) -> _charts.Chart | None:
    """Lay out ratio against measured active fraction, one line for each method.

    Off-budget entries are shown where they are; the line of the front joins what nothing beats.
    """
    shown = [e for e in found if e.trained == trained and e.ratio is not None]
    series = []
    styles = (n for n in itertools.count() if n % _charts.NUM_STYLES != _FRONT_STYLE)
    for name in dict.fromkeys(entry.method for entry in shown):
        own = sorted((e for e in shown if e.method == name), key=lambda e: e.active or 0.0)
        bound = own[0].kind == BOUND
        series.append(_points(f"{name} (bound)" if bound else name, own, style=next(styles)))
    front = pareto(found, trained)
    if len(series) > 1 and len(front) > 1:
        # First, so that the methods' own points lie over it.
        series.insert(0, _points("Pareto front", front, style=_FRONT_STYLE))
    ratios = [v for e in shown if e.ratio is not None for v in e.ratio]
    if not ratios:
        return None
    low, high = min(1.0, *ratios), max(1.0, *ratios)
    margin = max(high / low, 1.02) ** 0.05
    return _charts.line_chart(
        series,
        title="Quality against compute",
        x_title="measured active fraction of the feed-forward weights",
        y_title="perplexity ratio to dense",
        write_x=_format.tick_percent,
        write_y=_format.tick,
        y_axis=_charts.Axis(low=low / margin, high=high * margin, log=True),
        reference=1.0,
    )


def _points(name: str, own: Sequence[Entry], *, style: int) -> _charts.Points:
    return _charts.Points(
        name=name,
        x=[e.active or 0.0 for e in own],
        y=[e.ratio.value for e in own if e.ratio is not None],
        titles=[
            f"{e.method} asked for {e.budget:g}: {_format.percent(e.active or 0.0)} active, "
            f"{cell_text(e)}"
            for e in own
        ],
        low=[e.ratio.low for e in own if e.ratio is not None],
        high=[e.ratio.high for e in own if e.ratio is not None],
        style=style,
    )


def _domains(found: Sequence[Entry]) -> list[str]:
    return list(dict.fromkeys(name for entry in found for name in entry.domains or {}))


def _dense(record: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """What the tables show of the dense parent."""
    if record is None:
        return None
    quality, cost = _record.section(record, "quality"), _record.section(record, "cost")
    domains = _record.section(quality, "domains")
    return {
        "domains": {
            str(name): _record.number(_record.section(domains, name), "perplexity")
            for name in domains
        },
        "accuracy": accuracies(record),
        "active_parameters": _record.number(cost, "active_parameters"),
    }
