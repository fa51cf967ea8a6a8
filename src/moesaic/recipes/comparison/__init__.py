"""One protocol for all methods: what is lost at the same measured part of the network in use."""

from moesaic.recipes.comparison.cells import Cell, Selection, all_cells, select
from moesaic.recipes.comparison.lines import cell_of, read_lines
from moesaic.recipes.comparison.protocol import Protocol, build_protocol, read_protocol
from moesaic.recipes.comparison.run import compare, estimate, write_comparison

__all__ = [
    "Cell",
    "Protocol",
    "Selection",
    "all_cells",
    "build_protocol",
    "cell_of",
    "compare",
    "estimate",
    "read_lines",
    "read_protocol",
    "select",
    "write_comparison",
]
