"""The main table: every model beside its dense parent, formatted once for terminal and report."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from rich import box
from rich.markup import escape
from rich.table import Table

from moesaic.analysis import _format, _record

# More models than this do not fit beside each other in a terminal of 80 columns.
_MAX_MODELS_ACROSS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """A column of the main table; `group` is a heading shared with its neighbours."""

    key: str
    title: str
    group: str = ""


class Cell(NamedTuple):
    """One number of the table: as stored, as written, its interval, and what stands beside it."""

    value: float | None
    text: str = _format.NOT_MEASURED
    interval: str = ""
    beside: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One model of the table."""

    name: str
    kind: str
    cells: Mapping[str, Cell]


def main_table(record: Mapping[str, Any]) -> tuple[list[Column], list[Row]]:
    """Lay out the main table; a column that no model has a number for is left out.

    Raises:
        InputError: If the record is of another schema, has no models or holds a wrong kind.
    """
    _record.check_record(record)
    domains = _record.domain_names(record)
    columns = [
        *(
            Column(key=f"perplexity {name}", title=name, group="Held-out perplexity")
            for name in domains
        ),
        Column(key="ratio to dense", title="Perplexity ratio to dense"),
        Column(key="active FFN", title="Active FFN"),
        Column(key="active parameters", title="Active parameters"),
        Column(key="router parameters", title="Router parameters"),
        Column(key="FLOPs per token", title="FLOPs per token"),
        Column(key="bytes", title="Bytes"),
        Column(key="prefill tokens/s", title="Prefill tokens/s"),
        Column(key="decode tokens/s", title="Decode tokens/s"),
        Column(key="engine prefill tokens/s", title="Engine prefill tokens/s"),
        Column(key="engine decode tokens/s", title="Engine decode tokens/s"),
    ]
    dense = _record.dense_model(record)
    rows = [
        Row(
            name=model["name"],
            kind=_record.text(model, "kind", "unknown"),
            cells=_cells(model, dense, domains),
        )
        for model in _record.entries(record, "models")
    ]
    kept = [c for c in columns if any(row.cells[c.key].value is not None for row in rows)]
    return kept, rows


def _cells(
    model: Mapping[str, Any], dense: Mapping[str, Any] | None, domains: list[str]
) -> dict[str, Cell]:
    """Format every number of one model."""
    quality, cost = _record.section(model, "quality"), _record.section(model, "cost")
    by_domain = _record.section(quality, "domains")
    cells = {
        f"perplexity {name}": _measured(
            _record.section(by_domain, name), "perplexity", "low", "high", _format.significant
        )
        for name in domains
    }
    cells["ratio to dense"] = _measured(
        quality, "ratio", "ratio_low", "ratio_high", _format.multiple
    )
    cells["active FFN"] = _plain(cost, "active_ffn_fraction", _format.percent)
    active = _plain(cost, "active_parameters", _format.scaled)
    total = _record.number(cost, "total_parameters")
    if active.value is not None and total is not None:
        active = active._replace(beside=f"of {_format.scaled(total)}")
    cells["active parameters"] = active
    cells["router parameters"] = _plain(cost, "router_parameters", _format.scaled)
    cells["FLOPs per token"] = _plain(cost, "flops_per_token", _format.scaled)
    cells["bytes"] = _plain(cost, "bytes", _format.byte_size)
    for key, where in (("speed", ""), ("engine_speed", "engine ")):
        for phase in ("prefill", "decode"):
            speed = _record.section(_record.section(model, key), f"{phase}_tokens_per_s")
            cell = _measured(speed, "median", "low", "high", _format.scaled)
            parent = None if dense is None else _record.speed_median(dense, phase, key)
            if cell.value is not None and parent:
                cell = cell._replace(beside=f"{_format.multiple(cell.value / parent)} dense")
            cells[f"{where}{phase} tokens/s"] = cell
    return cells


def _plain(values: Mapping[str, Any], key: str, write: Callable[[float], str]) -> Cell:
    value = _record.number(values, key)
    return Cell(None) if value is None else Cell(value, write(value))


def _measured(
    values: Mapping[str, Any], key: str, low: str, high: str, write: Callable[[float], str]
) -> Cell:
    """Format a number that comes with an interval."""
    cell = _plain(values, key, write)
    bounds = _record.number(values, low), _record.number(values, high)
    if cell.value is None or bounds[0] is None or bounds[1] is None or bounds[0] == bounds[1]:
        return cell
    return cell._replace(interval=f"{_bare(write(bounds[0]))}-{_bare(write(bounds[1]))}")


def _bare(text: str) -> str:
    """Drop the unit that the number above already has."""
    return text.removesuffix("x")


def summary_rows(record: Mapping[str, Any]) -> list[dict[str, str]]:
    """Write the main table as text: one dict per model, all with the same keys.

    Intervals and ratios to dense stand in parentheses; `-` is a number nobody measured.

    Raises:
        InputError: If the record is of another schema, has no models or holds a wrong kind.
    """
    columns, rows = main_table(record)
    return [
        {"model": row.name, "kind": row.kind}
        | {column.key: _one_line(row.cells[column.key]) for column in columns}
        for row in rows
    ]


def _one_line(cell: Cell) -> str:
    # A ratio to dense says more than the interval of the speed, and both do not fit.
    note = cell.beside or cell.interval
    if note.startswith("of "):
        return f"{cell.text} {note}"
    return f"{cell.text} ({note.removesuffix(' dense')})" if note else cell.text


def _short(cell: Cell) -> str:
    """Leave out what a narrow column has no room for: all but the ratio to dense."""
    return _one_line(
        cell._replace(interval="", beside="" if cell.beside.startswith("of ") else cell.beside)
    )


def summary_table(record: Mapping[str, Any]) -> Table:
    """Draw the main table for a terminal.

    Up to four models stand side by side, one measure a line, which fits 80 columns; more models
    get one line each, without intervals.

    Raises:
        InputError: If the record is of another schema, has no models or holds a wrong kind.
    """
    columns, rows = main_table(record)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    if len(rows) > _MAX_MODELS_ACROSS:
        table.add_column("model", style="bold", overflow="fold")
        for column in columns:
            table.add_column(escape(column.key), justify="right")
        for row in rows:
            cells = (row.cells[column.key] for column in columns)
            table.add_row(escape(row.name), *(_short(cell) for cell in cells))
        return table
    table.add_column("", style="bold")
    for row in rows:
        table.add_column(escape(row.name), justify="right", overflow="fold")
    for column in columns:
        cells = (row.cells[column.key] for row in rows)
        table.add_row(escape(column.key), *map(_one_line, cells))
    if columns:
        table.caption = "in parentheses: the interval, or the speed relative to dense"
    else:
        table.add_row("nothing measured", *([_format.NOT_MEASURED] * len(rows)))
    return table
