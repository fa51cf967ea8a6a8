"""One protocol for all architectures: trained from scratch at equal counted FLOPs per token."""

from moesaic.recipes.architectures.cells import ArchitectureCell, architecture_cells
from moesaic.recipes.architectures.protocol import (
    Architecture,
    ArchitectureProtocol,
    build_architectures,
    read_architectures,
)
from moesaic.recipes.architectures.run import (
    compare_architectures,
    estimate_architectures,
    write_leaderboard,
)

__all__ = [
    "Architecture",
    "ArchitectureCell",
    "ArchitectureProtocol",
    "architecture_cells",
    "build_architectures",
    "compare_architectures",
    "estimate_architectures",
    "read_architectures",
    "write_leaderboard",
]
