"""A piece of work in a fresh process, which tells its progress and ends when its parent does.

So memory is that of the piece, a crash is one result, and nothing is left of it for the next. Both
ends are here: `run_piece` starts a piece and listens, `main` is what the new process runs. A piece
is one JSON document on its input; what it says are JSON lines on its output; what libraries print
goes to a log.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TextIO

from moesaic._errors import MoesaicError
from moesaic._progress import Progress, Stage
from moesaic._registry import load_object
from moesaic.recipes.comparison.piece import RefusedError

_LAST_LINES = 4000
# What does the pieces of a kind of protocol; imported in the process that does them.
_KINDS = {
    "methods": "moesaic.recipes.comparison.measure:do_methods",
    "architectures": "moesaic.recipes.architectures.measure:do_architectures",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a piece of work ended.

    Attributes:
        status: `done`; `refused`, by a method; or `error`.
        value: What it gave.
        reason: One sentence, where it gave nothing.
    """

    status: Literal["done", "refused", "error"]
    value: dict[str, Any] | None = None
    reason: str = ""


def run_piece(piece: dict[str, Any], log: Path, progress: Progress) -> Outcome:
    """Do a piece of work in a process of its own.

    Args:
        piece: See `do_piece`.
        log: File for what it prints.
        progress: Told what the piece tells.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    with (
        log.open("w", encoding="utf-8") as errors,
        subprocess.Popen(
            [sys.executable, "-c", f"from {__name__} import main; main()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            env=environment,
            text=True,
        ) as process,
    ):
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            # Its input stays open as long as this process lives; see `_end_with_parent`.
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(json.dumps(piece) + "\n")
                process.stdin.flush()
            outcome = _listen(process.stdout, progress)
            code = process.wait()
        except BaseException:
            process.kill()
            raise
    if outcome is not None:
        return outcome
    return Outcome(status="error", reason=_crash(code, log))


def _listen(lines: Iterable[str], progress: Progress) -> Outcome | None:
    """Pass progress on until the process ends; its outcome, if it told one."""
    outcome = None
    with ExitStack() as stack:
        stages: dict[int, tuple[ExitStack, Stage]] = {}
        for text in lines:
            message = json.loads(text)
            match message.pop("what"):
                case "stage":
                    # Of its own, so that it ends when the piece says so and not later than it.
                    own = stack.enter_context(ExitStack())
                    opened = progress.stage(message["name"], message["total"], message["unit"])
                    stages[message["number"]] = (own, own.enter_context(opened))
                case "advance":
                    stages[message["number"]][1].advance(message["n"])
                case "end":
                    stages[message["number"]][0].close()
                case "outcome":
                    outcome = Outcome(**message)
    return outcome


def _crash(code: int, log: Path) -> str:
    """Say how a process ended that could not say it itself."""
    if code < 0:
        name = signal.Signals(-code).name
        hint = ", as when memory is full" if name == "SIGKILL" else ""
        return f"the process was ended by {name}{hint}"
    lines = log.read_text("utf-8", errors="replace")[-_LAST_LINES:].strip().splitlines()
    last = lines[-1] if lines else f"the process ended with code {code} and no message"
    return f"{last}; see {log.parent.name}/{log.name}"


def do_piece(piece: dict[str, Any], progress: Progress) -> Outcome:
    """Do a piece of work in this process.

    Args:
        piece: What the kind of its protocol asks for; see `_KINDS`.
        progress: Told of every stage.
    """
    do = load_object(_KINDS[piece["protocol"].get("kind", "methods")])
    try:
        value = do(piece, progress)
    except RefusedError as error:
        return Outcome(status="refused", reason=str(error))
    except MoesaicError as error:
        return Outcome(status="error", reason=str(error))
    return Outcome(status="done", value=value)


class _Messages:
    """Progress as lines for whoever listens."""

    def __init__(self, out: TextIO) -> None:
        self.out = out
        self.count = 0

    def send(self, what: str, **values: Any) -> None:
        """Send one message."""
        self.out.write(json.dumps({"what": what, **values}) + "\n")
        self.out.flush()

    @contextlib.contextmanager
    def stage(self, name: str, total: float, unit: str) -> Iterator[Stage]:
        """Open a stage."""
        self.count += 1
        number = self.count
        self.send("stage", number=number, name=name, total=total, unit=unit)
        yield _MessageStage(self, number)
        self.send("end", number=number)


@dataclass(frozen=True, slots=True)
class _MessageStage:
    messages: _Messages
    number: int

    def advance(self, n: float = 1.0) -> None:
        self.messages.send("advance", number=self.number, n=n)


def _end_with_parent() -> None:
    """Wait for the end of the input, which comes when the parent is gone, and end too."""
    # Not through `sys.stdin`, whose lock would be held when Python shuts down.
    while os.read(0, 1024):
        pass
    os._exit(1)


def main() -> None:
    """Do the piece of work on the input."""
    piece = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # What libraries print must not stand among the messages.
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("moesaic").setLevel(logging.INFO)
    from transformers.utils import logging as library

    library.disable_progress_bar()
    messages = _Messages(out)
    outcome = do_piece(piece, messages)
    messages.send("outcome", status=outcome.status, value=outcome.value, reason=outcome.reason)


if __name__ == "__main__":
    main()
