"""Answers in OpenAI's form, whole and in chunks, built from the types of the package openai."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Protocol

from openai.types import Completion, CompletionChoice, CompletionUsage
from openai.types.chat import ChatCompletion, ChatCompletionChunk, ChatCompletionTokenLogprob
from openai.types.chat.chat_completion_token_logprob import TopLogprob
from openai.types.completion_choice import Logprobs
from pydantic import BaseModel
from transformers import PreTrainedTokenizerBase

from moesaic.serving.text import Piece, TokenScore
from moesaic.serving.worker import Use


class Form(Protocol):
    """The form of the answers of an endpoint."""

    def start(self, count: int) -> list[BaseModel]:
        """Chunks before the first token."""
        ...

    def chunk(self, index: int, piece: Piece) -> BaseModel:
        """A chunk of a stream."""
        ...

    def end(self, uses: Sequence[Use]) -> BaseModel:
        """The chunk that tells what the answer cost."""
        ...

    def whole(self, pieces: Sequence[Piece], uses: Sequence[Use]) -> BaseModel:
        """An answer at once; one piece for each choice."""
        ...


def joined(pieces: Sequence[Piece]) -> Piece:
    """All pieces of a choice as one."""
    return Piece(
        text="".join(piece.text for piece in pieces),
        scores=[score for piece in pieces for score in piece.scores],
        finish=pieces[-1].finish,
    )


def usage(uses: Sequence[Use], choices_per_prompt: int) -> CompletionUsage:
    """Tokens of an answer; a prompt with several choices counts once."""
    prompt_tokens = sum(use.prompt_tokens for use in uses[::choices_per_prompt])
    new_tokens = sum(use.new_tokens for use in uses)
    return CompletionUsage(
        prompt_tokens=prompt_tokens,
        completion_tokens=new_tokens,
        total_tokens=prompt_tokens + new_tokens,
    )


def operating_point(uses: Sequence[Use]) -> dict[str, float]:
    """What the tokens of an answer used, prompts included: a field of ours beside `usage`."""
    rows = max(1, sum(use.rows for use in uses))
    return {
        "active_ffn": round(sum(use.active for use in uses) / rows, 4),
        "experts_per_token": round(sum(use.experts for use in uses) / rows, 2),
    }


class _Base:
    """What both forms share.

    Args:
        tokenizer: Of the model.
        model: Its name.
        identifier: Of the request.
        scored: Whether log-probabilities were asked for.
        choices_per_prompt: Choices of each prompt.
        routed: Whether the model has routers, so that it matters what a token used.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        model: str,
        identifier: str,
        scored: bool,
        choices_per_prompt: int,
        routed: bool,
    ) -> None:
        self._tokenizer = tokenizer
        self._scored = scored
        self._per_prompt = choices_per_prompt
        self._routed = routed
        self._head = {"id": identifier, "created": int(time.time()), "model": model}

    def _ours(self, uses: Sequence[Use]) -> dict[str, Any]:
        return {"moesaic": operating_point(uses)} if self._routed else {}

    def _word(self, token: int) -> str:
        return str(self._tokenizer.decode([token], clean_up_tokenization_spaces=False))


class ChatForm(_Base):
    """Answers of /v1/chat/completions."""

    def start(self, count: int) -> list[BaseModel]:
        """Say who speaks."""
        delta = {"role": "assistant", "content": ""}
        return [self._chunk([{"index": index, "delta": delta}]) for index in range(count)]

    def chunk(self, index: int, piece: Piece) -> BaseModel:
        """A chunk of a stream."""
        delta = {} if piece.finish and not piece.text else {"content": piece.text}
        choice = {"index": index, "delta": delta, "finish_reason": piece.finish}
        return self._chunk([{**choice, "logprobs": self._logprobs(piece)}])

    def end(self, uses: Sequence[Use]) -> BaseModel:
        """The chunk that tells what the answer cost."""
        told = usage(uses, self._per_prompt)
        return self._chunk([], usage=told, **self._ours(uses))

    def whole(self, pieces: Sequence[Piece], uses: Sequence[Use]) -> BaseModel:
        """An answer at once."""
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": piece.text},
                "finish_reason": piece.finish,
                "logprobs": self._logprobs(piece),
            }
            for index, piece in enumerate(pieces)
        ]
        told = usage(uses, self._per_prompt)
        fields = {"choices": choices, "usage": told, **self._ours(uses)}
        answer: BaseModel = ChatCompletion.model_validate(
            {**self._head, "object": "chat.completion", **fields}
        )
        return answer

    def _chunk(self, choices: list[dict[str, Any]], **fields: Any) -> BaseModel:
        chunk: BaseModel = ChatCompletionChunk.model_validate(
            {**self._head, "object": "chat.completion.chunk", "choices": choices, **fields}
        )
        return chunk

    def _logprobs(self, piece: Piece) -> dict[str, Any] | None:
        if not self._scored:
            return None
        return {"content": [self._score(score) for score in piece.scores]}

    def _score(self, score: TokenScore) -> ChatCompletionTokenLogprob:
        return ChatCompletionTokenLogprob(
            **self._token(score.token, score.logprob),
            top_logprobs=[TopLogprob(**self._token(token, value)) for token, value in score.likely],
        )

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        word = self._word(token)
        # Half a character has no text, and its bytes are not told.
        told = None if "\ufffd" in word else list(word.encode())
        return {"token": word, "bytes": told, "logprob": logprob}


class CompletionForm(_Base):
    """Answers of /v1/completions."""

    def start(self, count: int) -> list[BaseModel]:
        """Nothing comes before the text."""
        return []

    def chunk(self, index: int, piece: Piece) -> BaseModel:
        """A chunk of a stream."""
        return self._made([self._choice(index, piece)])

    def end(self, uses: Sequence[Use]) -> BaseModel:
        """The chunk that tells what the answer cost."""
        told = usage(uses, self._per_prompt)
        return self._made([], usage=told, **self._ours(uses))

    def whole(self, pieces: Sequence[Piece], uses: Sequence[Use]) -> BaseModel:
        """An answer at once."""
        choices = [self._choice(index, piece) for index, piece in enumerate(pieces)]
        return self._made(choices, usage=usage(uses, self._per_prompt), **self._ours(uses))

    def _choice(self, index: int, piece: Piece) -> CompletionChoice:
        logprobs = None
        if self._scored:
            logprobs = Logprobs(
                tokens=[self._word(score.token) for score in piece.scores],
                token_logprobs=[score.logprob for score in piece.scores],
                top_logprobs=[
                    {self._word(token): value for token, value in score.likely}
                    for score in piece.scores
                ],
                text_offset=[score.offset for score in piece.scores],
            )
        # Only the last chunk of a stream has a reason, and the type knows no other.
        return CompletionChoice.model_construct(
            index=index, text=piece.text, finish_reason=piece.finish, logprobs=logprobs
        )

    def _made(self, choices: list[CompletionChoice], **fields: Any) -> BaseModel:
        answer: BaseModel = Completion.model_construct(
            **self._head, object="text_completion", choices=choices, **fields
        )
        return answer
