"""The committed comparison: measured by the committed protocol, told as it was measured."""

import shutil
from dataclasses import replace

import pytest
from committed import check_line
from test_house import ROOT

from moesaic.analysis import checks
from moesaic.analysis.comparison import entries, verdict
from moesaic.conversion.dsmoe import PRESETS
from moesaic.recipes.comparison import read_protocol, write_comparison
from moesaic.recipes.comparison.lines import PREDICTIONS
from moesaic.recipes.comparison.run import gather, grid_of

HOME = ROOT / "bench" / "results" / "quality"
PROTOCOL = read_protocol(ROOT / "bench" / "quality.yaml")
LINES = grid_of(PROTOCOL).lines(HOME)
PREDICTED = grid_of(PROTOCOL).lines(HOME, PREDICTIONS)
# Whole blocks, and with thresholds within them.
OURS = ("dsmoe", "dsmoe-thresholds")


def ratio(line):
    return line["quality"]["ratio"]


def done(active):
    """Lines of methods near a budget, bounds left out."""
    return [
        line
        for cell, line in LINES.items()
        if line["status"] == "done"
        and cell.active == active
        and line["kind"] != "bound"
        and abs(line["cost"]["active_ffn_fraction"] - active) <= 0.02
    ]


@pytest.mark.parametrize("cell", LINES, ids=lambda cell: cell.key)
def test_cells_were_measured_by_the_committed_protocol_from_a_clean_tree(cell):
    check_line(PROTOCOL, cell, LINES[cell])


@pytest.mark.parametrize("cell", PREDICTED, ids=lambda cell: cell.key)
def test_predictions_are_those_of_the_committed_protocol_from_a_clean_tree(cell):
    check_line(PROTOCOL, cell, PREDICTED[cell])


def test_the_report_is_that_of_the_lines(tmp_path):
    for name in ("results.jsonl", "dense.json", "run.json", PREDICTIONS):
        shutil.copy(HOME / name, tmp_path)
    write_comparison(PROTOCOL, tmp_path)
    assert (HOME / "report.md").read_text() == (tmp_path / "report.md").read_text()


def test_four_predictions_in_five_are_within_fifteen_percent():
    found = checks(gather(PROTOCOL, [HOME]))
    assert len(found) >= 48
    assert sum(abs(check.off) <= 0.15 for check in found) >= 0.8 * len(found)


def trained(method, active):
    """The line of a method after training."""
    return next(line for line in done(active) if line["method"] == method and line["trained"])


def test_the_preset_is_what_was_measured():
    measured = PROTOCOL.methods["dsmoe-thresholds"].config(0.5, 0)
    assert measured == replace(PRESETS["thresholds"], experts=96, active=0.5)


def test_half_active_holds_what_we_ask_of_it():
    """After training ours is within 1.35, and below every other method in weights that are used."""
    best = min(ratio(trained(method, 0.5)) for method in OURS)
    assert best <= 1.35
    assert all(ratio(line) > best for line in done(0.5) if line["method"] not in OURS)


@pytest.mark.parametrize("trained", [False, True])
def test_at_half_active_ours_is_best_on_the_same_text(trained):
    comparison = gather(PROTOCOL, [HOME])
    sentence = verdict(entries(comparison), 0.5, trained, comparison.protocol)
    assert "dsmoe-thresholds is best: " in sentence


def test_whole_blocks_are_below_all_but_single_weights_and_inputs():
    """Which saves no time where weights are read in blocks; the others of these lose more."""
    ours = ratio(trained("dsmoe", 0.5))
    assert ours <= 1.35
    others = [line for line in done(0.5) if line["method"] not in OURS]
    better = {(line["method"], line["trained"]) for line in others if ratio(line) <= ours}
    assert better <= {("sparsegpt", True), ("teal", True)}


@pytest.mark.parametrize(("active", "most"), [(0.375, 1.30), (0.25, 2.0)])
def test_where_little_is_active_ours_is_best_without_training(active, most):
    """1.30 at three eighths was hoped for after 20 million tokens on a GPU."""
    (ours,) = (
        line
        for line in done(active)
        if line["method"] == "dsmoe-thresholds" and not line["trained"]
    )
    assert ratio(ours) <= most
    others = [line for line in done(active) if line["method"] != "dsmoe-thresholds"]
    assert len(others) >= 5
    assert all(ratio(line) > ratio(ours) for line in others)
    comparison = gather(PROTOCOL, [HOME])
    sentence = verdict(entries(comparison), active, False, comparison.protocol)
    assert "dsmoe-thresholds is best: " in sentence


def test_training_gains_at_three_eighths():
    assert ratio(trained("dsmoe-thresholds", 0.375)) <= 1.20


def test_three_quarters_active_holds_what_we_ask_of_it():
    """After training ours is within 1.08."""
    assert ratio(trained("dsmoe", 0.75)) <= 1.08
