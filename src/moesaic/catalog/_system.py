"""One row of the catalog: a published system, and how far moesaic has it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Status = Literal["planned", "works"]


@dataclass(frozen=True, slots=True, kw_only=True)
class System:
    """One published system.

    Attributes:
        id: Short name in kebab-case, unique in the catalog.
        name: What the system is called.
        title: Title of its paper.
        arxiv: arXiv id of its paper, without a version.
        home: Floors that hold its parts, the main one first.
        parts: Kinds of part it needs.
        summary: What it does, at most 110 characters.
        status: `works` when its check passes and its evidence is committed, else `planned`.
        uses: Registered parts it is made of, each `family:name`.
        check: Test file or pytest node that shows it is that system.
        evidence: Committed result of its evidence script.
        use_when: When to use it, and when not, in a sentence or two.
        cost: What it costs in work, weights and training.
        traps: What goes wrong with it, a sentence or two each.
        example: Lines of Python that use it, which a test runs; or the one path of a recipe. This
            and the three before it are empty until the system works.
    """

    id: str
    name: str
    title: str
    arxiv: str
    home: tuple[str, ...]
    parts: tuple[str, ...]
    summary: str
    status: Status = "planned"
    uses: tuple[str, ...] = ()
    check: str | None = None
    evidence: str | None = None
    use_when: str = ""
    cost: str = ""
    traps: tuple[str, ...] = ()
    example: tuple[str, ...] = ()
