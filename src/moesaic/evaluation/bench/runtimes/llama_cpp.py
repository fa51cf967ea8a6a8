"""llama.cpp as a runtime: its server on loopback, and its own measure of perplexity.

Shapes: N chunks, S tokens of a chunk.
"""

from __future__ import annotations

import json
import re
import subprocess
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from moesaic._errors import RunError
from moesaic.evaluation.bench.llama_cpp import find
from moesaic.evaluation.bench.runtimes._base import SPARE_CHUNKS, Ids, Runtime
from moesaic.evaluation.bench.servers import running

_SECONDS = 900


class LlamaCpp(Runtime):
    """A GGUF file in `llama-server`, and in `llama-perplexity` for its loss.

    Args:
        model: The file.
        text: The text that chunks are cut from, which the program cuts into tokens by itself.
        length: Positions of a sequence.
        requests: Sequences at once.
        threads: Of its arithmetic.

    Raises:
        RunError: If the server does not start.
    """

    def __init__(
        self, model: Path, text: Path, *, length: int, requests: int, threads: int
    ) -> None:
        self.model, self.text, self.threads, self.requests = model, text, threads, requests
        options = ["-c", str(length * requests), "-np", str(requests), "-t", str(threads)]
        self._open = ExitStack()
        log = model.with_suffix(".log")
        self.address = self._open.enter_context(server(model, log, *options, "-tb", str(threads)))
        self._pool = self._open.enter_context(ThreadPoolExecutor(requests))

    def write(self, prompts: Ids, new_tokens: int) -> list[list[int]]:
        """Continue prompts as requests at once."""
        return list(self._pool.map(lambda ids: continued(self.address, ids, new_tokens), prompts))

    def nll(self, chunks_NS: Tensor) -> float:
        """Mean loss of the second half of each chunk, by `llama-perplexity`."""
        num_chunks, length = chunks_NS.shape
        options = ["--chunks", str(num_chunks + SPARE_CHUNKS), "-t", str(self.threads)]
        found = perplexities(self.model, self.text, length, *options)
        if num_chunks not in found:
            raise RunError(
                f"llama-perplexity told of {len(found)} chunks of {num_chunks}; give more text"
            )
        return float(np.log(found[num_chunks]))

    def tokens(self, text: str) -> list[int]:
        """The tokens that it cuts text into."""
        found: list[int] = ask(self.address, "tokenize", content=text)["tokens"]
        return found

    def close(self) -> None:
        """End the server."""
        self._open.close()


@contextmanager
def server(model: Path, log: Path, *options: str) -> Iterator[str]:
    """Run `llama-server` on loopback while the block lasts; gives its address.

    Raises:
        RunError: If it ends before it is ready.
    """

    def command(port: int) -> list[str]:
        start = [str(find("llama-server")), "-m", str(model), "--host", "127.0.0.1"]
        return [*start, "--port", str(port), "--no-warmup", *options]

    with running(command, log, name="llama-server") as started:
        yield started.address


def ask(address: str, path: str, **body: Any) -> dict[str, Any]:
    """Post JSON and read JSON."""
    request = urllib.request.Request(
        f"{address}/{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=_SECONDS) as answer:
        found: dict[str, Any] = json.loads(answer.read())
    return found


def continued(address: str, ids: Any, new_tokens: int) -> list[int]:
    """Greedy tokens after a prompt."""
    answer = ask(
        address,
        "completion",
        prompt=list(ids),
        n_predict=new_tokens,
        temperature=0.0,
        samplers=["temperature"],
        ignore_eos=True,
        return_tokens=True,
        cache_prompt=False,
    )
    found: list[int] = answer["tokens"]
    return found


def perplexities(model: Path, text: Path, context: int, *options: str) -> dict[int, float]:
    """Perplexity of the first chunk, of the first two and so on, by `llama-perplexity`.

    The last ones may be missing: it writes them in a thread that its end may cut short.

    Raises:
        RunError: If it fails or says no perplexity.
    """
    command = [str(find("llama-perplexity")), "-m", str(model), "-f", str(text)]
    command += ["-c", str(context), "-b", str(context), "--no-warmup", *options]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
    except (subprocess.TimeoutExpired, OSError) as error:
        raise RunError(f"llama-perplexity did not run: {error}") from error
    found = re.findall(r"\[(\d+)\]([\d.]+),", run.stdout)
    if run.returncode or not found:
        last = (run.stderr.strip().splitlines() or ["no message"])[-1]
        raise RunError(f"llama-perplexity failed with code {run.returncode}: {last}")
    return {int(chunks): float(value) for chunks, value in found}
