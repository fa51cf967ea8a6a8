"""Near-duplicates of held-out documents, so that they can leave training.

Source: Broder 1997, On the resemblance and containment of documents. A text is its set of word
shingles; one text is contained in another by the share of its shingles the other has. What counts
here is the containment of the shorter text in the longer one, because a long training document
that quotes a short held-out one leaks it, however little the two resemble each other. Departure:
the sets are compared whole, not by MinHash sketches, whose error of several percent hides such
quotes; one side is the held-out text, which is small.
"""

from __future__ import annotations

import re
import zlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moesaic._errors import InputError

# Odd, so that multiplying by it loses nothing modulo 2 ** 64.
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
_SHIFT = np.uint64(29)


@dataclass(frozen=True, slots=True, kw_only=True)
class DuplicateConfig:
    """When a training document counts as a copy of a held-out one.

    Attributes:
        threshold: Share of the shorter document's shingles that both have, in (0, 1], from which
            it does. Lower it for text that is quoted with changes.
        shingle_words: Consecutive words that make a shingle; upper and lower case, white space
            and punctuation do not count. Lower it for short documents, raise it for text full of
            set phrases.
    """

    threshold: float = 0.5
    shingle_words: int = 5

    def __post_init__(self) -> None:
        if not 0.0 < self.threshold <= 1.0:
            raise InputError(
                f"data.duplicates.threshold must be in (0, 1], got {self.threshold}; "
                "0.5 finds copies with edits"
            )
        if self.shingle_words < 1:
            raise InputError(
                f"data.duplicates.shingle_words must be at least 1, got {self.shingle_words}; "
                "5 suits running text"
            )


class NearDuplicates:
    """The held-out documents, ready to be compared with any other text.

    Memory: 16 bytes for each distinct shingle of a held-out document.

    Args:
        texts: The held-out documents.
        config: When two documents count as copies.
    """

    def __init__(self, texts: list[str], config: DuplicateConfig) -> None:
        self._config = config
        sets = [shingles(text, config.shingle_words) for text in texts]
        self._sizes = np.array([len(found) for found in sets], np.int64)
        hashes = np.concatenate([np.empty(0, np.uint64), *sets])
        owners = np.repeat(np.arange(len(sets)), self._sizes)
        order = np.argsort(hashes, kind="stable")
        self._hashes, self._owners = hashes[order], owners[order]

    def containment(self, text: str) -> float:
        """Give the largest containment between a text and a held-out document, in [0, 1]."""
        found = shingles(text, self._config.shingle_words)
        # Held-out documents can share a shingle, so each of the text's meets a run of owners.
        low = np.searchsorted(self._hashes, found, side="left")
        counts = np.searchsorted(self._hashes, found, side="right") - low
        if not counts.any():
            return 0.0
        begins = np.repeat(low - np.concatenate([[0], np.cumsum(counts)[:-1]]), counts)
        common = np.bincount(
            self._owners[begins + np.arange(counts.sum())], minlength=len(self._sizes)
        )
        return float((common / np.minimum(self._sizes, len(found))).max())

    def matches(self, text: str) -> bool:
        """Say whether a text is a near-duplicate of a held-out document."""
        return self.containment(text) >= self._config.threshold


def shingles(text: str, num_words: int) -> NDArray[np.uint64]:
    """Hash every run of `num_words` words; a text with fewer words is one shingle.

    Returns:
        The distinct hashes in ascending order; at least one.
    """
    words = re.findall(r"\w+", text.lower()) or [text.strip()]
    num_words = min(num_words, len(words))
    hashes = np.array([zlib.crc32(word.encode()) for word in words], np.uint64)
    num_shingles = len(words) - num_words + 1
    mixed = np.full(num_shingles, num_words, np.uint64)
    for offset in range(num_words):
        mixed = (mixed ^ hashes[offset : offset + num_shingles]) * _MULTIPLIER
        mixed ^= mixed >> _SHIFT
    return np.unique(mixed)
