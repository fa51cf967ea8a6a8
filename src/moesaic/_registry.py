"""Tables of methods: one record per method, listed without importing torch, loaded on demand."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from moesaic._errors import UnknownNameError


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodInfo:
    """One registered method.

    Attributes:
        name: Registered name, in kebab-case or as other software spells it.
        target: `package.module:Object` of the class or function.
        config: `package.module:Config` of its frozen dataclass of settings.
        summary: What it does, at most 80 characters.
        paper: Title or arXiv id of the source; "ours" when there is none.
        status: `preview` methods may change without notice.
        abilities: What the family's contract suite may ask of it.
    """

    name: str
    target: str
    config: str
    summary: str
    paper: str
    status: Literal["stable", "preview"] = "stable"
    abilities: frozenset[str] = frozenset()


class MethodTable(Mapping[str, MethodInfo]):
    """The methods of one family, by name.

    Args:
        family: What the family is called in error messages, for example `router`.
        records: Its methods; names must be distinct.
    """

    def __init__(self, family: str, records: Iterable[MethodInfo]) -> None:
        self.family = family
        self._records: dict[str, MethodInfo] = {}
        for record in records:
            self.register(record)

    def register(self, record: MethodInfo) -> None:
        """Add a method, for plug-ins; a name that is taken raises `ValueError`."""
        if record.name in self._records:
            raise ValueError(f"{self.family} {record.name!r} is registered twice")
        self._records[record.name] = record

    def __getitem__(self, name: str) -> MethodInfo:
        try:
            return self._records[name]
        except KeyError:
            raise UnknownNameError(unknown_name(self.family, name, self._records)) from None

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._records))

    def __len__(self) -> int:
        return len(self._records)

    def __contains__(self, name: object) -> bool:
        return name in self._records

    def load(self, name: str) -> Any:
        """Import and return the object behind a name."""
        return load_object(self[name].target)

    def load_config(self, name: str) -> Any:
        """Import and return the config dataclass of a name."""
        return load_object(self[name].config)


def load_object(target: str) -> Any:
    """Import `package.module:Object`; an import error propagates."""
    module, _, attribute = target.partition(":")
    # The package only matters in a bundled checkpoint, where module names are relative.
    return getattr(importlib.import_module(module, package=__package__), attribute)


def unknown_name(field: str, name: str, known: Iterable[str]) -> str:
    """Say that `name` is unknown, with the closest names that exist."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(names)}"
    return f"{field} {name!r} is unknown; {hint}"
