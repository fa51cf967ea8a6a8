"""vLLM behind a pipe, for measurements and tests: run by `process.py` where vLLM is installed.

It reads a JSON document a line and answers each with one, through a pipe of its own, because vLLM
logs to both of the usual ones.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any


def main() -> None:
    """Load a model, then answer until the input ends."""
    from vllm import LLM

    answers = os.fdopen(int(sys.argv[2]), "w")
    model = LLM(**json.loads(sys.argv[1]), skip_tokenizer_init=True, enforce_eager=True)
    for line in sys.stdin:
        asked = json.loads(line)
        answer = _answer(model, **asked)
        print(json.dumps(answer), file=answers, flush=True)


def _answer(
    model: Any, *, prompts: list[list[int]], new_tokens: int, logprobs: bool, score: bool
) -> list[list[Any]]:
    """For every prompt: greedy tokens, and log-probabilities of them and of the prompt if asked."""
    from vllm import SamplingParams

    sampling = SamplingParams(
        temperature=0,
        max_tokens=new_tokens,
        logprobs=0 if logprobs else None,
        prompt_logprobs=0 if score else None,
        ignore_eos=True,
        detokenize=False,
    )
    asked = [{"prompt_token_ids": ids} for ids in prompts]
    answers = []
    for ids, out in zip(prompts, model.generate(asked, sampling, use_tqdm=False), strict=True):
        (text,) = out.outputs
        tokens = list(text.token_ids)
        new = _of(tokens, text.logprobs) if logprobs else []
        # The first token is predicted by nothing.
        old = _of(ids[1:], out.prompt_logprobs[1:]) if score else []
        answers.append([tokens, new, old])
    return answers


def _of(tokens: list[int], steps: Any) -> list[float]:
    return [step[token].logprob for token, step in zip(tokens, steps, strict=True)]


if __name__ == "__main__":
    main()
