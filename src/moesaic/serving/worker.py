"""The thread that writes: requests come in from the event loop, pieces of text go back to it.

Everything that touches the batch happens on the worker's thread; everything that touches an
answer, on the event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import queue
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from types import TracebackType

from moesaic.inference.activity import ActiveShare
from moesaic.inference.batching import Batch, Job, Step
from moesaic.serving.text import Piece, TextStream

logger = logging.getLogger(__name__)

Observer = Callable[[Step], None]


class BusyError(Exception):
    """There is no room for a request."""


class WorkerError(Exception):
    """The thread died of an error that its log tells; no request can be answered any more."""


@dataclass(slots=True)
class Use:
    """What a sequence cost.

    Attributes:
        prompt_tokens: Tokens of its prompt.
        new_tokens: Tokens written.
        rows: Tokens that went through the model.
        active: Sum of their active fractions.
        experts: Sum of the experts that they used, the mean over routed layers.
    """

    prompt_tokens: int
    new_tokens: int = 0
    rows: int = 0
    active: float = 0.0
    experts: float = 0.0


@dataclass(slots=True)
class _Ticket:
    key: int
    index: int
    job: Job
    text: TextStream
    answer: Answer
    use: Use


_Part = tuple[int, Piece]


class Answer:
    """The sequences of one request; leaving the context forgets those that still run."""

    def __init__(self, worker: Worker) -> None:
        self.uses: list[Use] = []
        self._worker = worker
        self._open: dict[int, int] = {}
        self._parts: asyncio.Queue[_Part | WorkerError] = asyncio.Queue()

    def __enter__(self) -> Answer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    async def parts(self, timeout_s: float) -> AsyncIterator[_Part]:
        """Give pieces as they come, each with the index of its sequence, until all have ended.

        Args:
            timeout_s: Seconds from now that all of it may take.

        Raises:
            TimeoutError: If it takes longer.
            WorkerError: If the worker died.
        """
        deadline = asyncio.get_running_loop().time() + timeout_s
        left = set(range(len(self.uses)))
        while left:
            # Around nothing but the wait: a client that reads slowly is no reason to cut it off.
            async with asyncio.timeout_at(deadline):
                part = await self._parts.get()
            if isinstance(part, WorkerError):
                raise part
            index, piece = part
            if piece.finish is not None:
                left.discard(index)
            yield index, piece

    def close(self) -> None:
        """Forget the sequences that still run; their slots are free for others."""
        for key in self._open.values():
            self._worker.forget(key)
        self._open = {}

    def expect(self, key: int, use: Use) -> int:
        """Note a sequence under way; gives its index."""
        index = len(self.uses)
        self.uses.append(use)
        self._open[index] = key
        return index

    def put(self, part: _Part | WorkerError) -> None:
        """Take in a part, on the event loop."""
        if not isinstance(part, WorkerError) and part[1].finish is not None:
            key = self._open.pop(part[0], None)
            if key is not None:
                self._worker.leave(key)
        self._parts.put_nowait(part)


class Worker:
    """Runs a batch on a thread of its own.

    Args:
        batch: Nobody else may use it.
        room: Sequences that may be in the house, waiting ones included.
        share: Of the model; tells what answers used. None for a batch that does not record.
        observe: Told of every step, on the worker's thread.
    """

    def __init__(
        self,
        batch: Batch,
        *,
        room: int,
        share: ActiveShare | None = None,
        observe: Observer | None = None,
    ) -> None:
        self.batch = batch
        self.room = room
        self._share = share
        self._observe = observe
        self._numbers = itertools.count()
        self._present: set[int] = set()
        self._inbox: queue.SimpleQueue[_Ticket | int | None] = queue.SimpleQueue()
        self._tickets: dict[int, _Ticket] = {}
        self._thread = threading.Thread(target=self._run, name="moesaic-worker", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._failed = False

    @property
    def alive(self) -> bool:
        """Whether requests can be answered."""
        return self._thread.is_alive() and not self._failed

    @property
    def num_present(self) -> int:
        """Sequences in the house."""
        return len(self._present)

    def start(self) -> None:
        """Start the thread; called on the event loop that will ask."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def stop(self) -> None:
        """End the thread after the step it is in."""
        self._inbox.put(None)
        self._thread.join()

    def submit(self, jobs: Sequence[tuple[Job, TextStream]]) -> Answer:
        """Put the sequences of a request in line.

        Raises:
            BusyError: If there is no room for all of them.
            WorkerError: If the worker died.
        """
        if not self.alive:
            raise WorkerError
        if len(self._present) + len(jobs) > self.room:
            raise BusyError
        answer = Answer(self)
        for job, text in jobs:
            key = next(self._numbers)
            use = Use(prompt_tokens=len(job.prompt_T))
            index = answer.expect(key, use)
            self._present.add(key)
            self._inbox.put(_Ticket(key, index, job, text, answer, use))
        return answer

    def forget(self, key: int) -> None:
        """Drop a sequence, wherever it is."""
        self.leave(key)
        self._inbox.put(key)

    def leave(self, key: int) -> None:
        """Count a sequence out."""
        self._present.discard(key)

    def _run(self) -> None:
        try:
            while self._take_in():
                step = self.batch.step()
                if step is not None:
                    self._give_out(step)
        except BaseException:
            logger.exception("the worker died; restart the server")
            self._failed = True
            self._call([(ticket.answer, WorkerError()) for ticket in self._tickets.values()])
            # Those that were on their way when it died.
            while (message := self._inbox.get()) is not None:
                if isinstance(message, _Ticket):
                    self._call([(message.answer, WorkerError())])

    def _take_in(self) -> bool:
        """Do what was asked meanwhile, waiting where there is nothing else to do; False: end."""
        while True:
            idle = not self._tickets
            try:
                message = self._inbox.get(block=idle)
            except queue.Empty:
                return True
            if message is None:
                return False
            if isinstance(message, _Ticket):
                self._tickets[message.key] = message
                self.batch.add(message.key, message.job)
            elif self._tickets.pop(message, None) is not None:
                self.batch.remove(message)

    def _give_out(self, step: Step) -> None:
        if self._observe is not None:
            self._observe(step)
        if step.used_LTE is not None and self._share is not None:
            routed = list(self._share.routed)
            experts_T = step.used_LTE[routed].sum(2).float().mean(0).tolist()
            active_T = self._share.of(step.used_LTE).tolist()
            for key, active, experts in zip(step.keys, active_T, experts_T, strict=True):
                use = self._tickets[key].use
                use.rows += 1
                use.active += active
                use.experts += experts
        parts: list[tuple[Answer, _Part | WorkerError]] = []
        for written in step.written:
            ticket = self._tickets[written.key]
            piece = ticket.text.feed(written)
            ticket.use.new_tokens = ticket.text.num_tokens
            if piece.finish is not None:
                del self._tickets[written.key]
                # A stop string ends what the batch would go on with.
                self.batch.remove(written.key)
            parts.append((ticket.answer, (ticket.index, piece)))
        self._call(parts)

    def _call(self, parts: list[tuple[Answer, _Part | WorkerError]]) -> None:
        def put_all() -> None:
            for answer, part in parts:
                answer.put(part)

        assert self._loop is not None
        # A loop that is closed has nobody who waits.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(put_all)
