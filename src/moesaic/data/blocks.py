"""TokenBlocks: packed text as one array of token ids, with where it came from.

Shapes: N blocks of S tokens.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from moesaic._config import build_config, to_plain
from moesaic._errors import CheckpointError, InputError, UnknownNameError
from moesaic._files import atomic_write
from moesaic._registry import unknown_name

_FORMAT = "moesaic-token-blocks-1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    """What one source gave to a set of blocks.

    Attributes:
        source: The source string.
        domain: Domain of its documents.
        licence: Licence of its text.
        sha256: Hash of the text that was tokenised, document after document.
        documents: Documents that were tokenised.
        characters: Characters that were tokenised.
        tokens: Tokens inside the blocks, the end mark of each document included.
        dropped_tokens: Tokens left over after the last whole block.
        exact_duplicates: Documents dropped before the split for having the text of an earlier one.
        near_duplicates: Documents dropped for resembling a held-out one.
    """

    source: str
    domain: str
    licence: str
    sha256: str
    documents: int
    characters: int
    tokens: int
    dropped_tokens: int = 0
    exact_duplicates: int = 0
    near_duplicates: int = 0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TokenBlocks:
    """Token ids packed into blocks, each of one domain.

    Attributes:
        ids_NS: Token ids, int32 (N, S).
        domain_N: Index into `domains`, int16 (N,).
        document_N: Document of the first token of the block, int32 (N,); a document has one number
            in all its blocks.
        domains: Labels of the domains.
        provenance: One record per source and domain.
        tokenizer: Fingerprint of the tokenizer the ids belong to.
    """

    ids_NS: NDArray[np.int32]
    domain_N: NDArray[np.int16]
    document_N: NDArray[np.int32]
    domains: tuple[str, ...]
    provenance: tuple[Provenance, ...] = ()
    tokenizer: str = ""

    def __post_init__(self) -> None:
        N = len(self.ids_NS)
        for name, dtype, shape in (
            ("ids_NS", np.int32, (N, *self.ids_NS.shape[1:2])),
            ("domain_N", np.int16, (N,)),
            ("document_N", np.int32, (N,)),
        ):
            array = getattr(self, name)
            if array.dtype != dtype or array.shape != shape:
                raise ValueError(
                    f"{name} must be {np.dtype(dtype).name} {shape}, "
                    f"got {array.dtype.name} {array.shape}"
                )
        if N and not 0 <= self.domain_N.min() <= self.domain_N.max() < len(self.domains):
            raise ValueError(f"domain_N must be in [0, {len(self.domains)})")

    def __len__(self) -> int:
        return len(self.ids_NS)

    @property
    def block(self) -> int:
        """Tokens of a block."""
        return int(self.ids_NS.shape[1])

    @property
    def num_tokens(self) -> int:
        """Tokens of all blocks."""
        return int(self.ids_NS.size)

    def select(self, domain: str) -> TokenBlocks:
        """Give the blocks of one domain.

        Raises:
            UnknownNameError: If no such domain is here.
        """
        if domain not in self.domains:
            raise UnknownNameError(unknown_name("domain", domain, self.domains))
        rows = np.flatnonzero(self.domain_N == self.domains.index(domain))
        return replace(
            self._rows(rows),
            domain_N=np.zeros(len(rows), np.int16),
            domains=(domain,),
            provenance=tuple(p for p in self.provenance if p.domain == domain),
        )

    def take(self, num_blocks: int, seed: int = 0) -> TokenBlocks:
        """Draw blocks without repetition, the same number from each domain while it lasts.

        A smaller draw with the same seed is the beginning of a larger one. The provenance still
        tells of the text that was drawn from.

        Raises:
            InputError: If there are fewer blocks.
        """
        if not 0 <= num_blocks <= len(self):
            raise InputError(
                f"num_blocks must be in [0, {len(self)}], the blocks there are, got {num_blocks}; "
                "ask for fewer or read more text"
            )
        shuffled_N = np.random.default_rng(seed).permutation(len(self))
        turn_N = np.empty(len(self), np.int64)
        for domain in range(len(self.domains)):
            rows = shuffled_N[self.domain_N[shuffled_N] == domain]
            turn_N[rows] = np.arange(len(rows))
        # Blocks with the same turn stand side by side, one from each domain.
        dealt_N = shuffled_N[np.lexsort((self.domain_N[shuffled_N], turn_N[shuffled_N]))]
        return self._rows(dealt_N[:num_blocks])

    def _rows(self, rows: NDArray[np.int64]) -> TokenBlocks:
        return replace(
            self,
            ids_NS=self.ids_NS[rows],
            domain_N=self.domain_N[rows],
            document_N=self.document_N[rows],
        )

    def fingerprint(self) -> str:
        """Hash everything these blocks hold: sha256, in hexadecimal."""
        digest = hashlib.sha256(json.dumps(self._plain(), sort_keys=True).encode())
        for array in (self.ids_NS, self.domain_N, self.document_N):
            digest.update(repr(array.shape).encode())
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()

    def _plain(self) -> dict[str, Any]:
        return {
            "domains": list(self.domains),
            "provenance": to_plain(self.provenance),
            "tokenizer": self.tokenizer,
        }

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, atomically; the provenance stands in its header."""
        arrays = {
            name: np.ascontiguousarray(getattr(self, name))
            for name in ("ids_NS", "domain_N", "document_N")
        }
        header = {
            "format": _FORMAT,
            "fingerprint": self.fingerprint(),
            "blocks": json.dumps(self._plain(), sort_keys=True),
        }
        with atomic_write(Path(path)) as temporary:
            save_file(arrays, temporary, metadata=header)

    @classmethod
    def load(cls, path: str | Path) -> TokenBlocks:
        """Read what `save` wrote.

        Raises:
            CheckpointError: If the file is missing, truncated, edited or of another kind.
        """
        path = Path(path)
        if not path.is_file():
            raise CheckpointError(f"token blocks {path} do not exist; prepare the data again")
        try:
            with safe_open(path, framework="numpy") as handle:
                header = handle.metadata() or {}
                arrays = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"token blocks {path} cannot be read ({error}); prepare the data again"
            ) from error
        if header.get("format") != _FORMAT:
            raise CheckpointError(
                f"{path} holds no token blocks of this version; prepare the data again"
            )
        try:
            blocks = cls._build(json.loads(header["blocks"]), arrays)
        except (KeyError, TypeError, ValueError) as error:
            raise _changed(path) from error
        if blocks.fingerprint() != header.get("fingerprint"):
            raise _changed(path)
        return blocks

    @classmethod
    def _build(cls, plain: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> TokenBlocks:
        return cls(
            **arrays,
            domains=tuple(plain["domains"]),
            provenance=tuple(
                build_config(Provenance, record, where="provenance")
                for record in plain["provenance"]
            ),
            tokenizer=plain["tokenizer"],
        )


def _changed(path: Path) -> CheckpointError:
    return CheckpointError(
        f"token blocks {path} were changed after they were written; prepare the data again"
    )
