"""The committed leaderboard: measured by the committed protocol, told as it was measured."""

import json
import shutil

import pytest
from test_house import ROOT

from moesaic.recipes.architectures import (
    ArchitectureCell,
    read_architectures,
    write_leaderboard,
)
from moesaic.recipes.architectures.measure import matched, resolved
from moesaic.recipes.comparison import cell_of, read_lines

HOME = ROOT / "bench" / "results" / "architectures"
PROTOCOL = read_architectures(ROOT / "bench" / "architectures.yaml")
LINES = {cell_of(line, ArchitectureCell): line for line in read_lines(HOME, ArchitectureCell)}


@pytest.mark.parametrize("cell", LINES, ids=lambda cell: cell.key)
def test_cells_were_measured_by_the_committed_protocol_from_a_clean_tree(cell):
    line = LINES[cell]
    found = matched(PROTOCOL, cell.architecture)
    settings = json.loads(json.dumps(resolved(PROTOCOL, cell, found)))
    assert {name: line[name] for name in settings} == settings
    assert line["status"] == "done"
    assert line["versions"]["commit"]
    assert "-dirty" not in line["versions"]["commit"]


def test_the_report_is_that_of_the_lines(tmp_path):
    for name in ("results.jsonl", "run.json"):
        shutil.copy(HOME / name, tmp_path)
    write_leaderboard(PROTOCOL, tmp_path)
    assert (HOME / "report.md").read_text() == (tmp_path / "report.md").read_text()


def test_every_cell_learned_and_fits_into_four_minutes():
    for line in LINES.values():
        # A guess among bytes costs log 257 = 5.55.
        assert line["quality"]["loss"] < 3.5
        assert line["seconds"]["training"] + line["seconds"]["evaluation"] < 240
