"""The application: which address answers what, and how a request becomes sequences."""

from __future__ import annotations

import asyncio
import secrets
import time
import uuid
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import StreamingResponse
from openai.types import Completion, Model
from openai.types.chat import ChatCompletion
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel
from starlette.types import Receive, Scope, Send

from moesaic._errors import InputError
from moesaic.inference.batching import Job
from moesaic.inference.engine import Sampling
from moesaic.serving.answers import ChatForm, CompletionForm, Form, joined
from moesaic.serving.errors import ApiError, ErrorAnswer, add_error_handlers, as_api_error
from moesaic.serving.guard import Guard
from moesaic.serving.metrics import Counting
from moesaic.serving.model import ServedModel
from moesaic.serving.prompts import chat_ids, text_ids
from moesaic.serving.schema import ChatRequest, CompletionRequest
from moesaic.serving.text import Piece, TextStream
from moesaic.serving.worker import Answer, WorkerError

# What nginx calls a client that left; nobody reads it.
_CLIENT_LEFT = 499
_ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorAnswer},
    "5XX": {"model": ErrorAnswer},
}


class ModelList(BaseModel):
    """The models of a server."""

    object: str = "list"
    data: list[Model]


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
        self.check_name(request.model)
        messages = [message.plain() for message in request.messages]
        prompt = await self._encoded(lambda: chat_ids(self.served.tokenizer, messages))
        form = ChatForm(self.served.tokenizer, **self._about("chatcmpl-", request))
        return await self._answer(http, form, self._jobs([prompt], request), request)

    async def complete(self, http: Request, request: CompletionRequest) -> Response:
        """Answer /v1/completions."""
        self.check_name(request.model)
        prompts = [
            await self._encoded(lambda text=prompt: text_ids(self.served.tokenizer, text))
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
        config, served = self.config, self.served
        choices = request.n or 1
        if choices * len(prompts) > config.max_choices:
            raise ApiError(
                400,
                f"the request asks for {choices * len(prompts)} sequences, more than the "
                f"{config.max_choices} of this server; ask for fewer",
                param="n",
            )
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
            for choice in range(choices):
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


def build_app(served: ServedModel) -> FastAPI:
    """Make the application that serves a model.

    Args:
        served: Its worker is started and stopped with the application.
    """
    service, config = Service(served), served.config

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        served.worker.start()
        yield
        served.worker.stop()

    # Its pages would fetch scripts from elsewhere; the schema itself is at /openapi.json.
    app = FastAPI(title="moesaic", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.add_middleware(
        Guard,
        api_key=config.api_key,
        max_body_bytes=config.max_body_bytes,
        timeout_s=config.timeout_s,
    )
    app.add_middleware(Counting, requests=served.metrics.requests)
    add_error_handlers(app)

    @app.post("/v1/chat/completions", response_model=ChatCompletion, responses=_ERRORS)
    async def chat_completions(http: Request, request: ChatRequest) -> Response:
        return await service.chat(http, request)

    @app.post("/v1/completions", response_model=Completion, responses=_ERRORS)
    async def completions(http: Request, request: CompletionRequest) -> Response:
        return await service.complete(http, request)

    @app.get("/v1/models")
    async def models() -> ModelList:
        return ModelList(data=[served.card])

    @app.get("/v1/models/{name:path}", responses=_ERRORS)
    async def model(name: str) -> Model:
        service.check_name(name)
        return served.card

    @app.get("/health", responses=_ERRORS)
    async def health() -> dict[str, str]:
        """Whether the process can still answer; if not, it has to be restarted."""
        if not served.worker.alive:
            raise ApiError(503, "the worker died; restart the server")
        return {"status": "ok"}

    @app.get("/ready", responses=_ERRORS)
    async def ready() -> dict[str, str]:
        """Whether a request would be taken now."""
        await health()
        if served.worker.num_present >= served.worker.room:
            raise ApiError(503, "the server has as many requests as it takes")
        return {"status": "ready"}

    @app.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        return Response(
            generate_latest(served.metrics.registry), headers={"Content-Type": CONTENT_TYPE_LATEST}
        )

    return app
