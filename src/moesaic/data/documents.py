"""Documents: what is read, before any of it becomes tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """One text that stays on one side of the split.

    Attributes:
        text: The text, never blank.
        domain: Label of its kind; blocks never mix domains.
        source: The source string it came from.
        licence: Licence of the source, or "unstated".
        name: What it is called inside its source: a file, a topic, a row.
    """

    text: str
    domain: str
    source: str
    licence: str = "unstated"
    name: str = ""


@dataclass(frozen=True, slots=True)
class Draw:
    """What chance decides about a document; it depends on its text and the seed alone.

    Attributes:
        side: In [0, 1); below the held-out fraction the document is held out.
        order: Sort key inside its side.
        place: In [0, 1); where an excerpt begins.
    """

    side: float
    order: bytes
    place: float


def draw(text: str, seed: int) -> Draw:
    """Draw the side, order and excerpt of a document from the hash of its text."""
    digest = hashlib.sha256(f"{seed}\n".encode() + text.encode()).digest()
    return Draw(
        side=int.from_bytes(digest[:6], "big") / 2**48,
        order=digest[6:24],
        place=int.from_bytes(digest[24:30], "big") / 2**48,
    )


def sections(document: Document, num_characters: int) -> Iterator[Document]:
    """Cut a document at blank lines into sections of about `num_characters`.

    Joined with blank lines the sections give the document back, outer white space aside. A
    paragraph is never cut, so a section can be longer.
    """
    if len(document.text) <= num_characters:
        yield document
        return
    held: list[str] = []
    size = 0
    number = 0
    for paragraph in document.text.split("\n\n"):
        held.append(paragraph)
        size += len(paragraph) + 2
        if size >= num_characters:
            number += 1
            yield from _section(document, "\n\n".join(held), number)
            held, size = [], 0
    yield from _section(document, "\n\n".join(held), number + 1)


def _section(document: Document, text: str, number: int) -> Iterator[Document]:
    if text.strip():
        yield replace(document, text=text, name=f"{document.name}, section {number}")


def excerpt(text: str, num_characters: int | None, place: float) -> str:
    """Give a part of a long text that begins and ends between lines, or else between words.

    Args:
        text: The whole text; returned as it is when it is short enough.
        num_characters: Bound on the length of the part, or None for no bound.
        place: In [0, 1): how far into the text the part begins.
    """
    if num_characters is None or len(text) <= num_characters:
        return text
    begin = int(place * (len(text) - num_characters + 1))
    slack = num_characters // 4
    # The text's own beginning needs no moving.
    if begin:
        begin = _after_break(text, begin, begin + slack)
    end = begin + num_characters
    if end < len(text):
        end = _before_break(text, end - slack, end)
    return text[begin:end]


def _after_break(text: str, low: int, high: int) -> int:
    """Find where the first line, or else the first word, begins inside a range."""
    for mark in ("\n", " "):
        found = text.find(mark, low, high)
        if found >= 0:
            return found + 1
    return low


def _before_break(text: str, low: int, high: int) -> int:
    """Find where the last whole line, or else the last whole word, ends inside a range."""
    for mark in ("\n", " "):
        found = text.rfind(mark, low, high)
        if found >= 0:
            return found
    return high
