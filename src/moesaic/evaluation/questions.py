"""Multiple-choice questions made from held-out text, so that accuracy needs no network.

Two kinds for every domain. The last word of a passage, among four: in the manner of LAMBADA
(Paperno et al., arXiv 1606.06031), whose passages people chose; here a passage ends at any word,
and the wrong words are others of the same passage, so that having occurred is no hint. The true
continuation of a passage, among four: the wrong ones are as many words out of other documents of
the domain. Chance is one in four for both. How good a model is at them in itself says little; how
much it loses against its dense parent on the same questions does.

No question holds a run of words that the training text holds too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moesaic._errors import InputError
from moesaic._files import atomic_write
from moesaic.data import TokenBlocks

NUM_CHOICES = 4
LAST_WORD, CONTINUATION = "last-word", "continuation"
_ANSWER = re.compile(r"[A-Za-z]{3,}")
# lm-eval joins a question and its choices by one space, so a cut has to be at one.
_AFTER_SPACE = re.compile(r"\S ")
# Passages tried for each question that is asked for.
_TRIES = 50


@dataclass(frozen=True, slots=True, kw_only=True)
class QuestionsConfig:
    """Settings of the questions.

    Attributes:
        per_domain: Questions of each kind for each domain, as far as the text lasts.
        passage_words: Words of a passage.
        continuation_words: Words of a continuation.
        shared_words: A passage that shares so many words in a row with the training text is not
            used. 13 is usual in reports of contamination.
        seed: Of passages, wrong choices and their order.
    """

    per_domain: int = 100
    passage_words: int = 48
    continuation_words: int = 12
    shared_words: int = 13
    seed: int = 0

    def __post_init__(self) -> None:
        for name, low in (
            ("per_domain", 0),
            ("passage_words", 8),
            ("continuation_words", 1),
            ("shared_words", 2),
            ("seed", 0),
        ):
            if getattr(self, name) < low:
                raise InputError(
                    f"questions.{name} must be at least {low}, got {getattr(self, name)}; raise it"
                )


class _Word(NamedTuple):
    """A word of a text: where it is, and whether one space alone stands before it."""

    start: int
    end: int
    after_space: bool


class _Text:
    """A document and its words."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.words = [
            _Word(
                m.start(), m.end(), _AFTER_SPACE.match(text[m.start() - 2 : m.start()]) is not None
            )
            for m in re.finditer(r"\S+", text)
        ]

    def span(self, first: int, count: int) -> str:
        """Some words in a row, with what stands between them."""
        return self.text[self.words[first].start : self.words[first + count - 1].end]

    def starts(self, count: int, before: int) -> list[int]:
        """Words from which `count` go on, with at least `before` in front, after one space."""
        last = len(self.words) - count
        return [i for i in range(before, last + 1) if self.words[i].after_space]


def build_tasks(
    heldout: TokenBlocks,
    train: TokenBlocks,
    tokenizer: Any,
    directory: Path,
    config: QuestionsConfig | None = None,
) -> list[Path]:
    """Write files of questions that `evaluate_tasks` reads.

    Args:
        heldout: Text of the questions, of any number of domains.
        train: Text that no question may share a run of words with.
        tokenizer: Of both, to read the text back.
        directory: Where the files go: `last-word-DOMAIN.jsonl` and `continuation-DOMAIN.jsonl`.
        config: Settings.

    Returns:
        The files. Their questions depend on the text and the settings alone.

    Raises:
        InputError: If a domain has too little text for a single question.
    """
    config = config or QuestionsConfig()
    if config.per_domain < 1:
        raise InputError("questions.per_domain must be at least 1 to build files, got 0; raise it")
    known: set[tuple[str, ...]] = set()
    for _, text in _documents(train, tokenizer):
        known |= _runs(text, config.shared_words)
    files = []
    for domain, name in enumerate(heldout.domains):
        texts = [_Text(text) for index, text in _documents(heldout, tokenizer) if index == domain]
        for number, (kind, ask) in enumerate(
            ((LAST_WORD, _last_word), (CONTINUATION, _continuation))
        ):
            rng = np.random.default_rng([config.seed, domain, number])
            questions = _draw(texts, ask, known, config, rng)
            if not questions:
                raise InputError(
                    f"the held-out text of domain {name!r} gives no {kind} question; give more "
                    "documents, or lower questions.passage_words"
                )
            path = directory / f"{kind}-{name}.jsonl"
            with atomic_write(path) as temporary:
                temporary.write_text(
                    "".join(json.dumps(question) + "\n" for question in questions), "utf-8"
                )
            files.append(path)
    return files


