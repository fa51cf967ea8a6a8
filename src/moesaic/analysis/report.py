"""The report: an evaluation record as one HTML file that needs no network and no script."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moesaic._files import atomic_write
from moesaic.analysis import _activation, _charts, _colours, _format, _history, _record
from moesaic.analysis._headline import headline
from moesaic.analysis._page import clean, environment
from moesaic.analysis.table import main_table

_MAIN_STYLE, _DENSE_STYLE = 0, 5
_TRAINED = (
    ("loss", "Loss", "loss"),
    ("kl", "KL to the dense parent", "KL"),
    ("active", "Active FFN fraction", "active"),
    ("sparse_coef", "Sparsity coefficient", "coefficient"),
)


def write_report(record: Mapping[str, Any], path: Path) -> None:
    """Write the report of an evaluation record as one self-contained HTML file.

    Args:
        record: The evaluation record, as read from its JSON.
        path: The HTML file; an existing one is replaced, and only by a whole one.

    Raises:
        InputError: If the record is of another schema, has no models or holds a wrong kind.
    """
    page = render_report(record)
    with atomic_write(path) as temporary:
        temporary.write_text(page, "utf-8")


def render_report(record: Mapping[str, Any]) -> str:
    """Render an evaluation record as HTML; sections without data are left out.

    Every text of the record is escaped, and the page forbids scripts and outside content, so a
    record from a stranger is safe to open.

    Raises:
        InputError: If the record is of another schema, has no models or holds a wrong kind.
    """
    _record.check_record(record)
    columns, rows = main_table(record)
    tokens = _activation.token_scale(record)
    manifest = _record.section(record, "manifest")
    page = (
        environment()
        .get_template("report.html.j2")
        .render(
            headline=headline(record),
            created=_history.moment(_record.text(record, "created")),
            main=_record.main_model(record),
            columns=columns,
            rows=rows,
            has_dense=_record.dense_model(record) is not None,
            curve=_curve_chart(record),
            curve_rows=_curve_rows(record),
            heatmap=_activation.heatmap(record),
            layer_chart=_activation.layer_chart(record),
            layer_rows=_layer_rows(record),
            uses=_activation.domain_uses(record, tokens),
            token_legend=_activation.legend_for(tokens, trimmed=True),
            generations=_generations(record),
            training=_training_charts(record),
            steps=_history.steps(manifest),
            facts=_history.other_facts(manifest),
            raw_manifest=_history.raw_json(manifest) if manifest else "",
            machine=_history.flatten(_record.section(record, "machine")),
            data=_history.domain_data(record),
            levels=[
                (level, _colours.hex_colour(level), _colours.text_colour(level))
                for level in range(_colours.LEVELS)
            ],
            curve_domains=_curve_domains(record),
        )
    )
    return clean(page)


def _curve_chart(record: Mapping[str, Any]) -> _charts.Chart | None:
    """Lay out quality against compute: the swept threshold as a line, the models as points."""
    points = _curve_rows(record)
    series = []
    main, dense = _record.main_model(record), _record.dense_model(record)
    if points:
        of = f"{main['name']}, " if main is not None else ""
        series.append(
            _charts.Points(
                name=f"{of}moving the threshold",
                x=[p["active"] for p in points],
                y=[p["ratio"] for p in points],
                titles=[
                    f"threshold {_format.significant(p['threshold'])}: "
                    f"{_format.percent(p['active'])} active, {_format.multiple(p['ratio'])} dense"
                    if p["threshold"] is not None
                    else f"{_format.percent(p['active'])} active, "
                    f"{_format.multiple(p['ratio'])} dense"
                    for p in points
                ],
                strong=True,
                style=_MAIN_STYLE,
            )
        )
    # The main model shares the colour of its curve, dense is neutral, others take what is left.
    free = (n for n in itertools.count(1) if n % _charts.NUM_STYLES not in (0, _DENSE_STYLE))
    for model in _record.entries(record, "models"):
        active = _record.number(_record.section(model, "cost"), "active_ffn_fraction")
        quality = _record.section(model, "quality")
        ratio = _record.number(quality, "ratio")
        if active is None or ratio is None:
            continue
        series.append(
            _charts.Points(
                name=model["name"],
                x=[active],
                y=[ratio],
                titles=[
                    f"{model['name']}: {_format.percent(active)} active, "
                    f"{_format.multiple(ratio)} dense"
                ],
                line=False,
                strong=model is main,
                low=[_record.number(quality, "ratio_low")],
                high=[_record.number(quality, "ratio_high")],
                style=_MAIN_STYLE
                if model is main
                else _DENSE_STYLE
                if model is dense
                else next(free),
            )
        )
    # One or two points alone say less than the table above.
    if not points and len(series) < 3:
        return None
    chart = _charts.line_chart(
        series,
        title="Quality against compute",
        x_title="active FFN fraction",
        y_title="perplexity ratio to dense",
        write_x=_format.tick_percent,
        write_y=_format.tick,
        allow_log=True,
        reference=1.0,
    )
    return None if chart is None else _charts.label_points(chart)


def _curve_rows(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """List the points of the swept threshold from most to least active."""
    rows = []
    for point in _record.entries(record, "curve"):
        active, ratio = (
            _record.number(point, "active_ffn_fraction"),
            _record.number(point, "ratio"),
        )
        if active is None or ratio is None:
            continue
        domains = _record.section(point, "domains")
        rows.append(
            {
                "threshold": _record.number(point, "threshold"),
                "active": active,
                "ratio": ratio,
                "domains": {str(name): _record.number(domains, name) for name in domains},
            }
        )
    return sorted(rows, key=lambda row: -row["active"])


def _curve_domains(record: Mapping[str, Any]) -> list[str]:
    return list(dict.fromkeys(name for row in _curve_rows(record) for name in row["domains"]))


def _layer_rows(record: Mapping[str, Any]) -> tuple[list[str], list[list[float | None]]]:
    """Tabulate the mean active fraction per layer: the headings, then one row a layer."""
    activation = _record.section(record, "activation")
    by_domain = _record.section(activation, "per_domain")
    columns = {"all text": _record.numbers(activation, "mean_per_layer")}
    columns |= {str(name): _record.numbers(by_domain, name) for name in by_domain}
    columns = {name: values for name, values in columns.items() if values}
    num_layers = max(map(len, columns.values()), default=0)
    return list(columns), [
        [values[i] if i < len(values) else None for values in columns.values()]
        for i in range(num_layers)
    ]


def _generations(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Put what each model wrote beside the others; the prompt, where repeated, is set apart."""
    shown = []
    for generation in _record.entries(record, "generations"):
        prompt = _record.text(generation, "prompt")
        texts = []
        for name, value in _record.section(generation, "texts").items():
            repeated = prompt if prompt and str(value).startswith(prompt) else ""
            texts.append((str(name), repeated, str(value)[len(repeated) :]))
        if texts:
            shown.append({"prompt": prompt, "texts": texts})
    return shown


def _training_charts(record: Mapping[str, Any]) -> list[_charts.Chart]:
    """Lay out one small chart for each quantity that training logged."""
    logged = _record.entries(record, "training")
    charts = []
    for style, (key, title, name) in enumerate(_TRAINED):
        pairs = []
        for index, entry in enumerate(logged):
            value = _record.number(entry, key)
            if value is not None:
                step = _record.number(entry, "step")
                pairs.append((float(index) if step is None else step, value))
        steps, size = _charts.thin([step for step, _ in pairs])
        values, _ = _charts.thin([value for _, value in pairs])
        share = key == "active"
        write = _format.percent if share else _format.significant
        chart = _charts.line_chart(
            [
                _charts.Points(
                    name=name,
                    x=steps,
                    y=values,
                    titles=[
                        f"step {s:.0f}: {write(v)}" for s, v in zip(steps, values, strict=True)
                    ],
                    strong=True,
                    style=style,
                )
            ],
            title=title,
            x_title="step" if size == 1 else f"step (each point is the mean of {size})",
            y_title=name,
            write_x=_format.tick,
            write_y=_format.tick_percent if share else _format.tick,
        )
        if chart is not None:
            charts.append(chart)
    return charts
