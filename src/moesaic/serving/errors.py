"""Errors in the form of OpenAI's protocol: nothing else leaves the server."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from moesaic._errors import InputError
from moesaic.serving.worker import BusyError, WorkerError


class ErrorBody(BaseModel):
    """What went wrong.

    Attributes:
        message: One sentence.
        type: Kind of error.
        param: The field of the request that is wrong, if one is.
        code: A name for programs, if there is one.
    """

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorAnswer(BaseModel):
    """The body of every answer that is an error."""

    error: ErrorBody


class ApiError(Exception):
    """An error with the status and the fields of its answer."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = dict(headers or {})
        # What a client wrote may hold half a character, which no answer can.
        message = message.encode("utf-8", "replace").decode()
        param = param and param.encode("utf-8", "replace").decode()
        self.body = ErrorAnswer(
            error=ErrorBody(message=message, type=_kind(status), param=param, code=code)
        )

    def response(self) -> JSONResponse:
        """The answer."""
        return JSONResponse(
            self.body.model_dump(), status_code=self.status, headers=self.headers or None
        )


def _kind(status: int) -> str:
    if status == 401:
        return "authentication_error"
    if status == 429:
        return "rate_limit_error"
    return "server_error" if status >= 500 else "invalid_request_error"


def as_api_error(error: Exception) -> ApiError:
    """Give an error of the library or of the framework its form."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, InputError):
        return ApiError(400, str(error))
    if isinstance(error, BusyError):
        return ApiError(
            429,
            "the server has as many requests as it takes; try again in a moment",
            code="server_busy",
            headers={"Retry-After": "1"},
        )
    if isinstance(error, TimeoutError):
        return ApiError(
            503, "the request took longer than this server lets it; ask for less", code="timeout"
        )
    if isinstance(error, WorkerError):
        return ApiError(500, "the server can answer no more requests; it has to be restarted")
    if isinstance(error, RequestValidationError):
        return _invalid(error)
    if isinstance(error, HTTPException):
        return ApiError(error.status_code, str(error.detail), headers=error.headers)
    return ApiError(500, "the server failed; its log says more")


def _invalid(error: RequestValidationError) -> ApiError:
    first: dict[str, Any] = error.errors()[0]
    # The first part says where the request keeps it, not what its name is.
    where = ".".join(str(part) for part in first["loc"][1:])
    message = str(first["msg"]).removeprefix("Value error, ")
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is not JSON: {first['ctx']['error']}")
    return ApiError(400, f"{where}: {message}" if where else message, param=where or None)


def add_error_handlers(app: FastAPI) -> None:
    """Answer every error in this form."""

    async def handle(request: Request, error: Exception) -> JSONResponse:
        return as_api_error(error).response()

    for kind in (
        *(ApiError, InputError, BusyError, WorkerError, TimeoutError),
        *(RequestValidationError, HTTPException, Exception),
    ):
        app.add_exception_handler(kind, handle)
