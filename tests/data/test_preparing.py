import dataclasses
import subprocess
import sys
from contextlib import contextmanager

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from moesaic._config import build_config, to_plain
from moesaic._errors import CheckpointError, InputError
from moesaic.data import (
    DataConfig,
    DataSplit,
    Document,
    DuplicateConfig,
    prepare,
    split_documents,
    tokenizer_fingerprint,
)


def config_of(*sources, **options):
    defaults = {"block": 32, "max_tokens_per_domain": 100_000, "heldout_tokens_per_domain": 100_000}
    return DataConfig(sources=tuple(map(str, sources)), **{**defaults, **options})


def texts_of(blocks, tokenizer):
    """The documents of one side, cut at the end marks; the last is ragged."""
    line = blocks.ids_NS.ravel()
    ends = np.flatnonzero(line == tokenizer.eos_token_id)
    return [tokenizer.decode(part) for part in np.split(line, ends + 1)]


def documents_of(texts, domain="d"):
    return [Document(text=text, domain=domain, source="s") for text in texts]


@given(st.sets(st.text(min_size=1, max_size=8), min_size=12, max_size=40), st.integers(0, 5))
def test_a_document_keeps_its_side_whatever_the_others_are(texts, seed):
    config = DataConfig(seed=seed, heldout_fraction=0.5)
    some = sorted(texts)
    try:
        whole, dropped = split_documents(documents_of(some), config)
        part, _ = split_documents(documents_of(reversed(some[::2])), config)
    except InputError:
        assume(False)  # by chance one side is empty
    held = [d.text for d, _ in whole["d"].heldout]
    train = [d.text for d, _ in whole["d"].train]
    assert not dropped
    assert set(held).isdisjoint(train)
    assert sorted(held + train) == some
    # The part is the whole with documents left out: same sides, same order.
    assert [d.text for d, _ in part["d"].heldout] == [t for t in held if t in some[::2]]
    assert [d.text for d, _ in part["d"].train] == [t for t in train if t in some[::2]]


def test_exact_duplicates_are_dropped_across_domains():
    documents = [
        *documents_of([f"text {i}" for i in range(30)], "a"),
        *documents_of([f"text {i}" for i in range(25, 60)], "b"),
        *documents_of(["text 3"], "a"),
    ]
    domains, dropped = split_documents(documents, DataConfig(heldout_fraction=0.5))
    assert dropped == {("b", "s"): 5, ("a", "s"): 1}
    sizes = {name: len(sides.train) + len(sides.heldout) for name, sides in domains.items()}
    assert sizes == {"a": 30, "b": 30}


def test_prepare_packs_every_document_once(corpus, tokenizer):
    split = prepare(config_of(corpus), tokenizer)
    whole = {path.read_text("utf-8") for path in corpus.iterdir()}
    sides = [texts_of(split.train, tokenizer), texts_of(split.heldout, tokenizer)]
    for texts in sides:
        assert set(texts[:-1]) <= whole
        assert any(text.startswith(texts[-1]) for text in whole)
    assert set(sides[0]).isdisjoint(sides[1])
    (record,) = split.report.domains
    assert record.documents == record.train_documents + record.heldout_documents == 40
    assert record.train_tokens == split.train.num_tokens
    assert record.heldout_tokens == split.heldout.num_tokens
    # Every token is in a block or counted as dropped; each document has one end mark.
    num_tokens = sum(map(len, whole)) + 40
    assert record.train_tokens + record.heldout_tokens + record.dropped_tokens == num_tokens
    assert record.dropped_tokens < 2 * 32
    assert split.train.block == split.heldout.block == 32


def test_prepare_is_deterministic_and_depends_on_the_seed(corpus, tokenizer):
    one, two, other = (prepare(config_of(corpus, seed=s), tokenizer) for s in (0, 0, 1))
    assert one.train.fingerprint() == two.train.fingerprint()
    assert one.report == two.report
    assert one.train.fingerprint() != other.train.fingerprint()


