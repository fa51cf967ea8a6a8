"""Packing documents into blocks: their tokens in order, an end mark after each document.

Shapes: N blocks of S tokens.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from moesaic.data.blocks import Provenance, TokenBlocks
from moesaic.data.documents import Document


def pack(
    ids: Sequence[NDArray[np.int32]], block: int, max_tokens: int
) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Lay documents end to end and cut the line into whole blocks.

    Args:
        ids: Token ids of each document, none of them empty.
        block: Tokens of a block, S.
        max_tokens: Bound on the tokens of all blocks.

    Returns:
        The blocks (N, S), and for each the index of the document its first token belongs to.
    """
    sizes = [len(document) for document in ids]
    num_blocks = min(sum(sizes), max_tokens) // block
    line = np.concatenate([np.empty(0, np.int32), *ids])
    begins_N = np.arange(num_blocks) * block
    document_N = np.searchsorted(np.cumsum(sizes), begins_N, side="right")
    return line[: num_blocks * block].reshape(num_blocks, block), document_N


@dataclass(slots=True, kw_only=True)
class Line:
    """The documents of one domain on one side of the split, as they become tokens.

    Attributes:
        domain: Label of the domain.
        documents: The documents, their text cut to the excerpt that was tokenised.
        ids: Token ids of each document, its end mark included.
        near_duplicates: Documents left out for resembling a held-out one, by source.
    """

    domain: str
    documents: list[Document] = field(default_factory=list)
    ids: list[NDArray[np.int32]] = field(default_factory=list)
    near_duplicates: Counter[str] = field(default_factory=Counter)

    @property
    def num_tokens(self) -> int:
        """Tokens of all documents."""
        return sum(map(len, self.ids))


def build_blocks(
    lines: Iterable[Line],
    *,
    block: int,
    max_tokens: int,
    tokenizer: str,
    exact_duplicates: Mapping[tuple[str, str], int],
) -> TokenBlocks:
    """Pack one side of the split.

    Args:
        lines: One per domain.
        block: Tokens of a block, S.
        max_tokens: Bound on the tokens of a domain.
        tokenizer: Fingerprint of the tokenizer.
        exact_duplicates: Documents dropped before the split, by domain and source.
    """
    all_ids, all_domains, all_documents = [], [], []
    provenance: list[Provenance] = []
    domains: list[str] = []
    num_documents = 0
    for line in lines:
        ids_NS, document_N = pack(line.ids, block, max_tokens)
        all_ids.append(ids_NS)
        all_domains.append(np.full(len(ids_NS), len(domains), np.int16))
        all_documents.append((document_N + num_documents).astype(np.int32))
        domains.append(line.domain)
        num_documents += len(line.documents)
        provenance += _provenance(line, ids_NS.size, exact_duplicates)
    return TokenBlocks(
        ids_NS=np.concatenate(all_ids),
        domain_N=np.concatenate(all_domains),
        document_N=np.concatenate(all_documents),
        domains=tuple(domains),
        provenance=tuple(provenance),
        tokenizer=tokenizer,
    )


def _provenance(
    line: Line, num_kept: int, exact_duplicates: Mapping[tuple[str, str], int]
) -> list[Provenance]:
    """Say what each source gave to a line of which the first `num_kept` tokens are in blocks."""
    ends = np.cumsum([len(ids) for ids in line.ids])
    kept = np.diff(np.minimum(ends, num_kept), prepend=0)
    records = []
    sources = dict.fromkeys(document.source for document in line.documents)
    for source in sources:
        mine = [i for i, document in enumerate(line.documents) if document.source == source]
        digest = hashlib.sha256()
        for i in mine:
            digest.update(line.documents[i].text.encode() + b"\0")
        num_tokens = sum(len(line.ids[i]) for i in mine)
        records.append(
            Provenance(
                source=source,
                domain=line.domain,
                licence=line.documents[mine[0]].licence,
                sha256=digest.hexdigest(),
                documents=len(mine),
                characters=sum(len(line.documents[i].text) for i in mine),
                tokens=int(kept[mine].sum()),
                dropped_tokens=num_tokens - int(kept[mine].sum()),
                exact_duplicates=exact_duplicates.get((line.domain, source), 0),
                near_duplicates=line.near_duplicates[source],
            )
        )
    return records
