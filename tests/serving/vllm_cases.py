"""vLLM in an environment of its own: where it is, and what it writes for a checkpoint."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
# The environment variable that names its Python; else where `make vllm-env` puts it.
VARIABLE = "MOESAIC_VLLM_PYTHON"
PYTHON = Path(os.environ.get(VARIABLE) or ROOT / ".venv-vllm" / "bin" / "python")

needs_vllm = pytest.mark.skipif(
    not os.access(PYTHON, os.X_OK),
    reason=f"vLLM is not installed; `make vllm-env` does, or {VARIABLE} names its Python",
)

_WRITE = """
import json, sys
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    model = LLM(asked["model"], skip_tokenizer_init=True, enforce_eager=True, **asked["options"])
    prompts = [{"prompt_token_ids": ids} for ids in asked["prompts"]]
    sampling = SamplingParams(
        temperature=0, max_tokens=asked["tokens"], logprobs=0, ignore_eos=True, detokenize=False
    )
    found = []
    for out in model.generate(prompts, sampling, use_tqdm=False):
        (text,) = out.outputs
        steps = zip(text.token_ids, text.logprobs, strict=True)
        found.append([list(text.token_ids), [step[token].logprob for token, step in steps]])
    with open(asked["out"], "w") as file:
        json.dump(found, file)
"""


class Text(NamedTuple):
    """Greedy tokens after a prompt and their log-probabilities."""

    tokens: list[int]
    logprobs: list[float]


def run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a script where vLLM is, on the processor and with our source."""
    own = {
        "PYTHONPATH": str(ROOT / "src"),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        # Without compilers of its own and in one process: a tiny model is not worth either.
        "TORCH_COMPILE_DISABLE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
    }
    return subprocess.run(
        [str(PYTHON), "-c", script, *arguments],
        env={**os.environ, **own},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )


def written(model: Path, prompts: list[list[int]], new_tokens: int, **options: Any) -> list[Text]:
    """What vLLM writes after each prompt, all of them at once."""
    out = model.parent / f"{model.name}.json"
    asked = {"model": str(model), "prompts": prompts, "tokens": new_tokens, "out": str(out)}
    values = {"dtype": "float32", "max_model_len": 64, **options}
    found = run(_WRITE, json.dumps({**asked, "options": values}))
    assert found.returncode == 0, found.stdout[-2000:] + found.stderr[-4000:]
    return [Text(*each) for each in json.loads(out.read_text())]
