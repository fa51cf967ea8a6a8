"""Many sequences written side by side: continuous batching over one decoder.

Every step reads one token of each sequence that is being written and, with the rows that are left,
the prompts of those that came later. A sequence that ends frees its slot of the cache for the next
one in line. A decoder's rows do not see their neighbours and every sequence draws from a generator
of its own, so what a sequence becomes does not depend on the others.

The scheduling is that of Orca (Yu et al., OSDI 2022, iteration-level scheduling) with prompts read
in parts, as in Sarathi-Serve, arXiv 2403.02310.

Shapes: T rows of a step, V vocabulary, L layers, E experts.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Tensor

from moesaic._errors import InputError
from moesaic.inference.engine import Sampling, choose
from moesaic.nn.operating_point import check_threshold


class Stepper(Protocol):
    """What a batch is decoded with: `Decoder`, or `PlainDecoder` for other models.

    Attributes:
        slots: Sequences that the cache holds.
        length: Positions that the cache holds for a sequence.
        num_layers: L.
        num_experts: E, the most that a layer has.
        any_rows: Whether a row comes out the same whatever rows stand beside it, so that prompts
            may be read in parts.
    """

    any_rows: bool
    slots: int
    length: int
    num_layers: int
    num_experts: int

    def step(
        self,
        ids_T: Tensor,
        slot_T: Tensor,
        position_T: Tensor,
        rows: Iterable[int],
        *,
        threshold_T: Tensor | None = None,
        used_LTE: Tensor | None = None,
    ) -> Tensor:
        """Read tokens and give logits after some of them; see `Decoder.step`."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A sequence to write.

    Attributes:
        prompt_T: Token ids, at least one.
        max_new_tokens: Tokens to write at most.
        stop: Tokens that end the text and are no part of it.
        sampling: How tokens are chosen.
        threshold: Of the sigmoid gates for this sequence; that of the model if none.
        num_likely: Likeliest tokens to give beside each chosen one, with log-probabilities; none
            for no log-probabilities at all.
    """

    prompt_T: Sequence[int]
    max_new_tokens: int
    stop: Collection[int] = ()
    sampling: Sampling = field(default_factory=Sampling)
    threshold: float | None = None
    num_likely: int | None = None

    def __post_init__(self) -> None:
        if not self.prompt_T:
            raise InputError("a prompt must have at least 1 token, got 0")
        if self.max_new_tokens < 1:
            raise InputError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if self.threshold is not None:
            check_threshold(self.threshold)

    @property
    def length(self) -> int:
        """Positions that it takes; the last token is not read."""
        return len(self.prompt_T) + self.max_new_tokens - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """What a step did for one sequence.

    Attributes:
        key: Of the sequence.
        token: The new token; none where a stop token ended the text.
        finish: Why the text ended with this step, if it did.
        logprob: Log-probability of the token before temperature and top-p; none if not asked for.
        likely: The likeliest tokens and their log-probabilities, best first.
        used_LE: Experts that the row which chose the token used, [L, E] uint8; none if the batch
            does not record them.
    """

    key: int
    token: int | None
    finish: Literal["stop", "length"] | None = None
    logprob: float | None = None
    likely: tuple[tuple[int, float], ...] = ()
    used_LE: Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What a step did.

    Attributes:
        written: Of the sequences that got a token or ended.
        keys: The sequence of every row, [T].
        used_LTE: Experts that every row used; none if the batch does not record them.
        prompt_rows: Rows that belonged to prompts.
    """

    written: list[Written]
    keys: list[int]
    used_LTE: Tensor | None
    prompt_rows: int


@dataclass(slots=True)
class _Running:
    key: int
    job: Job
    slot: int
    draws: torch.Generator
    num_read: int = 0
    new_T: list[int] = field(default_factory=list)

    def unread(self, most: int) -> list[int]:
        """The next tokens to read, at most so many."""
        rest = self.job.prompt_T[self.num_read : self.num_read + most]
        return list(rest) if rest else [self.new_T[-1]]