def test_near_duplicates_of_held_out_documents_leave_training(corpus, tokenizer):
    before = prepare(config_of(corpus), tokenizer)
    held = texts_of(before.heldout, tokenizer)[0]
    # A changed word, and a long document that quotes the held-out one; both may land on either
    # side, so several of each are written.
    marks = [f"copy{number}" for number in range(12)]
    for mark in marks:
        (corpus / f"{mark}.txt").write_text(f"{mark} {held}", "utf-8")
        own = " ".join(f"{mark}y{i}" for i in range(500))
        (corpus / f"{mark}-long.txt").write_text(f"{own} {held} {own}", "utf-8")
    after = prepare(config_of(corpus), tokenizer)
    quote = " ".join(held.split()[:20])
    assert not [text for text in texts_of(after.train, tokenizer) if quote in text]
    assert sum(quote in text for text in texts_of(after.heldout, tokenizer)) > 1
    (record,) = after.report.domains
    assert record.near_duplicates >= 12
    assert record.near_duplicates + record.train_documents + record.heldout_documents == 64
    assert sum(p.near_duplicates for p in after.train.provenance) == record.near_duplicates
    # With the check all but off they stay.
    lax = DuplicateConfig(threshold=1.0, shingle_words=10_000)
    kept = prepare(config_of(corpus, duplicates=lax), tokenizer)
    assert [text for text in texts_of(kept.train, tokenizer) if quote in text]


def test_tokenising_is_bounded(corpus, tokenizer):
    calls = []

    class Counting(type(tokenizer)):
        def __call__(self, text, *, add_special_tokens):
            calls.append(text)
            return super().__call__(text, add_special_tokens=add_special_tokens)

    config = config_of(corpus, max_tokens_per_domain=1000, heldout_tokens_per_domain=64)
    split = prepare(config, Counting())
    assert split.train.num_tokens == 1000 // 32 * 32
    assert split.heldout.num_tokens == 64
    # 1000 tokens are three documents, 64 tokens one; the fingerprint encodes one probe.
    assert len(calls) == 5


def test_excerpts_bound_what_a_document_gives(corpus, tokenizer):
    split = prepare(config_of(corpus, excerpt_characters=100), tokenizer)
    texts = texts_of(split.train, tokenizer)
    assert all(50 <= len(text) <= 100 for text in texts[:-1])
    assert len({text.split("x")[1] for text in texts[:-1]}) > 5  # not all from the beginning


def test_domains_do_not_mix(corpus, tmp_path, tokenizer):
    other = tmp_path / "other"
    other.mkdir()
    for path in corpus.iterdir():
        (other / path.name).write_text(path.read_text("utf-8").replace("w", "v"), "utf-8")
    split = prepare(config_of(corpus, other, f"tales={other}"), tokenizer)
    for blocks in (split.train, split.heldout):
        assert blocks.domains == ("tales", "other")
        for ids, domain in zip(blocks.ids_NS, blocks.domain_N, strict=True):
            assert (ord("v") in ids) == (domain == 1)
    assert [r.exact_duplicates for r in split.report.domains] == [40, 0]


def test_cache_is_found_by_content(corpus, tmp_path, tokenizer, monkeypatch):
    cache = tmp_path / "cache"
    config = config_of(corpus)
    made = prepare(config, tokenizer, cache)
    (place,) = cache.iterdir()
    with monkeypatch.context() as patch:
        patch.setattr("moesaic.data.preparing.encode", lambda *_: pytest.fail("tokenised again"))
        patch.setattr(
            "moesaic.data.preparing.tokenizer_fingerprint", lambda _: made.train.tokenizer
        )
        found = prepare(config, tokenizer, cache)
    assert found.train.fingerprint() == made.train.fingerprint()
    assert found.heldout.fingerprint() == made.heldout.fingerprint()
    assert found.report == made.report
    (corpus / "00.txt").write_text("another text " * 30, "utf-8")
    prepare(config, tokenizer, cache)
    prepare(dataclasses.replace(config, block=16), tokenizer, cache)
    assert len(list(cache.iterdir())) == 3
    assert place.exists()


def test_broken_cache_is_made_again(corpus, tmp_path, tokenizer, caplog):
    config = config_of(corpus)
    made = prepare(config, tokenizer, tmp_path / "cache")
    (place,) = (tmp_path / "cache").iterdir()
    (place / "train.safetensors").write_bytes(b"broken")
    with pytest.raises(CheckpointError, match=r"train\.safetensors cannot be read"):
        DataSplit.load(place)
    again = prepare(config, tokenizer, tmp_path / "cache")
    assert "cached data is made again" in caplog.text
    assert again.train.fingerprint() == made.train.fingerprint()
    assert DataSplit.load(place).report == made.report
    with pytest.raises(CheckpointError, match="holds no prepared data; prepare it again"):
        DataSplit.load(corpus)


def test_progress_reaches_its_totals(corpus, tokenizer):
    seen = {}

    class Watch:
        @contextmanager
        def stage(self, name, total, unit):
            seen[name] = [total, 0]
            yield self
            self.name = name

        def advance(self, n=1.0):
            seen[list(seen)[-1]][1] += n

    prepare(config_of(corpus), tokenizer, progress=Watch())
    assert seen == {"read text": [1, 1], "tokenise": [2, 2]}


