"""A thread that completes requests in batches.

Requests that arrive while a batch runs form the next one. It starts when no other batch runs or,
if there is room, after MAX_WAIT; batches that run side by side take turns, a token each.
"""

from __future__ import annotations

import asyncio
import threading
import time
import traceback
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import islice

from lit_gpt.generation.completion import CompletionChunk, Request, complete
from lit_gpt.model import GPT
from lit_gpt.text.tokenizer import Tokenizer

MAX_WAIT = 0.2  # seconds


class Busy(Exception):
    """A job was refused: there is no room, or the server is stopping."""


class Failure(Exception):
    """An accepted job was not completed: the server is stopping, or the model failed."""


class Job:
    """Requests that a client waits for, and their pieces.

    An event loop creates, reads and cancels it; the batcher's thread delivers the pieces.
    """

    def __init__(self, requests: Sequence[Request]) -> None:
        self.requests = requests
        self.is_cancelled = False
        self.loop = asyncio.get_running_loop()
        self.received: asyncio.Queue[CompletionChunk | Failure | None] = asyncio.Queue()

    def cancel(self) -> None:
        """Stops the work at the next token, and ends `pieces`."""
        self.is_cancelled = True
        self.received.put_nowait(None)

    async def pieces(self) -> AsyncIterator[CompletionChunk]:
        """Yields pieces, with the index of their request, until all are finished or cancelled.

        Raises:
            Failure: the requests will not be completed.
        """
        unfinished = len(self.requests)
        while unfinished and (piece := await self.received.get()):
            if isinstance(piece, Failure):
                raise piece
            yield piece
            unfinished -= piece.finish_reason is not None


def deliver(parts: Sequence[tuple[Job, CompletionChunk | Failure]]) -> None:
    """Passes parts from a thread to the event loop, with one system call."""

    def receive() -> None:
        for job, part in parts:
            job.received.put_nowait(part)

    if parts:
        with suppress(RuntimeError):  # the loop is closed
            parts[0][0].loop.call_soon_threadsafe(receive)


@dataclass(eq=False)
class Row:
    """One request of a job, waiting or in a batch."""

    job: Job
    index: int  # of the request
    since: float  # when it arrived, by the monotonic clock
    is_finished: bool = False

    @property
    def is_active(self) -> bool:
        return not (self.job.is_cancelled or self.is_finished)


class Batch:
    """Rows that are completed side by side."""

    def __init__(self, model: GPT, tokenizer: Tokenizer, rows: list[Row]) -> None:
        self.rows = rows
        requests = [row.job.requests[row.index] for row in rows]
        self.pieces = complete(model, tokenizer, requests, lambda index: rows[index].is_active)

    @property
    def active(self) -> list[Row]:
        return [row for row in self.rows if row.is_active]

    def step(self) -> None:
        """Adds about one token to each row."""
        parts: list[tuple[Job, CompletionChunk | Failure]] = []
        problem = None
        try:
            for piece in islice(self.pieces, len(self.active)):
                row = self.rows[piece.index]
                row.is_finished = piece.finish_reason is not None
                parts.append((row.job, replace(piece, index=row.index)))
        except Exception as error:  # such as out of memory; other batches continue
            traceback.print_exception(error)
            problem = f"the model failed ({type(error).__name__}), see the server's log"
        deliver(parts)
        if problem:
            self.fail(problem)

    def fail(self, problem: str) -> None:
        rows = self.active
        for row in rows:
            row.is_finished = True
        deliver([(row.job, Failure(problem)) for row in rows])


class Batcher(threading.Thread):
    """The thread that completes submitted requests.

    Args:
        model: in eval mode.
        tokenizer: the model's.
        max_concurrent: the most requests that run or wait.
        max_batch_size: the most requests that run.
    """

    def __init__(
        self, model: GPT, tokenizer: Tokenizer, max_concurrent: int, max_batch_size: int
    ) -> None:
        super().__init__(name="completion")
        self.model = model
        self.tokenizer = tokenizer
        self.max_concurrent = max_concurrent
        self.max_batch_size = max_batch_size
        self._changed = threading.Condition()
        self._waiting: deque[Row] = deque()
        self._batches: list[Batch] = []
        self._is_stopping = False

    def stop(self) -> None:
        """Makes all requests fail at their next token."""
        with self._changed:
            self._is_stopping = True
            self._changed.notify()

    def counts(self) -> tuple[int, int]:
        """The numbers of running and of waiting requests."""
        with self._changed:
            running = sum(len(batch.active) for batch in self._batches)
            return running, sum(row.is_active for row in self._waiting)

    def submit(self, requests: Sequence[Request]) -> Job:
        """Accepts requests; call it in an event loop.

        Raises:
            Busy: there would be more than max_concurrent, or the server is stopping.
        """
        with self._changed:
            if self._is_stopping:
                raise Busy("the server is stopping")
            in_progress = sum(self.counts())
            if in_progress + len(requests) > self.max_concurrent:
                raise Busy(
                    f"{in_progress} of at most {self.max_concurrent} requests are in progress: "
                    "try again later"
                )
            job = Job(requests)
            now = time.monotonic()
            self._waiting += [Row(job, index, now) for index in range(len(requests))]
            self._changed.notify()
        return job

    def run(self) -> None:
        while not self._is_stopping:
            self._start_batch()
            for batch in self._batches:
                batch.step()
        for batch in [*self._batches, Batch(self.model, self.tokenizer, list(self._waiting))]:
            batch.fail("the server is stopping")

    def _start_batch(self) -> None:
        """Starts a batch of the waiting rows if it is time; blocks while there is nothing to do."""
        with self._changed:
            self._batches = [batch for batch in self._batches if batch.active]
            if not self._batches:
                self._changed.wait_for(lambda: self._waiting or self._is_stopping)
            self._waiting = deque(row for row in self._waiting if row.is_active)
            if not self._waiting:
                return
            waited = time.monotonic() - self._waiting[0].since
            room = self.max_batch_size - sum(len(batch.active) for batch in self._batches)
            if room > 0 and (not self._batches or waited > MAX_WAIT):
                rows = [self._waiting.popleft() for _ in range(min(room, len(self._waiting)))]
                self._batches.append(Batch(self.model, self.tokenizer, rows))
