"""How a request becomes sequences, and these an answer."""

from __future__ import annotations

import asyncio
import secrets
import time
import uuid
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from fastapi import Request, Response
from fastapi.responses import StreamingResponse
from pydantic import BaseModel
from starlette.types import Receive, Scope, Send

from moesaic._errors import InputError
from moesaic.inference.batching import Job
from moesaic.inference.engine import Sampling
from moesaic.serving.answers import ChatForm, CompletionForm, Form, joined
from moesaic.serving.errors import ApiError, as_api_error
from moesaic.serving.model import ServedModel
from moesaic.serving.prompts import chat_ids, text_ids
from moesaic.serving.schema import ChatRequest, CompletionRequest
from moesaic.serving.text import Piece, TextStream
from moesaic.serving.worker import Answer, WorkerError

# What nginx calls a client that left; nobody reads it.
_CLIENT_LEFT = 499


class _Closing(StreamingResponse):
    """A stream that forgets its sequences however it ends, also before its first chunk."""

    def __init__(self, content: AsyncIterator[str], answer: Answer) -> None:
        super().__init__(content, media_type="text/event-stream")
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        with self._answer:
            await super().__call__(scope, receive, send)


class Service:
    """Answers requests with one model.

    Args:
        served: The model and everything that belongs to it.
    """

    def __init__(self, served: ServedModel) -> None:
        self.served = served
        self.config = served.config
        # Long texts take long, and a tokenizer is no place for two threads.
        self._encoder = ThreadPoolExecutor(1, thread_name_prefix="moesaic-tokenizer")

    async def chat(self, http: Request, request: ChatRequest) -> Response:
        """Answer /v1/chat/completions."""
        self._check(request, 1)
        messages = [message.plain() for message in request.messages]
        prompt = await self._encoded(partial(chat_ids, self.served.tokenizer, messages))
        form = ChatForm(self.served.tokenizer, **self._about("chatcmpl-", request))
        return await self._answer(http, form, self._jobs([prompt], request), request)

    async def complete(self, http: Request, request: CompletionRequest) -> Response:
        """Answer /v1/completions."""
        self._check(request, len(request.prompts))
        prompts = [
            await self._encoded(partial(text_ids, self.served.tokenizer, prompt))
            if isinstance(prompt, str)
            else prompt
            for prompt in request.prompts
        ]
        form = CompletionForm(self.served.tokenizer, **self._about("cmpl-", request))
        return await self._answer(http, form, self._jobs(prompts, request), request)

    def check_name(self, name: str) -> None:
        """Refuse another model than the one that is served."""
        if name != self.served.name:
            raise ApiError(
                404,
                f"the model {name!r} is not here; this server has {self.served.name!r}",
                param="model",
                code="model_not_found",
            )

    def _check(self, request: ChatRequest | CompletionRequest, num_prompts: int) -> None:
        """Refuse what needs no tokens to be refused."""
        self.check_name(request.model)
        # What never fits is not to be tried again.
        most = min(self.config.max_choices, self.served.worker.room)
        asked = num_prompts * (request.n or 1)
        if asked > most:
            raise ApiError(
                400,
                f"the request asks for {asked} sequences, more than the {most} of this server; ask "
                "for fewer",
                param="n",
            )

    async def _encoded(self, encode: Callable[[], list[int]]) -> list[int]:
        return await asyncio.get_running_loop().run_in_executor(self._encoder, encode)

    def _about(self, prefix: str, request: ChatRequest | CompletionRequest) -> dict[str, Any]:
        """What the form of an answer must know."""
        return {
            "model": self.served.name,
            "identifier": prefix + uuid.uuid4().hex,
            "scored": request.num_likely is not None,
            "choices_per_prompt": request.n or 1,
            "routed": bool(self.served.share.routed),
        }

    def _jobs(
        self, prompts: list[list[int]], request: ChatRequest | CompletionRequest
    ) -> list[tuple[Job, TextStream]]:
        """The sequences that a request asks for, checked against the limits."""
        served = self.served
        threshold = self._threshold(request)
        seed = secrets.randbits(63) if request.seed is None else request.seed
        jobs = []
        for prompt in prompts:
            if max(prompt, default=0) >= served.vocabulary:
                raise ApiError(
                    400,
                    f"token ids must be in [0, {served.vocabulary}), got {max(prompt)}",
                    param="prompt",
                )
            new_tokens = self._new_tokens(len(prompt), request.new_tokens)
            for choice in range(request.n or 1):
                sampling = Sampling(
                    temperature=1.0 if request.temperature is None else request.temperature,
                    top_p=request.top_p or 1.0,
                    # Choices of one request differ; the first is that of a request for one.
                    seed=(seed + choice) % 2**63,
                )
                job = Job(
                    prompt_T=prompt,
                    max_new_tokens=new_tokens,
                    stop=served.stop,
                    sampling=sampling,
                    threshold=threshold,
                    num_likely=request.num_likely,
                )
                jobs.append((job, TextStream(served.tokenizer, request.stops)))
        return jobs

    def _new_tokens(self, prompt_tokens: int, asked: int | None) -> int:
        """New tokens of a sequence: what was asked for, or what fits."""
        limit = self.config.max_tokens
        if asked is not None and asked > limit:
            raise ApiError(
                400,
                f"max_tokens is {asked}, more than the {limit} that this server writes; ask for "
                "less",
                param="max_tokens",
            )
        # The last token is written and not read.
        room = self.served.length - prompt_tokens + 1
        if room < (asked or 1):
            raise ApiError(
                400,
                f"the prompt has {prompt_tokens} tokens, and with {asked or 1} new ones more than "
                f"the {self.served.length} of this server; shorten it or ask for less",
                code="context_length_exceeded",
            )
        return min(room, limit) if asked is None else asked

    def _threshold(self, request: ChatRequest | CompletionRequest) -> float | None:
        """The threshold of the gates that a request asks for."""
        asked = "active" if request.active is not None else "threshold"
        if request.active is None and request.threshold is None:
            return None
        if self.served.curve is None:
            raise ApiError(
                400,
                f"{asked} moves the gates of a DSMoE, and this model has none; leave it out",
                param=asked,
            )
        if request.threshold is not None:
            return request.threshold
        try:
            return self.served.curve.threshold(float(request.active or 0.0))
        except InputError as error:
            raise ApiError(400, str(error), param="active") from error

    async def _answer(
        self,
        http: Request,
        form: Form,
        jobs: list[tuple[Job, TextStream]],
        request: ChatRequest | CompletionRequest,
    ) -> Response:
        """Write the sequences and answer, whole or as a stream."""
        started = time.monotonic()
        answer = self.served.worker.submit(jobs)
        if request.stream:
            usage = request.stream_options is not None and request.stream_options.include_usage
            chunks = self._stream(form, answer, started, with_usage=usage)
            return _Closing(chunks, answer)
        with answer:
            whole = asyncio.ensure_future(self._whole(form, answer, started))
            left = asyncio.ensure_future(_left(http))
            try:
                await asyncio.wait({whole, left}, return_when=asyncio.FIRST_COMPLETED)
                if not whole.done():
                    self.served.metrics.disconnects.inc()
                    return Response(status_code=_CLIENT_LEFT)
                return _json(await whole)
            finally:
                whole.cancel()
                left.cancel()

    async def _whole(self, form: Form, answer: Answer, started: float) -> BaseModel:
        pieces: list[list[Piece]] = [[] for _ in answer.uses]
        async for index, piece in self._timed(answer, started):
            pieces[index].append(piece)
        return form.whole([joined(part) for part in pieces], answer.uses)

    async def _stream(
        self, form: Form, answer: Answer, started: float, *, with_usage: bool
    ) -> AsyncIterator[str]:
        ended = False
        try:
            for chunk in form.start(len(answer.uses)):
                yield _event(chunk)
            async for index, piece in self._timed(answer, started):
                if piece.text or piece.scores or piece.finish:
                    yield _event(form.chunk(index, piece))
            if with_usage:
                yield _event(form.end(answer.uses))
            ended = True
            yield "data: [DONE]\n\n"
        except (TimeoutError, WorkerError) as error:
            ended = True
            # The status is sent already: the stream itself says what happened.
            yield _event(as_api_error(error).body)
        finally:
            if not ended:
                self.served.metrics.disconnects.inc()

    async def _timed(self, answer: Answer, started: float) -> AsyncIterator[tuple[int, Piece]]:
        metrics, first = self.served.metrics, True
        async for part in answer.parts(self.config.timeout_s):
            if first:
                metrics.first_token_s.observe(time.monotonic() - started)
                first = False
            yield part
        metrics.request_s.observe(time.monotonic() - started)


async def _left(http: Request) -> None:
    """Return when the client is gone; the body was read before."""
    while (await http.receive())["type"] != "http.disconnect":
        pass


def _event(body: BaseModel) -> str:
    return f"data: {body.model_dump_json(exclude_none=True)}\n\n"


def _json(body: BaseModel) -> Response:
    return Response(body.model_dump_json(exclude_none=True), media_type="application/json")