def test_one_document_cannot_be_split(tmp_path, tokenizer):
    path = tmp_path / "novel.txt"
    paragraphs = [" ".join(f"p{i}w{j}" for j in range(30)) for i in range(60)]
    path.write_text("\n\n".join(paragraphs), "utf-8")
    message = (
        r"domain 'novel' has no (held-out|training) document out of 1 at "
        r"data\.heldout_fraction=0\.2; .*data\.section_characters"
    )
    with pytest.raises(InputError, match=message):
        prepare(config_of(path), tokenizer)
    split = prepare(config_of(path, section_characters=400), tokenizer)
    assert split.report.domains[0].heldout_documents > 0


def test_too_little_text_is_said_with_its_tokens(corpus, tokenizer):
    options = {"block": 8192, "excerpt_characters": None}
    with pytest.raises(
        InputError,
        match=r"domain 'tales' has \d+ held-out tokens, fewer than one block=8192; add text or",
    ):
        prepare(config_of(corpus, **options), tokenizer)


def test_training_text_of_copies_only_is_said(tmp_path, tokenizer):
    body = " ".join(f"w{i}" for i in range(80))
    for number in range(20):
        (tmp_path / f"{number}.txt").write_text(f"{body} end{number}", "utf-8")
    message = r"has 0 training tokens after \d+ near-duplicates of held-out documents left, fewer"
    with pytest.raises(InputError, match=message):
        prepare(config_of(f"d={tmp_path}"), tokenizer)


def test_tokenizer_without_end_mark_is_refused_before_reading(tokenizer):
    tokenizer.eos_token_id = None
    with pytest.raises(InputError, match=r"has no eos_token.*set tokenizer\.eos_token"):
        prepare(config_of("missing.txt"), tokenizer)


def test_tokenizer_fingerprint_sees_what_decides_ids(tokenizer):
    class Backend:
        def __init__(self, rules):
            self.rules = rules

        def to_str(self):
            return self.rules

    def fingerprint(**attributes):
        return tokenizer_fingerprint(type("Fake", (type(tokenizer),), attributes)())

    plain = fingerprint(backend_tokenizer=Backend('{"model": 1, "truncation": null}'))
    assert plain == fingerprint(backend_tokenizer=Backend('{"model": 1, "truncation": 5}'))
    assert plain != fingerprint(backend_tokenizer=Backend('{"model": 2}'))
    assert fingerprint(get_vocab=lambda _: {"a": 1}) != fingerprint(get_vocab=lambda _: {"a": 2})
    assert fingerprint() == fingerprint()
    assert fingerprint() != fingerprint(eos_token_id=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sources": ()}, r"data\.sources is empty; name a file"),
        ({"block": 1}, r"data\.block must be at least 2, got 1"),
        ({"heldout_fraction": 1.0}, r"data\.heldout_fraction must be in \(0, 1\), got 1\.0; 0\.1"),
        ({"heldout_fraction": 0.0}, r"data\.heldout_fraction must be in \(0, 1\), got 0\.0"),
        ({"max_tokens_per_domain": 9}, r"max_tokens_per_domain must be at least one block=512"),
        ({"heldout_tokens_per_domain": 9}, r"heldout_tokens_per_domain must be .*block=512, got 9"),
        ({"max_characters_per_source": 0}, r"max_characters_per_source must be at least 1, got 0"),
        ({"excerpt_characters": 3}, r"data\.excerpt_characters must be at least 16, got 3"),
        ({"section_characters": 3}, r"data\.section_characters must be at least 16, got 3"),
        ({"duplicates": {"threshold": 0.0}}, r"threshold must be in \(0, 1\], got 0\.0"),
        ({"duplicates": {"shingle_words": 0}}, r"shingle_words must be at least 1, got 0"),
        ({"blocks": 5}, r"data option 'blocks' is unknown; did you mean block"),
    ],
)
def test_bad_settings_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        build_config(DataConfig, options, where="data")


def test_config_survives_plain_data():
    config = DataConfig(sources=("a", "b"), excerpt_characters=None)
    assert build_config(DataConfig, to_plain(config), where="data") == config


def test_floor_imports_nothing_heavy():
    code = (
        "import sys, moesaic.data; "
        "print(*sorted({'torch', 'transformers', 'datasets', 'pyarrow', 'pandas'} "
        "& set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == []


def test_builtin_sources_are_split_without_a_common_line_of_text(tokenizer):
    # Topics of the documentation contain each other: "compound" holds all of "if".
    config = config_of("builtin:docs", block=512)
    split = prepare(config, tokenizer)
    (record,) = split.report.domains
    assert record.near_duplicates > 0
    assert record.train_documents > record.heldout_documents > 4
