"""Make a dense model or the experts of a mixture smaller."""

from __future__ import annotations

from collections.abc import Sequence

from moesaic.cli._method import run_method


def run(argv: Sequence[str]) -> int:
    """Run the command."""
    return run_method("compress", argv)
