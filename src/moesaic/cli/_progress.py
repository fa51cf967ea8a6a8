"""Progress on stderr: bars with the time left on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

# Seconds between lines where there is no terminal.
_EVERY = 10.0


class _Bar:
    def __init__(self, progress: Progress, task: TaskID) -> None:
        self.progress = progress
        self.task = task

    def advance(self, n: float = 1.0) -> None:
        self.progress.advance(self.task, n)


class _Lines:
    def __init__(self, name: str, total: float, unit: str) -> None:
        self.name, self.total, self.unit = name, total, unit
        self.done = 0.0
        self.start = self.last = time.monotonic()

    def advance(self, n: float = 1.0) -> None:
        self.done += n
        now = time.monotonic()
        if now - self.last >= _EVERY and self.done:
            self.last = now
            left = (now - self.start) * (self.total - self.done) / self.done
            print(
                f"{self.name}: {self.done:,.0f} of {self.total:,.0f} {self.unit}, "
                f"about {max(0.0, left):.0f} s left",
                file=sys.stderr,
                flush=True,
            )


class TerminalProgress:
    """Draws the stages of long work on stderr; use it as a context."""

    def __init__(self) -> None:
        console = Console(stderr=True)
        self._bars = (
            Progress(
                TextColumn("{task.description:<18}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[unit]}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=console,
            )
            if console.is_terminal
            else None
        )

    def __enter__(self) -> TerminalProgress:
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bars is not None:
            self._bars.stop()

    @contextlib.contextmanager
    def stage(self, name: str, total: float, unit: str) -> Iterator[_Bar | _Lines]:
        """Open a stage."""
        if self._bars is not None:
            yield _Bar(self._bars, self._bars.add_task(name, total=total, unit=unit))
            return
        lines = _Lines(name, total, unit)
        yield lines
        seconds = time.monotonic() - lines.start
        print(f"{name}: done in {seconds:.1f} s", file=sys.stderr, flush=True)