def _documents(blocks: TokenBlocks, tokenizer: Any) -> Iterator[tuple[int, str]]:
    """Read documents back out of packed blocks, each with its domain."""
    for domain in range(len(blocks.domains)):
        # Documents stand end to end, cut into blocks wherever a block is full.
        line = blocks.ids_NS[blocks.domain_N == domain].reshape(-1)
        ends = np.flatnonzero(line == tokenizer.eos_token_id)
        for ids in np.split(line, ends + 1):
            text = tokenizer.decode([int(i) for i in ids if i != tokenizer.eos_token_id])
            if ids.size and ids[-1] != tokenizer.eos_token_id:
                # The last block ended inside a word.
                text = text.rpartition(" ")[0]
            if text.strip():
                yield domain, text


def _runs(text: str, count: int) -> set[tuple[str, ...]]:
    """Every run of so many words, whatever their case."""
    words = text.lower().split()
    return {tuple(words[i : i + count]) for i in range(len(words) - count + 1)}


def _draw(
    texts: Sequence[_Text],
    ask: Any,
    known: set[tuple[str, ...]],
    config: QuestionsConfig,
    rng: np.random.Generator,
) -> list[dict[str, Any]]:
    """Draw documents and places in them until there are enough questions, none twice."""
    questions: list[dict[str, Any]] = []
    asked: set[str] = set()
    for _ in range(_TRIES * config.per_domain if texts else 0):
        if len(questions) == config.per_domain:
            break
        found = ask(texts, int(rng.integers(len(texts))), config, rng)
        if found is None:
            continue
        question, right, wrong = found
        if question in asked or _runs(f"{question} {right}", config.shared_words) & known:
            continue
        asked.add(question)
        choices = [right, *wrong]
        order = rng.permutation(NUM_CHOICES)
        questions.append(
            {
                "question": question,
                "choices": [choices[i] for i in order],
                "answer": int(np.flatnonzero(order == 0)[0]),
            }
        )
    return questions


def _last_word(
    texts: Sequence[_Text], chosen: int, config: QuestionsConfig, rng: np.random.Generator
) -> tuple[str, str, list[str]] | None:
    """A passage without its last word, that word, and others of the passage."""
    text = texts[chosen]
    places = [
        i
        for i in text.starts(1, before=config.passage_words - 1)
        if _ANSWER.fullmatch(text.span(i, 1))
    ]
    if not places:
        return None
    place = int(rng.choice(places))
    first = place - config.passage_words + 1
    right = text.span(place, 1)
    seen = {right.lower()}
    wrong = []
    for i in rng.permutation(np.arange(first, place)):
        word = text.span(int(i), 1)
        if _ANSWER.fullmatch(word) and word.lower() not in seen:
            seen.add(word.lower())
            wrong.append(word)
    if len(wrong) < NUM_CHOICES - 1:
        return None
    return text.span(first, config.passage_words - 1), right, wrong[: NUM_CHOICES - 1]


def _continuation(
    texts: Sequence[_Text], chosen: int, config: QuestionsConfig, rng: np.random.Generator
) -> tuple[str, str, list[str]] | None:
    """A passage, what follows it, and what stands in other documents."""
    text, count = texts[chosen], config.continuation_words
    places = text.starts(count, before=config.passage_words)
    if not places:
        return None
    place = int(rng.choice(places))
    right = text.span(place, count)
    wrong: list[str] = []
    for other in rng.permutation(len(texts)):
        starts = [] if other == chosen else texts[other].starts(count, before=0)
        if not starts:
            continue
        span = texts[other].span(int(rng.choice(starts)), count)
        if span not in (right, *wrong):
            wrong.append(span)
        if len(wrong) == NUM_CHOICES - 1:
            passage = text.span(place - config.passage_words, config.passage_words)
            return passage, right, wrong
    return None
