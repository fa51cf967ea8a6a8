"""What a request must pass before it is read: the key, and the size of its body."""

from __future__ import annotations

import asyncio
import hmac

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from moesaic.serving.errors import ApiError


class Guard:
    """Refuses requests without the key, and bodies that are too large or come too slowly.

    Args:
        app: What comes next.
        api_key: Asked for below /v1; none if empty.
        max_body_bytes: Size of a body.
        timeout_s: Seconds that a body may take to arrive.
    """

    def __init__(
        self, app: ASGIApp, *, api_key: str, max_body_bytes: int, timeout_s: float
    ) -> None:
        self._app = app
        self._key = api_key.encode()
        self._max_body_bytes = max_body_bytes
        self._timeout_s = timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            self._check_key(scope)
            body = await self._read(scope, receive)
        except ApiError as error:
            answer = error.response()
            # What is left of the body is not read, so the connection is of no further use.
            answer.headers["Connection"] = "close"
            await answer(scope, receive, send)
            return
        if body is None:
            return
        given = False

        async def replay() -> Message:
            nonlocal given
            if given:
                return await receive()
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self._app(scope, replay, send)

    def _check_key(self, scope: Scope) -> None:
        if not self._key or not scope["path"].startswith("/v1"):
            return
        said = Headers(scope=scope).get("authorization", "")
        kind, _, key = said.partition(" ")
        if kind.lower() != "bearer" or not hmac.compare_digest(key.strip().encode(), self._key):
            raise ApiError(
                401,
                "this server asks for its key, as `Authorization: Bearer KEY`",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    async def _read(self, scope: Scope, receive: Receive) -> bytes | None:
        """The whole body; none if the client left."""
        said = Headers(scope=scope).get("content-length", "0")
        # A number too long to be one is left to the parser of HTTP.
        if len(said) < 20 and said.isascii() and said.isdecimal():
            self._check_size(int(said))
        body = bytearray()
        try:
            async with asyncio.timeout(self._timeout_s):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    body += message.get("body", b"")
                    self._check_size(len(body))
                    if not message.get("more_body", False):
                        return bytes(body)
        except TimeoutError:
            raise ApiError(
                408, f"the body did not arrive within {self._timeout_s:g} seconds", code="timeout"
            ) from None

    def _check_size(self, num_bytes: int) -> None:
        if num_bytes > self._max_body_bytes:
            raise ApiError(
                413,
                f"the body has more than {self._max_body_bytes} bytes, the most that this server "
                "takes",
                code="body_too_large",
            )
