"""Finds every method table of the package; nothing lists the families by hand."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from moesaic._errors import InputError, UnknownNameError
from moesaic._registry import MethodInfo, MethodTable, unknown_name

_PACKAGE = __package__.partition(".")[0]
_ROOT = Path(__file__).resolve().parents[1]


@functools.cache
def tables() -> Mapping[str, MethodTable]:
    """Give every method table of the package by the name of its family.

    A table is a `MethodTable` in a module called `_table`. None of them imports torch, so
    listing stays quick.

    Raises:
        ValueError: If two tables have the same family.
    """
    found: dict[str, MethodTable] = {}
    for path in sorted(_ROOT.rglob("_table.py")):
        parts = path.relative_to(_ROOT).with_suffix("").parts
        module = importlib.import_module(".".join((_PACKAGE, *parts)))
        for value in vars(module).values():
            if not isinstance(value, MethodTable) or found.get(value.family) is value:
                continue
            if value.family in found:
                raise ValueError(f"two tables are called {value.family!r}; rename one")
            found[value.family] = value
    return MappingProxyType(dict(sorted(found.items())))


def method(part: str) -> MethodInfo:
    """Give the record of a registered part, written `family:name`.

    Raises:
        InputError: If `part` has no colon.
        UnknownNameError: If the family or the name is unknown; carries the closest ones.
    """
    family, colon, name = part.partition(":")
    if not colon:
        raise InputError(f"part must be written family:name, got {part!r}")
    if family not in tables():
        raise UnknownNameError(unknown_name("family", family, tables()))
    return tables()[family][name]
