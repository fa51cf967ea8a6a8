import dataclasses
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesaic._errors import CheckpointError, InputError, UnknownNameError
from moesaic.data import Provenance, TokenBlocks
from moesaic.data.packing import Line, build_blocks, pack

DOCUMENTS = st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=12), max_size=12)


def make(counts=(5, 2, 1), block=4):
    """Blocks whose ids are their row numbers, `counts[d]` of domain d."""
    N = sum(counts)
    return TokenBlocks(
        ids_NS=np.repeat(np.arange(N, dtype=np.int32), block).reshape(N, block),
        domain_N=np.repeat(np.arange(len(counts)), counts).astype(np.int16),
        document_N=np.arange(N, dtype=np.int32),
        domains=("docs", "prose", "code")[: len(counts)],
        provenance=tuple(
            Provenance(
                source=f"builtin:{domain}",
                domain=domain,
                licence="PSF-2.0",
                sha256="0" * 64,
                documents=3,
                characters=40,
                tokens=20,
            )
            for domain in ("docs", "prose", "code")[: len(counts)]
        ),
        tokenizer="t",
    )


@given(DOCUMENTS, st.integers(2, 9), st.integers(0, 80))
def test_pack_keeps_tokens_in_order(documents, block, max_tokens):
    ids = [np.asarray(document, np.int32) for document in documents]
    line = [token for document in documents for token in document]
    owner = [i for i, document in enumerate(documents) for _ in document]
    ids_NS, document_N = pack(ids, block, max_tokens)
    num_blocks = min(len(line), max_tokens) // block
    assert ids_NS.shape == (num_blocks, block)
    assert ids_NS.ravel().tolist() == line[: num_blocks * block]
    assert document_N.tolist() == [owner[n * block] for n in range(num_blocks)]


def test_lines_never_share_a_block_and_count_what_they_drop():
    from moesaic.data import Document

    def line(domain, sizes):
        documents = [
            Document(text=f"{domain} {i}", domain=domain, source=f"s{i % 2}")
            for i, _ in enumerate(sizes)
        ]
        ids = [np.full(size, i, np.int32) for i, size in enumerate(sizes)]
        return Line(domain=domain, documents=documents, ids=ids)

    # 11 tokens give two blocks of 4 and drop the last 3, all of document 2 (source s0).
    blocks = build_blocks(
        [line("a", [4, 2, 5]), line("b", [4])],
        block=4,
        max_tokens=100,
        tokenizer="t",
        exact_duplicates={("a", "s1"): 7},
    )
    assert blocks.ids_NS.tolist() == [[0, 0, 0, 0], [1, 1, 2, 2], [0, 0, 0, 0]]
    assert blocks.domain_N.tolist() == [0, 0, 1]
    # Documents are numbered through: the one of "b" follows the three of "a".
    assert blocks.document_N.tolist() == [0, 1, 3]
    counts = [
        (p.domain, p.source, p.documents, p.tokens, p.dropped_tokens, p.exact_duplicates)
        for p in blocks.provenance
    ]
    assert counts == [("a", "s0", 2, 6, 3, 0), ("a", "s1", 1, 2, 0, 7), ("b", "s0", 1, 4, 0, 0)]


def test_select_gives_one_domain():
    blocks = make()
    prose = blocks.select("prose")
    assert prose.ids_NS[:, 0].tolist() == [5, 6]
    assert prose.document_N.tolist() == [5, 6]
    assert prose.domains == ("prose",)
    assert [p.domain for p in prose.provenance] == ["prose"]
    assert prose.num_tokens == 8
    with pytest.raises(UnknownNameError, match=r"domain 'pros' is unknown; did you mean prose"):
        blocks.select("pros")


@given(st.integers(0, 8), st.integers(0, 3))
def test_take_is_a_balanced_prefix_without_repetition(num_blocks, seed):
    blocks = make()
    rows = blocks.take(num_blocks, seed).ids_NS[:, 0].tolist()
    assert len(set(rows)) == num_blocks
    assert blocks.take(8, seed).ids_NS[:num_blocks, 0].tolist() == rows
    if num_blocks >= 3:
        assert set(blocks.take(num_blocks, seed).domain_N.tolist()) == {0, 1, 2}


def test_take_depends_on_the_seed_and_is_bounded():
    blocks = make((20, 20))
    assert blocks.take(10, 0).fingerprint() == blocks.take(10, 0).fingerprint()
    assert blocks.take(10, 0).fingerprint() != blocks.take(10, 1).fingerprint()
    with pytest.raises(InputError, match=r"num_blocks must be in \[0, 40\].*got 41; ask for fewer"):
        blocks.take(41)


@pytest.mark.parametrize("counts", [(5, 2, 1), (1,), (0,)])
def test_save_and_load_are_exact(counts, tmp_path):
    blocks = make(counts)
    blocks.save(tmp_path / "b.safetensors")
    found = TokenBlocks.load(tmp_path / "b.safetensors")
    for name in ("ids_NS", "domain_N", "document_N"):
        before, after = getattr(blocks, name), getattr(found, name)
        np.testing.assert_array_equal(before, after)
        assert before.dtype == after.dtype
    assert found.domains == blocks.domains
    assert found.provenance == blocks.provenance
    assert found.fingerprint() == blocks.fingerprint()
    assert [path.name for path in tmp_path.iterdir()] == ["b.safetensors"]


def test_fingerprint_sees_every_part():
    blocks = make()
    other = dataclasses.replace
    changed = [
        other(blocks, ids_NS=blocks.ids_NS + np.int32(1)),
        other(blocks, ids_NS=blocks.ids_NS.reshape(4, 8)[[0, 1, 2, 3] * 2]),
        other(blocks, domain_N=blocks.domain_N[::-1].copy()),
        other(blocks, document_N=blocks.document_N + np.int32(1)),
        other(blocks, domains=("docs", "prose", "poems")),
        other(blocks, provenance=()),
        other(blocks, tokenizer="u"),
    ]
    assert len({b.fingerprint() for b in [blocks, *changed]}) == 8


def test_bad_files_are_named(tmp_path):
    path = tmp_path / "b.safetensors"
    with pytest.raises(CheckpointError, match=r"b\.safetensors do not exist; prepare the data"):
        TokenBlocks.load(path)
    make().save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    with pytest.raises(CheckpointError, match=r"b\.safetensors cannot be read .*; prepare the"):
        TokenBlocks.load(path)
    path.write_bytes(whole[:-1] + b"\x07")
    with pytest.raises(CheckpointError, match=r"b\.safetensors were changed after"):
        TokenBlocks.load(path)
    from safetensors.numpy import save_file

    save_file({"x": np.zeros(2)}, path)
    with pytest.raises(CheckpointError, match=r"b\.safetensors holds no token blocks"):
        TokenBlocks.load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids_NS": np.zeros((8, 4), np.int64)}, r"ids_NS must be int32 \(8, 4\), got int64"),
        ({"document_N": np.zeros(7, np.int32)}, r"document_N must be int32 \(8,\), got .*\(7,\)"),
        ({"domains": ("docs",)}, r"domain_N must be in [0, 1)"),
    ],
)
def test_wrong_arrays_are_refused(change, message):
    pattern = message if "\\" in message else re.escape(message)
    with pytest.raises(ValueError, match=pattern):
        dataclasses.replace(make(), **change)
