"""Renders the method tables and the catalog into pages when the site is built.

A page asks for them with a comment on a line of its own:
`<!-- methods: router -->` lists one family and documents each method from its source;
`<!-- systems -->` lists the published systems, `<!-- architectures -->` the decoders that can be
converted, `<!-- commands -->` the commands, `<!-- speeds -->` the committed speeds of networks and
`<!-- runtimes -->` those of one model in several runtimes, `<!-- gguf -->` those of GGUF files,
`<!-- serving -->` those of servers; `<!-- conversions -->` what conversions take,
`<!-- settings -->` what the choices in DSMoE are worth, `<!-- questions -->` what methods answer;
`<!-- comparison -->` the committed comparison of methods and `<!-- leaderboard -->` that of
architectures; `<!-- evidence -->` shows the committed results of working systems and
`<!-- dsmoe -->` the tables of the one for DSMoE; `<!-- choices -->` says of each working system
when to use it. Every working system also has a page of its own.
"""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

import yaml
from markup import paper as _paper
from markup import record as _record
from markup import rows as _rows
from system_pages import add_pages, choices, page_of

from moesaic import catalog

_METHODS = re.compile(r"^<!-- methods: ([a-z-]+) -->$", re.MULTILINE)
_LIST = re.compile(
    r"^<!-- (systems|architectures|commands|speeds|runtimes|gguf|serving|conversions|settings"
    r"|questions|comparison|leaderboard|evidence|dsmoe|choices) -->$",
    re.MULTILINE,
)
# How far from the physical limit a network may be at most, by tokens in a call, at the shapes whose
# weights no cache holds: what we ask of ourselves.
BOUND = {1: 1.3, 4: 1.6, 8: 1.6, 64: 1.6, 512: 1.2, 2048: 1.2}
_PACKAGE = Path(catalog.__file__).resolve().parents[1]


def on_config(config: Any) -> Any:
    """Name the pages of systems in the navigation, behind their list."""
    for entry in config.nav:
        if entry.get("Published systems") == "systems.md":
            working = (s for s in catalog.systems() if s.status == "works")
            entry["Published systems"] = ["systems.md", *({s.name: page_of(s)} for s in working)]
    return config


def on_files(files: Any, config: Any) -> Any:
    """Make the pages of systems."""
    add_pages(files, config)
    return files


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
        "runtimes": _runtimes,
        "gguf": _gguf,
        "serving": _serving,
        "conversions": _conversions,
        "settings": _settings,
        "questions": lambda: _report("questions").partition("### Accuracy on questions\n")[2],
        "comparison": lambda: _report("quality"),
        "leaderboard": lambda: _report("architectures"),
        "evidence": _evidence,
        "dsmoe": _dsmoe,
        "choices": choices,
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
    """Give the name of a system, linked to its page if it works, its id and its paper."""
    name = f"[{system.name}]({page_of(system)})" if system.status == "works" else system.name
    return f"{name}<br>`{system.id}`<br>{_paper(system.arxiv)}"


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


def _runtimes() -> str:
    """Tabulate the committed result of `moesaic bench runtimes`."""
    path = _PACKAGE.parents[1] / "bench" / "results" / "runtimes-smollm2.json"
    result = json.loads(path.read_text("utf-8"))
    machine, (cell,) = result["machine"], result["cells"]
    several = str(cell["requests"])
    lines = [
        f"`{path.name}`: {machine['cpu']}, {machine['threads']} thread, torch {machine['torch']}, "
        f"{cell['dtype']}, commit {result['commit']}.",
        "",
        f"| runtime | model | perplexity | tokens as ours | tokens/s, 1 | tokens/s, {several} |",
        "|---|---|---|---|---|---|",
    ]
    for row in cell["rows"]:
        name = f"| {row['runtime']} | {row['model']} |"
        if "skipped" in row:
            lines.append(f"{name} {row['skipped']} | | | |")
            continue
        one, many = (row["tokens_per_s"][n]["median"] for n in ("1", several))
        same = row["same_as_ours"]["tokens"]
        lines.append(f"{name} {row['perplexity']:.2f} | {same:.0%} | {one:.1f} | {many:.1f} |")
    return "\n".join(lines)


