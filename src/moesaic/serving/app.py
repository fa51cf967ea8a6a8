"""The application: which address answers what."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request, Response
from openai.types import Completion, Model
from openai.types.chat import ChatCompletion
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel

from moesaic.serving.errors import ApiError, ErrorAnswer, add_error_handlers
from moesaic.serving.guard import Guard
from moesaic.serving.metrics import Counting
from moesaic.serving.model import ServedModel
from moesaic.serving.schema import ChatRequest, CompletionRequest
from moesaic.serving.service import Service

_ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorAnswer},
    "5XX": {"model": ErrorAnswer},
}


class ModelList(BaseModel):
    """The models of a server."""

    object: str = "list"
    data: list[Model]


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
