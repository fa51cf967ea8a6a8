"""Renders the method tables and the catalog into pages when the site is built.

A page asks for them with a comment on a line of its own:
`<!-- methods: router -->` lists one family and documents each method from its source;
`<!-- systems -->` lists the published systems, `<!-- architectures -->` the decoders that can be
converted, `<!-- commands -->` the commands, `<!-- speeds -->` the committed speeds of networks and
`<!-- comparison -->` the committed comparison of methods.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from moesaic import catalog

_METHODS = re.compile(r"^<!-- methods: ([a-z-]+) -->$", re.MULTILINE)
_LIST = re.compile(r"^<!-- (systems|architectures|commands|speeds|comparison) -->$", re.MULTILINE)
# How far from the physical limit a network may be at most, by tokens in a call, at the shapes whose
# weights no cache holds: what we ask of ourselves.
BOUND = {1: 1.3, 4: 1.6, 8: 1.6, 64: 1.6, 512: 1.2, 2048: 1.2}
_PACKAGE = Path(catalog.__file__).resolve().parents[1]


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Fill in the tables of one page; the site generator calls this for every page."""
    return render(markdown)


def families_in(markdown: str) -> list[str]:
    """Name the families whose methods a page asks for."""
    return _METHODS.findall(markdown)


def render(markdown: str) -> str:
    """Replace every request of a page by what it asks for."""
    markdown = _METHODS.sub(lambda found: _methods(found[1]), markdown)
    lists = {
        "systems": _systems,
        "architectures": _architectures,
        "commands": _commands,
        "speeds": _speeds,
        "comparison": _comparison,
    }
    return _LIST.sub(lambda found: lists[found[1]](), markdown)


def _methods(family: str) -> str:
    """Summarise the methods of a family, then let mkdocstrings document each file once."""
    table = catalog.tables()[family]
    lines = [
        _rows(
            ("name", "what it does", "source", "status"),
            (
                (f"`{name}`", record.summary, _paper(record.paper), record.status)
                for name, record in table.items()
            ),
        )
    ]
    names: dict[str, list[str]] = {}
    members: dict[str, dict[str, None]] = {}
    for name, record in table.items():
        for target in (record.config, record.target):
            module, _, member = target.partition(":")
            members.setdefault(module, {})[member] = None
        # A method is described where its code is; settings may be shared and live elsewhere.
        names.setdefault(record.target.partition(":")[0], []).append(f"`{name}`")
    for module, shown in sorted(members.items(), key=lambda item: item[0] not in names):
        lines += [
            "",
            f"## {', '.join(names.get(module, ['Shared settings']))}",
            "",
            f"::: {module}",
            "    options:",
            "      show_root_heading: false",
            "      show_root_toc_entry: false",
            "      heading_level: 3",
            f"      members: [{', '.join(shown)}]",
        ]
    return "\n".join(lines)


def _systems() -> str:
    """List the published systems: those that work, then the planned ones by their floor."""
    working = [system for system in catalog.systems() if system.status == "works"]
    planned: dict[str, list[catalog.System]] = {}
    for system in catalog.systems():
        if system.status == "planned":
            planned.setdefault(system.home[0].partition("/")[0], []).append(system)
    sections = [
        "## Works",
        _rows(
            ("system", "what it does", "made of"),
            (
                (
                    _title(system),
                    system.summary,
                    "<br>".join(f"`{part}`" for part in system.uses),
                )
                for system in working
            ),
        ),
        "## Planned",
    ]
    for floor, systems in planned.items():
        sections += [
            f"### {floor}",
            _rows(
                ("system", "what it does", "parts it needs"),
                ((_title(s), s.summary, ", ".join(s.parts)) for s in systems),
            ),
        ]
    return "\n\n".join(sections)


def _title(system: catalog.System) -> str:
    """Give the name of a system, its id and its paper."""
    return f"{system.name}<br>`{system.id}`<br>{_paper(system.arxiv)}"


def _architectures() -> str:
    """List the decoders that can be converted."""
    # Imports transformers, which pages without this list need not wait for.
    from moesaic.models.architectures import ARCHITECTURES

    return _rows(
        ("model type", "classes in transformers", "feed-forward network"),
        (
            (f"`{row.model_type}`", f"`{row.name}{row.head}`", "gated" if row.gated else "plain")
            for row in ARCHITECTURES.values()
        ),
    )


def _commands() -> str:
    """List the commands: each is one file, whose docstring begins with what it does."""
    docs = {
        path.stem: ast.get_docstring(ast.parse(path.read_text("utf-8"))) or ""
        for path in sorted((_PACKAGE / "cli").glob("*.py"))
        if path.stem != "main" and not path.stem.startswith("_")
    }
    return _rows(
        ("command", "what it does"),
        ((f"`moesaic {name}`", text.partition("\n")[0]) for name, text in docs.items()),
    )


def _speeds() -> str:
    """Tabulate the committed results of `moesaic bench ffn`."""
    sections = []
    for path in sorted((_PACKAGE.parents[1] / "bench" / "results").glob("ffn-*.json")):
        result = json.loads(path.read_text("utf-8"))
        machine, roof, cells = result["machine"], result["roof"], result["cells"]
        fractions = sorted({cell["active"] for cell in cells})
        within = sum(_times_roof(cell) <= BOUND[cell["tokens"]] for cell in cells)
        bound = f"; {within} of {len(cells)} within the bound" if _is_large(cells[0]) else ""
        rows: dict[tuple[int, int], dict[float, str]] = {}
        for cell in cells:
            rows.setdefault((cell["experts"], cell["tokens"]), {})[cell["active"]] = _speed(cell)
        sections += [
            f"### {cells[0]['shape']}, {cells[0]['dtype']}",
            f"`{path.name}`: {machine['cpu']}, {machine['threads']} threads, torch "
            f"{machine['torch']}; reads {roof['read_bytes_per_s'] / 1e9:.0f} GB/s; "
            f"{result['created'][:10]}, commit {result['commit'][:7]}{bound}.",
            _rows(
                ("experts", "tokens", *(f"{fraction:g} active" for fraction in fractions)),
                (
                    (str(experts), str(tokens), *(row.get(f, "") for f in fractions))
                    for (experts, tokens), row in sorted(rows.items())
                ),
            ),
        ]
    return "\n\n".join(sections)


def _comparison() -> str:
    """Show the report that stands beside the committed results; a test writes it anew."""
    return (_PACKAGE.parents[1] / "bench" / "results" / "quality" / "report.md").read_text("utf-8")


def _speed(cell: dict[str, Any]) -> str:
    """Times of the roof, times faster than dense, times faster than the best peer."""
    ms = {row["method"]: row["median_ms"] for row in cell["rows"] if "median_ms" in row}
    ours, dense = ms.pop("moesaic"), ms.pop("dense")
    return f"{_times_roof(cell):.2f} / {dense / ours:.1f} / {min(ms.values()) / ours:.1f}"


def _is_large(cell: dict[str, Any]) -> bool:
    return int(cell["shape"].partition("x")[0]) >= 2048


def _times_roof(cell: dict[str, Any]) -> float:
    (ours,) = (row["median_ms"] for row in cell["rows"] if row["method"] == "moesaic")
    return float(ours / cell["roof_ms"])


def _rows(titles: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    """Lay out a table."""
    lines = [titles, ("---",) * len(titles), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _paper(paper: str) -> str:
    """Link a paper that is named by its arXiv id."""
    return re.sub(r"(?:arXiv[: ])?(\d{4}\.\d{5})", r"[arXiv:\1](https://arxiv.org/abs/\1)", paper)
