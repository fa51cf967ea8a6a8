"""Greedy or sampled text, token by token, from a packed model.

It knows token ids alone; text and chat templates live outside.

Shapes: T tokens, V vocabulary, L layers.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moesaic._errors import InputError
from moesaic.inference.decoder import MAX_ROWS, Decoder
from moesaic.ops.cpu.packed import Format


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: 0 takes the most likely token.
        top_p: Smallest probability mass that is sampled from.
        seed: Of the draws; those of one sequence do not depend on any other.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.temperature >= 0.0:
            raise InputError(f"temperature must be at least 0, got {self.temperature}; 0 is greedy")
        if not 0.0 < self.top_p <= 1.0:
            raise InputError(f"top_p must be in (0, 1], got {self.top_p}; 1 samples from all")


class Engine:
    """Writes one sequence at a time.

    Args:
        model: See `Decoder`.
        weight_format: See `Decoder`.
        length: Positions of a sequence, prompt included.
        release: See `Decoder`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        weight_format: Format | None = None,
        length: int = 2048,
        release: bool = False,
    ) -> None:
        self.decoder = Decoder(model, weight_format=weight_format, length=length, release=release)

    def prefill(self, ids_T: Sequence[int], *, start: int = 0) -> Tensor:
        """Read tokens from a position on; gives the logits [V] after the last.

        Raises:
            InputError: If there is no token, or they do not fit.
        """
        if not ids_T:
            raise InputError("a prompt must have at least 1 token, got 0")
        self._check(len(ids_T) + start)
        ids = torch.tensor(ids_T, dtype=torch.int64)
        slot_T = torch.zeros_like(ids)
        position_T = torch.arange(start, start + len(ids))
        logits_V: Tensor | None = None
        for at in range(0, len(ids), MAX_ROWS):
            part = slice(at, at + MAX_ROWS)
            last = [len(ids[part]) - 1] if at + MAX_ROWS >= len(ids) else []
            out_RV = self.decoder.step(ids[part], slot_T[part], position_T[part], last)
            logits_V = out_RV[0] if last else None
        assert logits_V is not None
        return logits_V

    def stream(
        self,
        prompt_T: Sequence[int],
        max_new_tokens: int,
        *,
        stop: Collection[int] = (),
        sampling: Sampling | None = None,
    ) -> Iterator[int]:
        """Give new tokens as they come, up to and without the first of `stop`.

        Raises:
            InputError: If prompt and new tokens do not fit.
        """
        if max_new_tokens < 1:
            raise InputError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        self._check(len(prompt_T) + max_new_tokens - 1)
        sampling = sampling or Sampling()
        draws = torch.Generator().manual_seed(sampling.seed)
        logits_V = self.prefill(prompt_T)
        for i in range(max_new_tokens):
            token = choose(logits_V, sampling, draws)
            if token in stop:
                return
            yield token
            if i + 1 < max_new_tokens:
                logits_V = self.prefill([token], start=len(prompt_T) + i)

    def generate(
        self,
        prompt_T: Sequence[int],
        max_new_tokens: int,
        *,
        stop: Collection[int] = (),
        sampling: Sampling | None = None,
    ) -> list[int]:
        """Give all new tokens; see `stream`."""
        return list(self.stream(prompt_T, max_new_tokens, stop=stop, sampling=sampling))

    def _check(self, length: int) -> None:
        if length > self.decoder.length:
            raise InputError(
                f"prompt and new tokens take {length} positions, more than the "
                f"{self.decoder.length} of this engine; make it with a larger length"
            )


def choose(logits_V: Tensor, sampling: Sampling, draws: torch.Generator) -> int:
    """Choose the next token."""
    if sampling.temperature == 0.0:
        return int(logits_V.argmax())
    # The best is zero whatever divides it, so no temperature makes it infinite.
    temperature = max(sampling.temperature, torch.finfo(logits_V.dtype).tiny)
    probs_V = ((logits_V - logits_V.max()) / temperature).softmax(0)
    if sampling.top_p < 1.0:
        sorted_V, order_V = probs_V.sort(descending=True)
        # The token that crosses the mass is still in, and the first always.
        sorted_V[1:][(sorted_V.cumsum(0) - sorted_V)[1:] >= sampling.top_p] = 0.0
        probs_V = torch.zeros_like(probs_V).scatter(0, order_V, sorted_V)
    return int(torch.multinomial(probs_V, 1, generator=draws))
