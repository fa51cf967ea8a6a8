"""vLLM in an environment of its own, since it wants other versions than ours, driven from here."""

from __future__ import annotations

import json
import os
import re
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import psutil

from moesaic._errors import RunError

# Environment variable with the path of its Python; else the one that `make vllm-env` makes here.
VARIABLE = "MOESAIC_VLLM_PYTHON"
_DEFAULT = Path(".venv-vllm", "bin", "python")
_ON_CPU = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    # It would bind its threads to cores of its choice, and keep one for itself.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    # One process, where it does not serve.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    # No compiler for the little that eager mode still compiles.
    "TORCH_COMPILE_DISABLE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
# For a program that was told to end, and then for those that it started.
_GRACE_S = 30


class Written(NamedTuple):
    """What vLLM wrote after a prompt.

    Attributes:
        tokens: Greedy tokens.
        logprobs: Of them, if asked for.
        prompt_logprobs: Of the tokens of the prompt after the first, if asked for.
    """

    tokens: list[int]
    logprobs: list[float]
    prompt_logprobs: list[float]


def find() -> Path:
    """Tell where the Python of vLLM's environment is, or would be."""
    named = os.environ.get(VARIABLE)
    return Path(named) if named else _DEFAULT


def why_not() -> str:
    """Say why vLLM cannot be started; empty if nothing speaks against it."""
    if os.access(find(), os.X_OK):
        return ""
    return f"not installed; `make vllm-env` in a checkout, or name its Python in {VARIABLE}"


def last_words(log: str) -> str:
    """Give the last error that the log of a program names, else its last line."""
    lines = [line.strip() for line in log.splitlines() if line.strip()] or ["nothing"]
    errors = [line for line in lines if re.search(r"error[:,] ", line, re.IGNORECASE)]
    return (errors or lines)[-1]


def end(process: subprocess.Popen[Any]) -> None:
    """End a process and every process that it started."""
    family = []
    if process.poll() is None:
        family = psutil.Process(process.pid).children(recursive=True)
        process.terminate()
    try:
        process.wait(_GRACE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    _, left = psutil.wait_procs(family, timeout=_GRACE_S)
    for each in left:
        each.kill()


def environment(threads: int) -> dict[str, str]:
    """Variables of vLLM on a CPU.

    Args:
        threads: Of its arithmetic.
    """
    return {**_ON_CPU, "OMP_NUM_THREADS": str(threads)}


def serve_command(
    model: Path, port: int, *, name: str, dtype: str, length: int, options: Sequence[str] = ()
) -> list[str]:
    """Give the command of `vllm serve` on loopback.

    Args:
        model: Directory of the model, its tokenizer beside it.
        port: To listen on.
        name: What clients call it.
        dtype: Of its weights.
        length: Positions of a sequence.
        options: Further ones.
    """
    start = [str(find()), "-m", "vllm.entrypoints.cli.main", "serve", str(model.resolve())]
    start += ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", name]
    start += ["--dtype", dtype, "--max-model-len", str(length), "--enforce-eager"]
    return [*start, *options]


class VllmProcess:
    """A model in vLLM, in a process that ends with the context.

    Args:
        model: Directory of the model.
        dtype: Of its weights.
        length: Positions of a sequence.
        threads: Of its arithmetic.
        options: Further arguments of `vllm.LLM`.

    Raises:
        RunError: With what vLLM said last, if it cannot load the model.
    """

    def __init__(
        self, model: Path, *, dtype: str, length: int, threads: int = 1, **options: Any
    ) -> None:
        settings = {"model": str(model.resolve()), "dtype": dtype, "max_model_len": length}
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - it lives as long as the process
        read, write = os.pipe()
        command = [str(find()), "-m", "moesaic.serving.vllm.worker"]
        self._process = subprocess.Popen(
            [*command, json.dumps({**settings, **options}), str(write)],
            stdin=subprocess.PIPE,
            stdout=self._log,
            stderr=self._log,
            text=True,
            pass_fds=[write],
            env={**os.environ, **environment(threads)},
        )
        os.close(write)
        self._answers = os.fdopen(read)
        # The first answer comes once the model is loaded.
        try:
            self.write([[0]], 1)
        except RunError:
            self.close()
            raise

    def write(
        self,
        prompts: Sequence[Sequence[int]],
        new_tokens: int,
        *,
        logprobs: bool = False,
        score: bool = False,
    ) -> list[Written]:
        """Continue prompts greedily, all at once, to a fixed length.

        Args:
            prompts: Token ids.
            new_tokens: After each, end tokens among them.
            logprobs: Whether the log-probabilities of new tokens are wanted.
            score: Whether those of the prompts are.

        Raises:
            RunError: With what vLLM said last, if it gave no answer.
        """
        asked = {"prompts": [list(ids) for ids in prompts], "new_tokens": new_tokens}
        assert self._process.stdin is not None
        try:
            print(
                json.dumps({**asked, "logprobs": logprobs, "score": score}),
                file=self._process.stdin,
                flush=True,
            )
            line = self._answers.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise RunError(f"vLLM gave no answer: {self._last_words()}")
        return [Written(*each) for each in json.loads(line)]

    def _last_words(self) -> str:
        self._process.wait()
        self._log.seek(0)
        return last_words(self._log.read())

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        end(self._process)
        self._process.stdin.close()
        self._answers.close()
        self._log.close()

    def __enter__(self) -> VllmProcess:
        """Give itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End the process."""
        self.close()
