"""List methods or published systems."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import tyro
from rich.console import Console
from rich.table import Table

from moesaic._errors import UnknownNameError
from moesaic._registry import MethodTable, unknown_name
from moesaic.catalog import systems, tables
from moesaic.cli._common import parse


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """List the methods of a family, all methods, or the published systems.

    Attributes:
        family: Such as `routers`; `systems` for the catalog; nothing for every family.
        json: Print one JSON document.
    """

    family: tyro.conf.Positional[str] = ""
    json: bool = False


def run(argv: Sequence[str]) -> int:
    """Run the command."""
    options = parse(Options, argv, "ls")
    if options.family in ("systems", "system"):
        _print_systems(as_json=options.json)
        return 0
    found: dict[str, MethodTable] = {table.family: table for table in tables().values()}
    if options.family:
        names = {form: name for name in found for form in (name, f"{name}s", f"{name}es")}
        if options.family not in names:
            known = [*names, "systems"]
            raise UnknownNameError(unknown_name("family", options.family, known))
        name = names[options.family]
        found = {name: found[name]}
    _print_methods(found, as_json=options.json)
    return 0


def _print_methods(found: dict[str, MethodTable], *, as_json: bool) -> None:
    rows = [
        {
            "family": family,
            "name": info.name,
            "summary": info.summary,
            "paper": info.paper,
            "status": info.status,
        }
        for family, table in sorted(found.items())
        for info in table.values()
    ]
    _print(rows, ("family", "name", "summary", "paper"), as_json=as_json)


def _print_systems(*, as_json: bool) -> None:
    rows = [
        {
            "id": system.id,
            "name": system.name,
            "arxiv": system.arxiv,
            "home": ", ".join(system.home),
            "status": system.status,
            "summary": system.summary,
        }
        for system in systems()
    ]
    _print(rows, ("id", "status", "home", "arxiv", "summary"), as_json=as_json)


def _print(rows: list[dict[str, str]], columns: tuple[str, ...], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(rows))
        return
    table = Table(*columns, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*(row[column] for column in columns))
    console = Console()
    Console(width=max(120, console.width)).print(table)