def _gguf() -> str:
    """Tabulate the committed result of `moesaic bench gguf`."""
    path = _PACKAGE.parents[1] / "bench" / "results" / "gguf-llama-1.1b.json"
    result = json.loads(path.read_text("utf-8"))
    machine, cells = result["machine"], result["cells"]
    lines = [
        f"`{path.name}`: {machine['cpu']}, {machine['threads']} threads, commit "
        f"{result['commit']}; {cells[0]['active']:.3g} of {cells[0]['experts']} blocks active.",
        "",
        "| weights | test | dense tokens/s | mosaic tokens/s | times faster |",
        "|---|---|---|---|---|",
    ]
    for cell in cells:
        rows = {row["method"]: row for row in cell["rows"]}
        dense, ours = rows["dense"], rows["moesaic"]
        lines.append(
            f"| {cell['weights']} | {cell['test']} of {cell['tokens']} tokens | "
            f"{dense['tokens_per_s']:.1f} | {ours['tokens_per_s']:.1f} | "
            f"{ours['faster_than_dense']:.2f} |"
        )
    return "\n".join(lines)


def _serving() -> str:
    """Tabulate the committed results of `moesaic bench serve`."""
    paths = sorted((_PACKAGE.parents[1] / "bench" / "results").glob("serve-*.json"))
    return "\n\n".join(
        serving_table(path.name, json.loads(path.read_text("utf-8"))) for path in paths
    )


def serving_table(name: str, result: dict[str, Any]) -> str:
    """Tabulate a result of `moesaic bench serve`."""
    machine, cells = result["machine"], result["cells"]
    lines = [
        f"`{name}`: {machine['cpu']}, {machine['threads']} thread, torch {machine['torch']}, "
        f"{cells[0]['weights']}, prompts of {cells[0]['prompt_tokens']} tokens, answers of "
        f"{cells[0]['tokens']}, commit {result['commit']}.",
        "",
        "| model | asked | requests | tokens/s | of the engine | first token ms, p50 | p95 |",
        "|---|---|---|---|---|---|---|",
    ]
    for cell in cells:
        for row in cell["rows"]:
            if "skipped" in row:
                lines.append(f"| {cell['model']} | {row['way']} | | {row['skipped']} | | | |")
                continue
            for count, found in row["requests"].items():
                lines.append(
                    f"| {cell['model']} | {row['way']} | {count} | {found['tokens_per_s']:.1f} | "
                    f"{found['of_engine']:.0%} | {1e3 * found['first_p50_s']:.0f} | "
                    f"{1e3 * found['first_p95_s']:.0f} |"
                )
    return "\n".join(lines)


def _conversions() -> str:
    """Tabulate the committed result of `bench/conversions.py`."""
    path = _PACKAGE.parents[1] / "bench" / "results" / "conversions-smollm2.json"
    rows = json.loads(path.read_text("utf-8"))["rows"]
    return _rows(
        ("method", "active", "seconds", "peak memory", "measured on"),
        (
            (
                row["method"],
                f"{row['active']:g}",
                f"{row['seconds']:.0f}",
                f"{row['peak_bytes'] / 1e9:.1f} GB",
                f"{row['machine']['cpu']}, {row['machine']['threads']} threads, commit "
                f"{row['commit'][:7]}",
            )
            for row in rows
        ),
    )


def _settings() -> str:
    """Tabulate what was predicted of the protocol `bench/choices.yaml`, in its order."""
    root = _PACKAGE.parents[1] / "bench"
    text = (root / "results" / "choices" / "predictions.jsonl").read_text("utf-8")
    lines = [json.loads(line) for line in text.splitlines()]
    found = {line["method"]: line["prediction"] for line in lines}
    protocol = yaml.safe_load((root / "choices.yaml").read_text("utf-8"))
    return _rows(
        ("", "settings", "predicted", "95% interval"),
        (
            (
                name,
                f"`{json.dumps(method['options'])}`",
                f"{found[name]['ratio']:.3f}",
                f"{found[name]['low']:.3f} to {found[name]['high']:.3f}",
            )
            for name, method in protocol["methods"].items()
            if name in found
        ),
    )


