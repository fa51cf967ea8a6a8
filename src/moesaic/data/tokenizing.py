"""The little a tokenizer must do for this floor, which imports no tokenizer library."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from moesaic._errors import InputError

_PROBE = "".join(map(chr, range(32, 127))) + " The quick brown fox,\n\tjumps over 12345 lazy dogs."


class Tokenizer(Protocol):
    """Any tokenizer of transformers, or an object that does as much."""

    eos_token_id: int | None

    def __call__(self, text: str, *, add_special_tokens: bool) -> Mapping[str, Any]:
        """Give `input_ids`, the token ids of a text."""


def encode(tokenizer: Tokenizer, text: str) -> NDArray[np.int32]:
    """Give the token ids of a text with the end mark after them."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return np.asarray([*ids, tokenizer.eos_token_id], np.int32)


def require_end_mark(tokenizer: Tokenizer) -> None:
    """Refuse a tokenizer that cannot mark where a document ends."""
    if tokenizer.eos_token_id is None:
        raise InputError(
            "the tokenizer has no eos_token, which separates documents; "
            "set tokenizer.eos_token before preparing data"
        )


def tokenizer_fingerprint(tokenizer: Tokenizer) -> str:
    """Hash what decides the ids: sha256, in hexadecimal.

    The vocabulary and rules of a fast tokenizer, else the vocabulary, else the ids of a probe.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        rules = json.loads(backend.to_str())
        # Both change whenever somebody calls the tokenizer with other options.
        rules = {k: v for k, v in rules.items() if k not in ("truncation", "padding")}
    elif hasattr(tokenizer, "get_vocab"):
        rules = tokenizer.get_vocab()
    else:
        rules = encode(tokenizer, _PROBE).tolist()
    plain = json.dumps([type(tokenizer).__name__, tokenizer.eos_token_id, rules], sort_keys=True)
    return hashlib.sha256(plain.encode()).hexdigest()
