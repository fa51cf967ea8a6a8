"""Questions from held-out text: right where they say, and nothing of the training text."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesaic._errors import InputError
from moesaic.data import TokenBlocks
from moesaic.evaluation import QuestionsConfig, build_tasks
from moesaic.evaluation.tasks import read_questions

END = 0


class Characters:
    """A tokenizer of one token a character."""

    eos_token_id = END

    def decode(self, ids):
        return "".join(map(chr, ids))


def pack(documents, block=64):
    """Documents by domain, end to end in blocks, as `prepare` packs them."""
    ids, domain_N = [], []
    for domain, texts in enumerate(documents.values()):
        line = [i for text in texts for i in [*map(ord, text), END]]
        num_blocks = len(line) // block
        ids += [line[i * block : (i + 1) * block] for i in range(num_blocks)]
        domain_N += [domain] * num_blocks
    return TokenBlocks(
        ids_NS=np.asarray(ids, np.int32).reshape(-1, block),
        domain_N=np.asarray(domain_N, np.int16),
        document_N=np.zeros(len(ids), np.int32),
        domains=tuple(documents),
    )


def text(seed, words=120):
    rng = np.random.default_rng(seed)
    letters = "abcdefghijklmnopqrstuvwxyz"
    made = ["".join(rng.choice(list(letters), rng.integers(3, 7))) for _ in range(words)]
    # Now and then a line ends: no cut may be there.
    return "".join(word + ("\n" if rng.random() < 0.1 else " ") for word in made).strip()


HELDOUT = {
    "prose": [text(seed) for seed in range(6)],
    "code": [text(seed) for seed in range(10, 15)],
}
TRAIN = {"prose": [text(seed) for seed in range(20, 24)]}
CONFIG = QuestionsConfig(per_domain=12, passage_words=10, continuation_words=4, shared_words=6)


def build(directory, config=CONFIG, heldout=HELDOUT, train=TRAIN):
    return build_tasks(pack(heldout), pack(train), Characters(), directory, config)


def test_files_and_their_questions(tmp_path):
    files = build(tmp_path)
    assert [file.name for file in files] == [
        "last-word-prose.jsonl",
        "continuation-prose.jsonl",
        "last-word-code.jsonl",
        "continuation-code.jsonl",
    ]
    for file in files:
        questions = read_questions(file)
        assert len(questions) == 12
        assert len({q["question"] for q in questions}) == 12
        documents = HELDOUT[file.stem.rpartition("-")[2]]
        kind = file.stem.rpartition("-")[0]
        for q in questions:
            assert len(set(q["choices"])) == 4
            right = q["choices"][q["answer"]]
            # lm-eval puts one space between the two, and so did the text.
            (home,) = [d for d in documents if f"{q['question']} {right}" in d]
            assert len(q["question"].split()) == (9 if kind == "last-word" else 10)
            wrong = [c for i, c in enumerate(q["choices"]) if i != q["answer"]]
            if kind == "last-word":
                assert all(word in q["question"].split() for word in wrong)
                assert right.isalpha()
            else:
                assert all(len(c.split()) == 4 for c in q["choices"])
                assert all(not any(c in d for d in [home]) for c in wrong)
                assert all(any(c in d for d in documents) for c in wrong)
    answers = [q["answer"] for file in files for q in read_questions(file)]
    assert set(answers) == {0, 1, 2, 3}


def test_the_seed_decides_and_nothing_else(tmp_path):
    one, two = build(tmp_path / "1"), build(tmp_path / "2")
    np.random.seed(5)  # noqa: NPY002
    assert [f.read_text() for f in one] == [f.read_text() for f in two]
    other = build(tmp_path / "3", QuestionsConfig(**{**plain(CONFIG), "seed": 1}))
    assert [f.read_text() for f in other] != [f.read_text() for f in one]
    # A domain does not depend on those after it.
    alone = build(tmp_path / "4", heldout={"prose": HELDOUT["prose"]})
    assert [f.read_text() for f in alone] == [f.read_text() for f in one[:2]]


def plain(config):
    return {name: getattr(config, name) for name in config.__dataclass_fields__}


def runs(document, count):
    words = document.lower().split()
    return {tuple(words[i : i + count]) for i in range(len(words) - count + 1)}


def test_no_question_shares_a_run_with_the_training_text(tmp_path):
    # The training text quotes the middle of every held-out document, in capitals.
    quotes = [" ".join(d.split()[40:80]).upper() for d in HELDOUT["prose"]]
    heldout = {"prose": HELDOUT["prose"]}
    known = set().union(*(runs(quote, 6) for quote in quotes))

    def touched(files):
        return [
            bool(runs(f"{q['question']} {q['choices'][q['answer']]}", 6) & known)
            for file in files
            for q in read_questions(file)
        ]

    assert any(touched(build(tmp_path / "free", heldout=heldout)))
    quoted = {"prose": [*TRAIN["prose"], *quotes, "x" * 64]}
    assert not any(touched(build(tmp_path / "quoted", heldout=heldout, train=quoted)))


def test_documents_come_back_out_of_blocks(tmp_path):
    # 7 characters a block: every document begins and ends inside one.
    files = build_tasks(pack(HELDOUT, block=7), pack(TRAIN), Characters(), tmp_path, CONFIG)
    for file in files:
        documents = HELDOUT[file.stem.rpartition("-")[2]]
        for q in read_questions(file):
            assert any(f"{q['question']} {q['choices'][q['answer']]}" in d for d in documents)


def test_too_little_text_is_named(tmp_path):
    with pytest.raises(InputError, match="domain 'prose' gives no last-word question"):
        build(tmp_path, heldout={"prose": ["a b c " * 40]})
    few = {"prose": HELDOUT["prose"][:3]}
    with pytest.raises(InputError, match="gives no continuation question; give more documents"):
        build(tmp_path, heldout=few)
    with pytest.raises(InputError, match="per_domain must be at least 1 to build files"):
        build(tmp_path, QuestionsConfig(per_domain=0))
    with pytest.raises(InputError, match="passage_words must be at least 8, got 2"):
        QuestionsConfig(passage_words=2)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), passage=st.integers(8, 20), count=st.integers(1, 6))
def test_every_question_is_cut_at_a_space(tmp_path_factory, seed, passage, count):
    config = QuestionsConfig(
        per_domain=3, passage_words=passage, continuation_words=count, seed=seed
    )
    for file in build(tmp_path_factory.mktemp("q"), config):
        documents = HELDOUT[file.stem.rpartition("-")[2]]
        for line in file.read_text().splitlines():
            q = json.loads(line)
            whole = f"{q['question']} {q['choices'][q['answer']]}"
            assert sum(whole in d for d in documents) == 1
