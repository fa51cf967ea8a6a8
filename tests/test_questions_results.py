"""The committed answers to questions: of the protocol, told as they were."""

import shutil

import pytest
from committed import check_line
from test_house import ROOT, hooks

from moesaic.recipes.comparison import build_protocol, write_comparison
from moesaic.recipes.comparison.run import grid_of
from moesaic.recipes.recipe import read_values

HOME = ROOT / "bench" / "results" / "questions"
PROTOCOL = build_protocol(
    read_values(
        ROOT / "bench" / "quality.yaml",
        "protocol",
        "model and methods",
        ("questions.per_domain=50",),
    )
)
LINES = grid_of(PROTOCOL).lines(HOME)


@pytest.mark.parametrize("cell", LINES, ids=lambda cell: cell.key)
def test_cells_are_those_of_the_protocol_from_a_clean_tree(cell):
    line = LINES[cell]
    check_line(PROTOCOL, cell, line)
    domains = ("code", "docs", "prose")
    wanted = {f"{kind}-{domain}" for kind in ("continuation", "last-word") for domain in domains}
    assert line["accuracy"].keys() == wanted


def test_the_report_is_that_of_the_lines(tmp_path):
    for name in ("results.jsonl", "dense.json", "run.json"):
        shutil.copy(HOME / name, tmp_path)
    write_comparison(PROTOCOL, tmp_path)
    assert (HOME / "report.md").read_text() == (tmp_path / "report.md").read_text()


def test_the_page_shows_what_every_method_answered():
    page = hooks.render("<!-- questions -->")
    assert "| dense parent | 1 |" in page
    for cell in LINES:
        assert f"| {cell.method} " in page
