"""What commands share: parsing, and results for people or for scripts."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Annotated, Any, TypeVar

import tyro

T = TypeVar("T")

# Each use of the option takes one or more, and all uses count.
Overrides = Annotated[
    tuple[tuple[str, ...], ...],
    tyro.conf.UseAppendAction,
    tyro.conf.arg(metavar="NAME=VALUE"),
]


def parse(options: type[T], argv: Sequence[str], name: str) -> T:
    """Parse a command's arguments into its dataclass; a wrong one exits with 2."""
    return tyro.cli(options, args=list(argv), prog=f"moesaic {name}")


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
