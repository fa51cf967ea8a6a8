"""What commands share: parsing, and results for people or for scripts."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import re
import sys
import typing
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, TypeVar

import tyro

from moesaic._errors import InputError, UnknownNameError
from moesaic._registry import unknown_name

T = TypeVar("T")

# Each use of the option takes one or more, and all uses count.
Overrides = Annotated[
    tuple[tuple[str, ...], ...],
    tyro.conf.UseAppendAction,
    tyro.conf.arg(metavar="NAME=VALUE"),
]
_POSITIONAL = typing.get_args(tyro.conf.Positional[str])[1]


def parse(options: type[T], argv: Sequence[str], name: str) -> T:
    """Parse a command's arguments into its dataclass.

    An option that takes a list may be repeated; its values add up.

    Raises:
        InputError: In one sentence, if an option is unknown or lacking or has a bad value.
    """
    flags = dict(_flags(options))
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            parsed, unknown = tyro.cli(
                options,
                args=_joined(argv, {flag for flag, is_list in flags.items() if is_list}),
                prog=f"moesaic {name}",
                return_unknown_args=True,
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        sentence = _sentence(printed.getvalue())
        raise InputError(f"{sentence}; moesaic {name} --help says more") from None
    for word in unknown:
        if word.startswith("-"):
            raise UnknownNameError(unknown_name("option", word.partition("=")[0], flags))
        raise InputError(f"moesaic {name} has no use for {word!r}; leave it out or name its option")
    return parsed


def _flags(options: type, prefix: str = "") -> Iterator[tuple[str, bool]]:
    """Every option of a dataclass and whether it takes a list."""
    hints = typing.get_type_hints(options, include_extras=True)
    for field in dataclasses.fields(options):
        hint, name = hints[field.name], field.name
        markers: list[Any] = []
        if typing.get_origin(hint) is typing.Annotated:
            hint, *markers = typing.get_args(hint)
        if _POSITIONAL in markers:
            continue
        # Settings of a method are written without the name of their field.
        name = next((m.name for m in markers if getattr(m, "name", None) is not None), name)
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            yield from _flags(hint, f"{prefix}{name}." if name else prefix)
        else:
            yield f"--{prefix}{name}".replace("_", "-"), typing.get_origin(hint) is tuple


def _joined(argv: Sequence[str], lists: set[str]) -> list[str]:
    """Bring the values of a repeated list option together, since the parser keeps the last."""
    rest: list[str] = []
    values: dict[str, list[str]] = {}
    words = list(argv)
    while words:
        word = words.pop(0)
        flag, equals, first = word.partition("=")
        flag = flag.replace("_", "-")
        if flag not in lists:
            rest.append(word)
            continue
        found = values.setdefault(flag, [])
        if equals:
            found.append(first)
        while words and not words[0].startswith("--"):
            # What follows a setting without being one is an argument of the command.
            if flag == "--set" and found and "=" not in words[0]:
                break
            found.append(words.pop(0))
    return [*rest, *(word for flag, found in values.items() for word in (flag, *found))]


def _sentence(box: str) -> str:
    """Take the message out of the box that the parser draws around it."""
    lines = [line.strip("\u2502\u256d\u256e\u2570\u256f ") for line in box.splitlines()]
    message: list[str] = []
    for line in lines[1:]:
        if line and not line.strip("\u2500"):
            break
        message.append(line)
    text = re.sub(r"\s+", " ", " ".join(message)).strip()
    text = re.sub(r"^Error parsing (--\S+)[^:]*: ", r"\1: ", text)
    # What is not an option is the class that refused, and its message names the field.
    text = re.sub(r"^Error parsing [^:]+: ", "", text)
    return text.replace(" (required)", "").rstrip(".") or "the arguments cannot be read"


def quiet_libraries() -> None:
    """Keep the progress bars and hints of transformers away from ours."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def show(result: dict[str, Any], *, as_json: bool) -> None:
    """Print a result: one JSON document, or a line per field."""
    if as_json:
        print(json.dumps(result))
        return
    for name, value in result.items():
        if isinstance(value, float):
            value = f"{value:,.4g}"
        elif isinstance(value, int) and not isinstance(value, bool):
            value = f"{value:,}"
        elif isinstance(value, list):
            value = ", ".join(map(str, value))
        print(f"{name.replace('_', ' ')}: {value}")


def show_table(record: dict[str, Any]) -> None:
    """Print the main table of an evaluation record."""
    from rich.console import Console

    from moesaic.analysis import summary_table

    width = None if sys.stdout.isatty() else 110
    Console(width=width).print(summary_table(record))