class Batch:
    """Writes many sequences at once.

    Not safe for threads: one thread adds, removes and steps.

    Args:
        decoder: Its slots bound the sequences written at once.
        max_rows: Rows of a step: the smaller, the less a long prompt delays the others.
        record: Whether to tell the experts that each row used.
    """

    def __init__(self, decoder: Stepper, *, max_rows: int = 256, record: bool = False) -> None:
        if max_rows < decoder.slots:
            raise InputError(
                f"max_rows must be at least slots={decoder.slots}, got {max_rows}; a step reads a "
                "token of every sequence"
            )
        self.decoder = decoder
        self.max_rows = max_rows
        self.record = record
        self._free = list(range(decoder.slots))
        self._waiting: deque[tuple[int, Job]] = deque()
        # In the order they came.
        self._running: dict[int, _Running] = {}

    @property
    def num_running(self) -> int:
        """Sequences that hold a slot."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Sequences in line for a slot."""
        return len(self._waiting)

    def add(self, key: int, job: Job) -> None:
        """Put a sequence in line.

        Raises:
            InputError: If it cannot fit, or its key is in use.
        """
        if job.length > self.decoder.length:
            raise InputError(
                f"prompt and new tokens take {job.length} positions, more than the "
                f"{self.decoder.length} of this decoder; make it with a larger length"
            )
        if key in self._running or any(key == other for other, _ in self._waiting):
            raise InputError(f"key {key} is in use; number sequences apart")
        self._waiting.append((key, job))

    def remove(self, key: int) -> None:
        """Forget a sequence, wherever it is, and free its slot; nothing if it has ended."""
        running = self._running.pop(key, None)
        if running is not None:
            self._free.append(running.slot)
        else:
            self._waiting = deque(entry for entry in self._waiting if entry[0] != key)

    def step(self) -> Step | None:
        """Read and write for every sequence that has a slot; none if there is nothing to do."""
        while self._free and self._waiting:
            key, job = self._waiting.popleft()
            draws = torch.Generator().manual_seed(job.sampling.seed)
            self._running[key] = _Running(key, job, self._free.pop(), draws)
        if not self._running:
            return None
        parts = self._rows()
        num_rows = sum(len(ids) for _, ids in parts)
        slots = [running.slot for running, ids in parts for _ in ids]
        positions = [running.num_read + i for running, ids in parts for i in range(len(ids))]
        prompt_rows = sum(len(ids) for running, ids in parts if not running.new_T)
        used_LTE = None
        if self.record:
            shape = (self.decoder.num_layers, num_rows, self.decoder.num_experts)
            used_LTE = torch.empty(shape, dtype=torch.uint8)
        thresholds = [running.job.threshold for running, ids in parts for _ in ids]
        threshold_T = None
        if any(threshold is not None for threshold in thresholds):
            own = [math.nan if threshold is None else threshold for threshold in thresholds]
            threshold_T = torch.tensor(own, dtype=torch.float64)
        last = -1
        chosen: list[tuple[_Running, int]] = []
        for running, ids in parts:
            last += len(ids)
            running.num_read += len(ids)
            if running.num_read >= len(running.job.prompt_T):
                chosen.append((running, last))
        logits_RV = self.decoder.step(
            torch.tensor([token for _, ids in parts for token in ids], dtype=torch.int64),
            torch.tensor(slots),
            torch.tensor(positions),
            [row for _, row in chosen],
            threshold_T=threshold_T,
            used_LTE=used_LTE,
        )
        keys = [running.key for running, ids in parts for _ in ids]
        written = [
            self._write(running, logits_V, None if used_LTE is None else used_LTE[:, row])
            for (running, row), logits_V in zip(chosen, logits_RV, strict=True)
        ]
        return Step(written=written, keys=keys, used_LTE=used_LTE, prompt_rows=prompt_rows)

    def _rows(self) -> list[tuple[_Running, list[int]]]:
        """The tokens of this step: one of each sequence being written, then parts of prompts."""
        writing = [running for running in self._running.values() if running.new_T]
        parts = [(running, running.unread(1)) for running in writing]
        room = self.max_rows - len(parts)
        for running in self._running.values():
            if room > 0 and not running.new_T:
                most = room if self.decoder.any_rows else len(running.job.prompt_T)
                parts.append((running, running.unread(most)))
                room -= len(parts[-1][1])
        return parts

    def _write(self, running: _Running, logits_V: Tensor, used_LE: Tensor | None) -> Written:
        job, key = running.job, running.key
        token = choose(logits_V, job.sampling, running.draws)
        if token in job.stop:
            self.remove(key)
            return Written(key=key, token=None, finish="stop", used_LE=used_LE)
        running.new_T.append(token)
        logprob: float | None = None
        likely: tuple[tuple[int, float], ...] = ()
        if job.num_likely is not None:
            logprobs_V = logits_V.log_softmax(0)
            logprob = float(logprobs_V[token])
            top = logprobs_V.topk(min(job.num_likely, len(logprobs_V)))
            likely = tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True))
        finish: Literal["length"] | None = None
        if len(running.new_T) == job.max_new_tokens:
            self.remove(key)
            finish = "length"
        return Written(
            key=key, token=token, finish=finish, logprob=logprob, likely=likely, used_LE=used_LE
        )
