"""What is asked of every committed line of a comparison of methods."""

from moesaic.recipes.comparison.run import grid_of


def check_line(protocol, cell, line):
    """It is of the protocol's settings, and from a clean tree."""
    grid = grid_of(protocol)
    assert cell in grid.cells
    assert grid.is_current(cell, line)
    assert line["versions"]["commit"]
    assert "-dirty" not in line["versions"]["commit"]
