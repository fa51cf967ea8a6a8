"""What pages that are made of data have in common: tables, papers, results of evidence."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def record(path: str) -> dict[str, Any]:
    """Read a committed result of an evidence script."""
    found: dict[str, Any] = json.loads((ROOT / path).read_text("utf-8"))
    return found


def rows(titles: tuple[str, ...], body: Iterable[tuple[str, ...]]) -> str:
    """Lay out a table."""
    lines = [titles, ("---",) * len(titles), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def paper(name: str) -> str:
    """Link a paper that is named by its arXiv id."""
    return re.sub(r"(?:arXiv[: ])?(\d{4}\.\d{5})", r"[arXiv:\1](https://arxiv.org/abs/\1)", name)
