"""The process: a socket, a server on it, and an end that lets running requests finish."""

from __future__ import annotations

import signal
import socket
from collections.abc import Callable

import uvicorn

from moesaic._errors import InputError
from moesaic.serving.app import build_app
from moesaic.serving.config import ServeConfig
from moesaic.serving.model import ServedModel


def open_socket(config: ServeConfig) -> socket.socket:
    """Take the address, before a model is loaded for it.

    Raises:
        InputError: If it is taken or not ours.
    """
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    try:
        listener = socket.create_server((config.host, config.port), family=family)
    except OSError as error:
        raise InputError(
            f"{config.host}:{config.port} cannot be listened on ({error.strerror}); choose another "
            "host or port"
        ) from error
    # Connections inherit it. Without it the first text of a stream waits until the client has
    # acknowledged the head of the answer, which takes 40 ms.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def make_server(served: ServedModel) -> uvicorn.Server:
    """Make the server of a model; its `run` takes the socket."""
    config = uvicorn.Config(
        build_app(served),
        log_level="warning",
        access_log=False,
        server_header=False,
        ws="none",
        timeout_graceful_shutdown=max(1, round(served.config.drain_s)),
    )
    return uvicorn.Server(config)


def serve(served: ServedModel, listener: socket.socket, ready: Callable[[str], None]) -> None:
    """Serve until SIGTERM or SIGINT; running requests then have `drain_s` seconds to end.

    Args:
        served: The model.
        listener: Where to listen; closed at the end.
        ready: Told the address of the API.
    """
    host, port = listener.getsockname()[:2]
    # uvicorn drains, and then raises the signal again for whoever came before: nobody.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    ready(f"http://{f'[{host}]' if ':' in host else host}:{port}/v1")
    make_server(served).run(sockets=[listener])
