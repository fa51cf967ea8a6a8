"""How long work tells its progress; the command line draws it, the library never prints."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from typing import Protocol


class Stage(Protocol):
    """One stage of work that is under way."""

    def advance(self, n: float = 1.0) -> None:
        """Report `n` more units done."""


class Progress(Protocol):
    """Receives the stages of long work."""

    def stage(self, name: str, total: float, unit: str) -> AbstractContextManager[Stage]:
        """Open a stage of `total` units; it ends with the context."""


class _SilentStage:
    def advance(self, n: float = 1.0) -> None:
        """Ignore the report."""


class SilentProgress:
    """Progress that nobody watches: the default everywhere."""

    def stage(self, name: str, total: float, unit: str) -> AbstractContextManager[Stage]:
        """Open a stage that ignores its reports."""
        return contextlib.nullcontext(_SilentStage())


SILENT: Progress = SilentProgress()
