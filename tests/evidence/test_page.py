"""The page of evidence holds the numbers of the committed files, and none of its own."""

import json
import re
import sys
from pathlib import Path

import pytest

from moesaic import catalog

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "evidence.md"
WITH_EVIDENCE = [system for system in catalog.systems() if system.evidence]


@pytest.fixture
def hooks(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    import hooks

    yield hooks
    del sys.modules["hooks"]


def way(loss, active, curve, **more):
    points = [{"tokens": 1000 * (n + 1), "loss": v, "active": 4 - n} for n, v in enumerate(curve)]
    return {"loss": loss, "active": active, "curve": points, **more}


def seed(shift):
    """Made-up results of two ways, one of them with a threshold."""
    ours = way(
        1.5 + shift,
        3.25,
        (1.75, 1.5 + shift),
        counts=[{"count": 2, "loss": 1.625}, {"count": 3, "loss": 1.5 + shift}],
        sweep=[{"threshold": 0.2, "loss": 1.25 + shift, "active": 3.5 - shift}],
        layers={"prose": [5.0 + shift, 2.0], "code": [4.0, 1.5]},
    )
    return {"seed": 0, "straight-through": ours, "top-3": way(1.75, 3.0, (2.0, 1.75))}


def test_tables_of_dsmoe_are_means_with_their_range(hooks, monkeypatch):
    record = {
        "config": {"experts": 8, "layers": 2},
        "results": {"seeds": [seed(0.0), seed(0.25)]},
    }
    monkeypatch.setattr(hooks, "_record", lambda path: record)
    lines = hooks.render("<!-- dsmoe -->").splitlines()
    both = "1.625 (1.500 to 1.750)"  # of 1.5 and 1.75
    for line in (
        "| trained as | loss | active of 8 | at 2 | at 3 |",
        f"| straight-through | {both} | 3.25 | 1.625 | {both} |",
        "| top-3 | 1.750 | 3.00 |  |  |",
        "| 0.2 | 1.375 (1.250 to 1.500) | 3.38 (3.25 to 3.50) |",
        "| 1,000 | 1.750 | 2.000 | 4.00 |",
        f"| 2,000 | {both} | 1.750 | 3.00 |",
        "| 0 | 5.12 (5.00 to 5.25) | 4.00 |",
        "| 1 | 2.00 | 1.50 |",
    ):
        assert line in lines


def test_tables_of_dsmoe_read_the_committed_file(hooks):
    page = hooks.render("<!-- dsmoe -->")
    seeds = json.loads((ROOT / "evidence" / "dsmoe.json").read_text("utf-8"))["results"]["seeds"]
    for route in ("dense", "straight-through", "one rate", "hard", "soft", "top-3"):
        mean = sum(seed[route]["loss"] for seed in seeds) / len(seeds)
        assert f"| {route} | {mean:.3f} (" in page
    for points in zip(*(seed["straight-through"]["sweep"] for seed in seeds), strict=True):
        active = sum(point["active"] for point in points) / len(seeds)
        assert re.search(rf"^\| {points[0]['threshold']} \| .* \| {active:.2f} ", page, re.M)


@pytest.mark.parametrize("system", WITH_EVIDENCE, ids=lambda system: system.id)
def test_page_shows_every_result(hooks, system):
    page = hooks.render("<!-- evidence -->")
    record = json.loads((ROOT / system.evidence).read_text("utf-8"))
    assert f"### {system.name}\n\n{record['sentence']}\n" in page
    for claim, true in record["holds"].items():
        assert f"| {claim} | {'yes' if true else '**no**'} |" in page
    assert f"`{system.evidence}`" in page
    assert f"commit {record['commit'][:7]}" in page


def test_no_result_is_typed_into_the_page():
    text = PAGE.read_text("utf-8")
    assert {"<!-- dsmoe -->", "<!-- evidence -->"} <= set(text.splitlines())
    # 0.5 is the threshold of the paper.
    assert set(re.findall(r"\d+\.\d+", text)) == {"0.5"}
