"""The program `moesaic`: finds the command, runs it, and turns errors into one line and a code."""

from __future__ import annotations

import contextlib
import errno
import importlib
import logging
import os
import sys
from collections.abc import Sequence
from importlib.metadata import version
from typing import TextIO

from moesaic._errors import MoesaicError, UnknownNameError
from moesaic._registry import unknown_name

# Told without importing the commands, which import torch.
COMMANDS = {
    "run": "Do the steps of a YAML recipe; the same command resumes it",
    "convert": "Turn a dense model into a mixture of experts",
    "compress": "Make a dense model or the experts of a mixture smaller",
    "train": "Recover quality by self-distillation, at a requested budget",
    "eval": "Measure models beside their dense parent",
    "compare": "Compare methods at the same active fraction, under one protocol",
    "bench": "Measure speed beside peers and the physical limit of this machine",
    "generate": "Write text with a dense or converted model",
    "export": "Write a converted model in the form of other software",
    "serve": "Serve a model with the protocol of OpenAI",
    "report": "Turn an evaluation record, or a training's experts, into one HTML page",
    "ls": "List methods or published systems",
    "doctor": "Say what this machine can run, and why not the rest",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: Arguments without the program's name; those of the process if none.

    Returns:
        0 done, 1 failed, 2 wrong input, 130 interrupted.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_help())
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(version("moesaic"))
        return 0
    name, *rest = arguments
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[_Stderr()])
    logging.getLogger("moesaic").setLevel(logging.INFO)
    try:
        if name not in COMMANDS:
            raise UnknownNameError(unknown_name("command", name, COMMANDS))
        # Downloads and thread pools of tokenizers are not ours to advertise.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        command = importlib.import_module(f"moesaic.cli.{name}")
        code: int = command.run(rest)
        return code
    except SystemExit as stop:  # tyro has printed its own message
        return stop.code if isinstance(stop.code, int) else 2
    except KeyboardInterrupt:
        return _fail("interrupted; the same command goes on where it was", 130)
    except MoesaicError as error:
        return _fail(str(error), error.exit_code)
    except ImportError as error:
        if "pip install" not in str(error):
            raise
        return _fail(str(error), 1)
    except Exception as error:
        if (message := _outside(error)) is None:
            _fail("this is a bug or a broken installation; moesaic doctor may tell which", 1)
            raise
        return _fail(message, 1)


def _outside(error: Exception) -> str | None:
    """Say what to do about a failure whose reason is the machine; nothing about others."""
    text = str(error)
    torchs = isinstance(error, RuntimeError)
    # torch has no class of its own for memory on the CPU, nor for a file it cannot write.
    if isinstance(error, MemoryError) or (torchs and any(sign in text for sign in _MEMORY_SIGNS)):
        return _OUT_OF_MEMORY
    full = isinstance(error, OSError) and error.errno == errno.ENOSPC
    # safetensors has an error of its own, with the words of the system in it.
    if full or "No space left on device" in text:
        name = getattr(error, "filename", None)
        return f"the disk is full{f' ({name})' if name else ''}; free some space and run again"
    if torchs and any(sign in text for sign in _WRITE_SIGNS):
        return _NOT_WRITTEN
    return None


class _Stderr(logging.StreamHandler[TextIO]):
    """Logs to what is stderr now: progress bars stand in for it while they are drawn."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        """Where lines go."""
        return sys.stderr


_OUT_OF_MEMORY = (
    "out of memory; lower train.batch_blocks, calibration.tokens or data.block, and run again"
)
# The allocator of the CPU says the first on Linux, the second elsewhere; that of CUDA the third.
_MEMORY_SIGNS = ("can't allocate memory", "not enough memory", "out of memory")
_NOT_WRITTEN = "a checkpoint could not be written, as on a full disk; free some space and run again"
_WRITE_SIGNS = ("inline_container.cc", "PytorchStreamWriter failed writing")


def _fail(message: str, code: int) -> int:
    with contextlib.suppress(BrokenPipeError):
        print(f"moesaic: {message}", file=sys.stderr)
    return code


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {summary}" for name, summary in COMMANDS.items()]
    return "\n".join(
        [
            "usage: moesaic COMMAND [options]",
            "",
            "Turn a dense language model into a mosaic of experts, and prove it.",
            "",
            *lines,
            "",
            "moesaic COMMAND --help says more.",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
