"""The cells of a comparison: one method at one budget with one seed, trained or not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import yaml

from moesaic._config import is_one_of
from moesaic._errors import InputError, UnknownNameError
from moesaic._registry import unknown_name
from moesaic.recipes._yaml import load_yaml
from moesaic.recipes.comparison.protocol import Protocol


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One measurement.

    Attributes:
        method: Name in the protocol.
        active: Requested active fraction.
        seed: Of the conversion and the training.
        trained: Whether it is trained before it is measured.
    """

    method: str
    active: float
    seed: int
    trained: bool

    @property
    def key(self) -> str:
        """Its name among all cells, and that of its directory."""
        return f"{self.method}-{self.active:g}-seed{self.seed}" + "-trained" * self.trained

    def plain(self) -> dict[str, Any]:
        """The cell as data."""
        return {f.name: getattr(self, f.name) for f in fields(self)}


def all_cells(protocol: Protocol) -> list[Cell]:
    """List the cells of a protocol, those without training first: they answer soonest.

    Without training a method that has no seed gives the same for every seed, so it has one cell.
    """
    return [
        Cell(method=method.name, active=active, seed=seed, trained=trained)
        for trained in (False, True)
        for method in protocol.methods.values()
        if trained in protocol.trained_of(method)
        for active in protocol.budgets_of(method)
        for seed in (protocol.seeds if trained or method.seeded else protocol.seeds[:1])
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Which of the cells are meant.

    Attributes:
        only: `field=value` each; values of one field add up, different fields narrow down.
        shard: `i/n`: the i-th of n parts, each with its share of every kind of cell.
    """

    only: Sequence[str] = ()
    shard: str = "1/1"


C = TypeVar("C")


def select(cells: Sequence[C], selection: Selection) -> list[C]:
    """Choose cells, of whatever kind.

    The parts of a shard are disjoint and are together all the cells; `only` narrows each of them.

    Raises:
        InputError: If a field or value names no cell, or the shard is not `i/n`.
    """
    index, count = _shard(selection.shard)
    wanted: dict[str, list[Any]] = {}
    for condition in selection.only:
        name, value = _condition(condition, cells)
        wanted.setdefault(name, []).append(value)
    return [
        cell
        for cell in cells[index - 1 :: count]
        if all(getattr(cell, name) in values for name, values in wanted.items())
    ]


def _condition(condition: str, cells: Sequence[Any]) -> tuple[str, Any]:
    """Read `field=value` and check that it names a cell."""
    name, equals, text = condition.partition("=")
    names = [f.name for f in fields(cells[0])]
    if not equals:
        raise InputError(f"only must be field=value, got {condition!r}; try {names[0]}={condition}")
    if name not in names:
        raise UnknownNameError(unknown_name("field of a cell", name, names))
    known = sorted({getattr(cell, name) for cell in cells})
    if isinstance(known[0], str):
        if text not in known:
            raise UnknownNameError(unknown_name(f"{name} of the protocol", text, known))
        return name, text
    try:
        value = load_yaml(text)
    except yaml.YAMLError:
        value = text
    if not is_one_of(value, known):
        raise InputError(
            f"only {name}={text} names no cell of the protocol; it has "
            f"{', '.join(str(one).lower() for one in known)}"
        )
    return name, value


def _shard(text: str) -> tuple[int, int]:
    first, slash, second = text.partition("/")
    if not slash or not first.isdecimal() or not second.isdecimal():
        raise InputError(f"shard must be i/n, such as 1/4, got {text!r}")
    index, count = int(first), int(second)
    if not 1 <= index <= count:
        raise InputError(f"shard must be i/n with i from 1 to n, got {text}")
    return index, count
