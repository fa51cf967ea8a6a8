"""Ways to have prompts continued: the engine in this process, and a server over HTTP."""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from typing import NamedTuple

from openai import AsyncOpenAI
from transformers import PreTrainedTokenizerBase

from moesaic._errors import RunError
from moesaic.inference.batching import Batch, Job, Stepper
from moesaic.serving.text import TextStream

Ids = Sequence[Sequence[int]]

# Longer than any answer takes.
_TIMEOUT_S = 600.0


class Answer(NamedTuple):
    """The greedy continuation of a prompt.

    Attributes:
        text: The whole of it.
        num_tokens: Tokens written.
        first_s: Seconds until the first text was there.
    """

    text: str
    num_tokens: int
    first_s: float


class Way(ABC):
    """A model that answers."""

    @abstractmethod
    def ask(self, prompts: Ids) -> list[Answer]:
        """Continue prompts greedily, all at once."""

    @abstractmethod
    def close(self) -> None:
        """Give up what it holds."""


class InProcess(Way):
    """Our engine without a server.

    Args:
        decoder: Its slots bound the prompts continued at once.
        tokenizer: Of the model.
        stop: Tokens that end a text.
        new_tokens: Tokens of a text at most.
    """

    def __init__(
        self,
        decoder: Stepper,
        tokenizer: PreTrainedTokenizerBase,
        stop: Collection[int],
        new_tokens: int,
    ) -> None:
        self.decoder, self.tokenizer = decoder, tokenizer
        self.stop, self.new_tokens = stop, new_tokens

    def ask(self, prompts: Ids) -> list[Answer]:
        """Continue prompts side by side, from token to text as the server does."""
        batch = Batch(self.decoder)
        started = time.perf_counter()
        for key, ids in enumerate(prompts):
            job = Job(prompt_T=list(ids), max_new_tokens=self.new_tokens, stop=self.stop)
            batch.add(key, job)
        streams = [TextStream(self.tokenizer) for _ in prompts]
        texts = ["" for _ in prompts]
        firsts: dict[int, float] = {}
        while (step := batch.step()) is not None:
            for each in step.written:
                piece = streams[each.key].feed(each)
                texts[each.key] += piece.text
                # As a server sends it: half a character has no text yet.
                if piece.text or piece.finish:
                    firsts.setdefault(each.key, time.perf_counter() - started)
        return [
            Answer(text, stream.num_tokens, firsts[key])
            for key, (text, stream) in enumerate(zip(texts, streams, strict=True))
        ]

    def close(self) -> None:
        """Do nothing: memory goes with the object."""


class OverHttp(Way):
    """A server, asked by OpenAI's client; answers come as streams.

    Args:
        address: Of the server, without a path.
        model: What it calls the model.
        new_tokens: Tokens of a text at most.
    """

    def __init__(self, address: str, model: str, new_tokens: int) -> None:
        self.model, self.new_tokens = model, new_tokens
        # One thread for all requests: the client shares the cores with the server.
        self._runner = asyncio.Runner()
        self._client = AsyncOpenAI(
            base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=_TIMEOUT_S
        )

    def ask(self, prompts: Ids) -> list[Answer]:
        """Continue prompts as requests at once."""
        return self._runner.run(self._ask(prompts))

    async def _ask(self, prompts: Ids) -> list[Answer]:
        return list(await asyncio.gather(*map(self._one, prompts)))

    async def _one(self, ids: Sequence[int]) -> Answer:
        started = time.perf_counter()
        chunks = await self._client.completions.create(
            model=self.model,
            prompt=list(ids),
            max_tokens=self.new_tokens,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
        text, num_tokens, first_s = "", 0, None
        async for chunk in chunks:
            for choice in chunk.choices:
                if first_s is None:
                    first_s = time.perf_counter() - started
                text += choice.text
            if chunk.usage is not None:
                num_tokens = chunk.usage.completion_tokens
        if first_s is None:
            raise RunError(f"the server of {self.model} ended a stream without a text")
        return Answer(text, num_tokens, first_s)

    def close(self) -> None:
        """Close the connections."""
        self._runner.run(self._client.close())
        self._runner.close()
