"""Committed lines of a comparison of methods: where they are, and what is asked of every one."""

from pathlib import Path

from moesaic.recipes.comparison import Protocol, cell_of
from moesaic.recipes.comparison.lines import PREDICTIONS, RESULTS, read_lines
from moesaic.recipes.comparison.run import grid_of

RESULTS_ROOT = Path(__file__).resolve().parents[1] / "bench" / "results"


def lines_of(name):
    """The results of a directory by their cells."""
    return {cell_of(line): line for line in read_lines(RESULTS_ROOT / name, name=RESULTS)}


def predictions_of(name):
    """The predictions of a directory by their cells."""
    return {cell_of(line): line for line in read_lines(RESULTS_ROOT / name, name=PREDICTIONS)}


def check_line(protocol: Protocol, cell, line):
    """It is of the protocol's settings, and from a clean tree."""
    grid = grid_of(protocol)
    assert cell in grid.cells
    assert grid.is_current(cell, line)
    assert line["versions"]["commit"]
    assert "-dirty" not in line["versions"]["commit"]
