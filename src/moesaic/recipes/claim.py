"""Directories of work: each belongs to one set of settings, and to one process at a time."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moesaic._errors import InputError
from moesaic._files import read_json, write_json

try:
    import fcntl
except ImportError:  # not on Windows, where two runs of one directory are not noticed
    fcntl = None  # type: ignore[assignment]

_RECORD = "run.json"
_LOCK = ".lock"


@contextlib.contextmanager
def held(directory: Path) -> Iterator[None]:
    """Make a directory if there is none and keep other processes out of it.

    The system lets go of it when this process ends, however that is.

    Raises:
        InputError: If another process works in it, or it holds something else.
    """
    _refuse_others(directory)
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / _LOCK).open("a") as handle:
        if fcntl is not None:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InputError(
                    f"another process works in {directory}; wait for it or choose another output"
                ) from None
        yield


def claim(directory: Path, resolved: dict[str, Any], what: str) -> None:
    """Make a directory of work ours, which is held, or refuse one that holds other work.

    A directory in which nothing was finished yet may change its owner.

    Args:
        directory: Where the work goes.
        resolved: Everything that decides its result, as plain data.
        what: What that is called, for the message.

    Raises:
        InputError: Naming the first difference.
    """
    _refuse_others(directory)
    path = directory / _RECORD
    if path.is_file() and (difference := _first_difference(read_json(path), resolved, what)):
        if _content(directory) - {_RECORD, "data"}:
            raise InputError(
                f"{directory} holds a run with another {difference}; choose another "
                "output or delete it"
            )
        path.unlink()
    if not path.is_file():
        write_json(path, resolved)
    # Killed writers leave these; none of them is read again.
    for left in [*directory.rglob(".*.tmp"), *directory.rglob(".*.old")]:
        shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)


def _refuse_others(directory: Path) -> None:
    if not (directory / _RECORD).is_file() and _content(directory):
        raise InputError(f"output {directory} is not empty and holds no run; choose another")


def _content(directory: Path) -> set[str]:
    """Names in a directory, without what a killed process may have left beside its record."""
    if not directory.is_dir():
        return set()
    names = {entry.name for entry in directory.iterdir()} - {_LOCK}
    return {name for name in names if not name.startswith(f".{_RECORD}.")}


def holds_run(directory: Path, resolved: dict[str, Any]) -> bool:
    """Whether a directory belongs to this work."""
    path = directory / _RECORD
    return path.is_file() and not _first_difference(read_json(path), resolved, "")


def _first_difference(old: Any, new: Any, where: str) -> str:
    """Name the first place where two plain values differ; empty when they do not."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*new, *old]:
            if key not in old or key not in new:
                return f"{where}.{key}"
            if found := _first_difference(old[key], new[key], f"{where}.{key}"):
                return found
        return ""
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for index, (a, b) in enumerate(zip(old, new, strict=True)):
            if found := _first_difference(a, b, f"{where}[{index}]"):
                return found
        return ""
    return "" if old == new else f"{where} ({old!r}, not {new!r})"
