"""One page for each working system, made of its row in the catalog and its committed evidence."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from markup import ROOT, paper, record, rows

from moesaic import catalog

# Rows of a table of results; the script's file holds them all.
_MOST_ROWS = 80


def page_of(system: catalog.System) -> str:
    """Name the page of a system, from the top of the site."""
    return f"systems/{system.id}.md"


def add_pages(files: Any, config: Any) -> None:
    """Add the page of every working system to the files of the site."""
    from mkdocs.structure.files import File

    for system in catalog.systems():
        if system.status == "works":
            files.append(File.generated(config, page_of(system), content=render_system(system)))


def render_system(system: catalog.System) -> str:
    """Write the page of a working system."""
    assert system.check is not None
    assert system.evidence is not None
    sections = [
        f"# {system.name}",
        system.summary,
        f"{system.title}, {paper(system.arxiv)}; `{system.id}` in the catalog.",
        "## When to use it",
        system.use_when,
        "## What it costs",
        system.cost,
        "## How to use it",
        _example(system),
        "## What was shown",
        *_evidence(system.evidence),
        "## Traps",
        "\n".join(f"- {trap}" for trap in system.traps),
        "## Made of",
        rows(
            ("part", "what it does", "documented under", "file"),
            (_part(part) for part in system.uses),
        ),
        f"Held to its paper by `{system.check}`. "
        f"Every part is also under the contract suite of its family.",
    ]
    return "\n\n".join(sections) + "\n"


def choices() -> str:
    """Say of every working system when to use it, and how much of its paper came out."""
    return rows(
        ("system", "when to use it", "of its paper's claims came out"),
        (
            (f"[{system.name}]({page_of(system)})", system.use_when, _score(system))
            for system in catalog.systems()
            if system.status == "works"
        ),
    )


def _score(system: catalog.System) -> str:
    assert system.evidence is not None
    holds = record(system.evidence)["holds"]
    return f"{sum(holds.values())} of {len(holds)}"


def _example(system: catalog.System) -> str:
    (first, *_) = system.example
    if not first.endswith(".yaml"):
        return "```python\n" + "\n".join(system.example) + "\n```"
    text = (ROOT / first).read_text("utf-8").rstrip()
    return f"```bash\nmoesaic run {first}\n```\n\n```yaml\n{text}\n```"


def _evidence(path: str) -> list[str]:
    """The sentence, the claims and the numbers of a committed result."""
    found = record(path)
    machine, seeds = found["machine"], found["results"]["seeds"]
    numbers = list(_means(seeds))
    sections = [
        found["sentence"],
        "A card is what we noted of a paper beforehand, with what it predicts. These are models of "
        "a minute: they say whether the mechanism works as described, not how large its effect is "
        "in a real one.",
        rows(
            ("claim", "came out"),
            ((claim, "yes" if true else "**no**") for claim, true in found["holds"].items()),
        ),
    ]
    if numbers:
        table = rows(("measured", "mean over seeds", "least", "largest"), numbers[:_MOST_ROWS])
        indented = "\n".join(f"    {line}" for line in table.splitlines())
        sections.append(f'??? note "Every number"\n\n{indented}')
    return [
        *sections,
        f"`{path}`, written by `{path.removesuffix('json')}py`: {len(seeds)} seeds; "
        f"{machine['cpu']}, {machine['threads']} thread, torch {machine['torch']}; "
        f"{found['date']}, commit {found['commit'][:7]}.",
    ]


def _means(seeds: list[Mapping[str, Any]]) -> Iterator[tuple[str, ...]]:
    """Every number that all seeds have, by its path; lists are left to the file."""
    flat = [dict(_flat(seed)) for seed in seeds]
    for name in flat[0]:
        values = [one[name] for one in flat if name in one]
        if name != "seed" and len(values) == len(flat):
            mean = sum(values) / len(values)
            yield name, *(f"{value:.4g}" for value in (mean, min(values), max(values)))


def _flat(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, inner in value.items():
        path = f"{prefix}: {name}" if prefix else str(name)
        if isinstance(inner, Mapping):
            yield from _flat(inner, path)
        elif isinstance(inner, (int, float)) and not isinstance(inner, bool):
            yield path, float(inner)


def _part(part: str) -> tuple[str, str, str, str]:
    """A registered part: its name, what it does, the page of its family and its file."""
    info = catalog.method(part)
    family = part.partition(":")[0]
    wanted = re.compile(rf"^<!-- methods: {family} -->$", re.MULTILINE)
    pages = [
        page
        for page in sorted((ROOT / "docs" / "methods").glob("*.md"))
        if wanted.search(page.read_text("utf-8"))
    ]
    page = f"[{pages[0].stem}](../methods/{pages[0].name})" if pages else ""
    module = info.target.partition(":")[0]
    return f"`{part}`", info.summary, page, f"`src/{module.replace('.', '/')}.py`"
