"""The runtimes of this process: transformers, and our engine.

Shapes: N chunks, S tokens of a chunk, B prompts, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moesaic.evaluation.bench.runtimes._base import Ids, Runtime, first_scored, half_nll, mean
from moesaic.inference.batching import Batch, Job
from moesaic.inference.decoder import Decoder


class Transformers(Runtime):
    """transformers' own generation.

    Args:
        model: Of its own classes or of ours.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model: Any = model.eval()

    @torch.inference_mode()
    def write(self, prompts: Ids, new_tokens: int) -> list[list[int]]:
        """Continue prompts as one batch."""
        ids_BS = torch.tensor(prompts)
        out_BS = self.model.generate(
            input_ids=ids_BS,
            attention_mask=torch.ones_like(ids_BS),
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=0,
        )
        new: list[list[int]] = out_BS[:, ids_BS.shape[1] :].tolist()
        return new

    @torch.inference_mode()
    def nll(self, chunks_NS: Tensor) -> float:
        """Mean loss of the second half of each chunk."""
        length = chunks_NS.shape[1]
        kept = length - first_scored(length) + 1
        losses = []
        for chunk_S in chunks_NS:
            out = self.model(input_ids=chunk_S[None], use_cache=False, logits_to_keep=kept)
            losses.append(half_nll(out.logits[0, :-1], chunk_S))
        return mean(losses)

    def close(self) -> None:
        """Do nothing: memory goes with the object."""


class OurEngine(Runtime):
    """Our decoder with continuous batching.

    Args:
        model: Dense or converted.
        length: Positions of a sequence.
        requests: Sequences at once.
    """

    def __init__(self, model: PreTrainedModel, *, length: int, requests: int) -> None:
        self.decoder = Decoder(model, length=length, slots=requests)

    def write(self, prompts: Ids, new_tokens: int) -> list[list[int]]:
        """Continue prompts side by side."""
        batch = Batch(self.decoder)
        for key, ids in enumerate(prompts):
            batch.add(key, Job(prompt_T=list(ids), max_new_tokens=new_tokens))
        new: list[list[int]] = [[] for _ in prompts]
        while (step := batch.step()) is not None:
            for each in step.written:
                assert each.token is not None, "no token ends a job without stop tokens"
                new[each.key].append(each.token)
        return new

    def nll(self, chunks_NS: Tensor) -> float:
        """Mean loss of the second half of each chunk."""
        length = chunks_NS.shape[1]
        position_T = torch.arange(length)
        rows = range(first_scored(length) - 1, length - 1)
        losses = [
            half_nll(
                self.decoder.step(chunk_S, torch.zeros_like(position_T), position_T, rows), chunk_S
            )
            for chunk_S in chunks_NS
        ]
        return mean(losses)

    def close(self) -> None:
        """Do nothing: memory goes with the object."""