def _report(name: str) -> str:
    """Show the report that stands beside committed results; a test writes it anew."""
    return (_PACKAGE.parents[1] / "bench" / "results" / name / "report.md").read_text("utf-8")


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


def _evidence() -> str:
    """Show what the evidence script of every working system found."""
    sections = []
    for system in catalog.systems():
        if system.evidence is None:
            continue
        record = _record(system.evidence)
        machine = record["machine"]
        sections += [
            f"### {system.name}",
            f"{record['sentence']}",
            _rows(
                ("claim", "came out"),
                ((claim, "yes" if true else "**no**") for claim, true in record["holds"].items()),
            ),
            f"`{system.evidence}`: {len(record['results']['seeds'])} seeds; {machine['cpu']}, "
            f"{machine['threads']} thread, torch {machine['torch']}; {record['date']}, commit "
            f"{record['commit'][:7]}.",
        ]
    return "\n\n".join(sections)


def _dsmoe() -> str:
    """Tabulate the evidence for DSMoE as its paper does; entries are means over seeds."""
    (path,) = (s.evidence for s in catalog.systems() if s.id == "dsmoe" and s.evidence)
    record = _record(path)
    seeds, experts = record["results"]["seeds"], record["config"]["experts"]
    ours = [seed["straight-through"] for seed in seeds]
    ways = [way for way, found in seeds[0].items() if isinstance(found, dict)]
    counts = [point["count"] for point in ours[0]["counts"]]
    return "\n\n".join(
        [
            "### Tables 1 and 3, Figure 2: every way at the same count",
            _rows(
                ("trained as", "loss", f"active of {experts}", *(f"at {c:g}" for c in counts)),
                (
                    (
                        way,
                        _over_seeds([seed[way]["loss"] for seed in seeds], 3),
                        _over_seeds([seed[way]["active"] for seed in seeds], 2),
                        *(
                            _over_seeds([seed[way]["counts"][n]["loss"] for seed in seeds], 3)
                            if "counts" in seeds[0][way]
                            else ""
                            for n in range(len(counts))
                        ),
                    )
                    for way in ways
                ),
            ),
            "### Table 4: one model at several thresholds",
            _rows(
                ("threshold", "loss", f"active of {experts}"),
                (
                    (
                        f"{points[0]['threshold']:g}",
                        _over_seeds([point["loss"] for point in points], 3),
                        _over_seeds([point["active"] for point in points], 2),
                    )
                    for points in zip(*(found["sweep"] for found in ours), strict=True)
                ),
            ),
            "### Tables 5 and 6: loss against tokens",
            _rows(
                ("tokens", *ways, f"active of {experts} (straight-through)"),
                (
                    (
                        f"{points['tokens']:,}",
                        *(
                            _over_seeds([seed[way]["curve"][n]["loss"] for seed in seeds], 3)
                            for way in ways
                        ),
                        _over_seeds([found["curve"][n]["active"] for found in ours], 2),
                    )
                    for n, points in enumerate(ours[0]["curve"])
                ),
            ),
            "### Figure 3: active blocks by layer and kind of text",
            _rows(
                ("layer", *ours[0]["layers"]),
                (
                    (
                        str(layer),
                        *(
                            _over_seeds([found["layers"][text][layer] for found in ours], 2)
                            for text in ours[0]["layers"]
                        ),
                    )
                    for layer in range(record["config"]["layers"])
                ),
            ),
        ]
    )


def _over_seeds(values: list[float], digits: int) -> str:
    """Give the mean, and the least and the largest."""
    mean = sum(values) / len(values)
    if min(values) == max(values):
        return f"{mean:.{digits}f}"
    return f"{mean:.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"
