"""Servers in processes of their own, on loopback, while a block lasts."""

from __future__ import annotations

import os
import socket
import subprocess
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from moesaic._errors import RunError
from moesaic.serving.vllm.process import end, last_words


class Server(NamedTuple):
    """A server that answers.

    Attributes:
        address: Without a path.
        process: Of it.
    """

    address: str
    process: subprocess.Popen[bytes]


@contextmanager
def running(
    command: Callable[[int], list[str]],
    log: Path,
    *,
    name: str,
    environment: Mapping[str, str] | None = None,
) -> Iterator[Server]:
    """Run a server until the block ends, and wait until `/health` says that it is ready.

    Args:
        command: Starts it on a port of 127.0.0.1.
        log: File for what it says.
        name: Of the program.
        environment: Variables beside those of this process.

    Raises:
        RunError: With what it said last, if it ends before it is ready.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with log.open("w") as output:
        process = subprocess.Popen(
            command(port),
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(environment or {})},
        )
    try:
        address = f"http://127.0.0.1:{port}"
        _wait(process, address, log, name)
        yield Server(address, process)
    finally:
        end(process)


def _wait(process: subprocess.Popen[bytes], address: str, log: Path, name: str) -> None:
    """Ask until it is ready; one question takes as long as it may."""
    while True:
        if process.poll() is not None:
            said = last_words(log.read_text())
            raise RunError(f"{name} ended with code {process.returncode}: {said}")
        try:
            with urllib.request.urlopen(f"{address}/health", timeout=60):
                return
        except (urllib.error.URLError, ConnectionError):
            try:
                process.wait(timeout=0.2)
            except subprocess.TimeoutExpired:
                continue
