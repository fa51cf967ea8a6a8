"""Every working system has a page that says what its row and its committed evidence say."""

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from moesaic import catalog

ROOT = Path(__file__).resolve().parents[2]
WORKS = [system for system in catalog.systems() if system.status == "works"]


@pytest.fixture
def hooks(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    import hooks

    yield hooks
    for name in ("hooks", "system_pages", "markup"):
        del sys.modules[name]


@pytest.mark.parametrize("system", WORKS, ids=lambda system: system.id)
def test_page_says_all_of_the_row_and_its_evidence(hooks, system):
    page = sys.modules["system_pages"].render_system(system)
    assert page.startswith(f"# {system.name}\n\n{system.summary}\n")
    for text in (system.use_when, system.cost, *(f"- {trap}" for trap in system.traps)):
        assert text in page
    record = json.loads((ROOT / system.evidence).read_text("utf-8"))
    assert record["sentence"] in page
    for claim, true in record["holds"].items():
        assert f"| {claim} | {'yes' if true else '**no**'} |" in page
    for part in system.uses:
        assert f"| `{part}` | {catalog.method(part).summary} |" in page
    assert f"`{system.check}`" in page
    for path in re.findall(r"`((?:src|tests|evidence)/[\w/]+\.\w+)`", page):
        assert (ROOT / path).is_file(), path
    for link in re.findall(r"\]\(\.\./([\w/.-]+)\)", page):
        assert (ROOT / "docs" / link).is_file(), link


def test_numbers_are_means_over_seeds(hooks):
    means = sys.modules["system_pages"]._means
    seeds = [
        {"seed": 0, "plain": {"loss": 1.0, "load": [1, 2]}, "on": True, "only": 3},
        {"seed": 1, "plain": {"loss": 2.0, "load": [1, 2]}, "on": True},
    ]
    assert list(means(seeds)) == [("plain: loss", "1.5", "1", "2")]


def test_pages_are_in_the_navigation_and_in_the_lists(hooks):
    config = SimpleNamespace(nav=[{"Home": "index.md"}, {"Published systems": "systems.md"}])
    hooks.on_config(config)
    listed = config.nav[1]["Published systems"]
    assert listed[0] == "systems.md"
    assert listed[1:] == [{system.name: f"systems/{system.id}.md"} for system in WORKS]
    systems, choices = hooks.render("<!-- systems -->"), hooks.render("<!-- choices -->")
    for system in WORKS:
        link = f"[{system.name}](systems/{system.id}.md)"
        assert link in systems
        assert f"| {link} | {system.use_when} |" in choices


def test_page_that_helps_to_choose_links_what_exists():
    page = (ROOT / "docs" / "choosing.md").read_text("utf-8")
    linked = set(re.findall(r"\]\(systems/([\w-]+)\.md\)", page))
    assert linked <= {system.id for system in WORKS}
    assert "<!-- choices -->" in page
