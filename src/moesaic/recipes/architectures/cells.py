"""The cells of a comparison of architectures: one architecture with one seed."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from moesaic.recipes.architectures.protocol import ArchitectureProtocol


@dataclass(frozen=True, slots=True, kw_only=True)
class ArchitectureCell:
    """One measurement.

    Attributes:
        architecture: Name in the protocol.
        seed: Of the first weights and of the order of the text.
    """

    architecture: str
    seed: int

    @property
    def key(self) -> str:
        """Its name among all cells, and that of its directory."""
        return f"{self.architecture}-seed{self.seed}"

    def plain(self) -> dict[str, Any]:
        """The cell as data."""
        return asdict(self)


def architecture_cells(protocol: ArchitectureProtocol) -> list[ArchitectureCell]:
    """List the cells of a protocol: a first seed of all, then the next."""
    return [
        ArchitectureCell(architecture=name, seed=seed)
        for seed in protocol.seeds
        for name in protocol.architectures
    ]
