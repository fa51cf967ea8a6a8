"""From tokens to text as they come: whole characters, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from transformers import PreTrainedTokenizerBase

from moesaic.inference.batching import Written

# What a decoder shows for bytes that are not yet a character.
_INCOMPLETE = "\ufffd"


class Detokenizer:
    """Gives the text that each token adds.

    A token may end inside a character, and some tokenizers write a token differently at the start
    of a text; so a token is decoded together with those before it, back to the last clean cut.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        # Text of ids[:known] was given; those before are for context.
        self._known = 0

    def add(self, token: int) -> str:
        """The text that is complete with this token."""
        self._ids.append(token)
        text = self._new()
        if not text or text.endswith(_INCOMPLETE):
            return ""
        del self._ids[: self._known]
        self._known = len(self._ids)
        return text

    def rest(self) -> str:
        """What is left when no token comes any more."""
        return self._new()

    def _new(self) -> str:
        before = self._decode(self._ids[: self._known])
        return self._decode(self._ids)[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return str(
            self._tokenizer.decode(
                ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenScore:
    """Log-probabilities at a token.

    Attributes:
        token: Its id.
        logprob: Its log-probability.
        likely: The likeliest tokens and theirs.
        offset: Where its text begins in the new text, in characters.
    """

    token: int
    logprob: float
    likely: tuple[tuple[int, float], ...]
    offset: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A part of an answer, ready to send.

    Attributes:
        text: New text.
        scores: Log-probabilities of the tokens whose text begins in it, if they were asked for.
        finish: Why the answer ends with it, if it does.
    """

    text: str
    scores: list[TokenScore] = field(default_factory=list)
    finish: Literal["stop", "length"] | None = None


class TextStream:
    """Turns what a sequence becomes into pieces of text.

    Text that could be the beginning of a stop string is held back until that is decided.

    Args:
        tokenizer: Of the model.
        stop: Strings that end the text and are no part of it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = ()) -> None:
        self.num_tokens = 0
        self._detokenizer = Detokenizer(tokenizer)
        self._stop = tuple(stop)
        self._text = ""
        self._sent = 0
        self._scores: list[TokenScore] = []

    def feed(self, written: Written) -> Piece:
        """Take in what a step wrote; a piece may be empty."""
        before = len(self._text)
        if written.token is not None:
            self.num_tokens += 1
            if written.logprob is not None:
                self._scores.append(
                    TokenScore(
                        token=written.token,
                        logprob=written.logprob,
                        likely=written.likely,
                        offset=before,
                    )
                )
            self._text += self._detokenizer.add(written.token)
        if written.finish is not None:
            self._text += self._detokenizer.rest()
        end = self._stopped(before)
        if end is not None:
            return self._piece(end, "stop")
        if written.finish is not None:
            # Of a token without text of its own, as half a character, the score is sent here.
            return self._piece(len(self._text), written.finish, all_scores=True)
        return self._piece(len(self._text) - self._held(), None)

    def _stopped(self, before: int) -> int | None:
        """Where the first stop string begins, if the text has one."""
        longest = max(map(len, self._stop), default=0)
        found = (self._text.find(stop, max(0, before - longest + 1)) for stop in self._stop)
        return min((at for at in found if at >= 0), default=None)

    def _held(self) -> int:
        """Characters at the end that a stop string begins with."""
        longest = max((len(stop) - 1 for stop in self._stop), default=0)
        for count in range(min(longest, len(self._text)), 0, -1):
            end = self._text[-count:]
            if any(stop.startswith(end) for stop in self._stop):
                return count
        return 0

    def _piece(
        self, end: int, finish: Literal["stop", "length"] | None, *, all_scores: bool = False
    ) -> Piece:
        text = self._text[self._sent : end]
        self._sent = max(self._sent, end)
        scores = [score for score in self._scores if score.offset < end or all_scores]
        self._scores = self._scores[len(scores) :]
        return Piece(text=text, scores=scores, finish=finish)
