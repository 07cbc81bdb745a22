"""A thread that completes requests side by side.

A request joins those that run at the next token, if there is room, and leaves when it is finished
(continuous batching: Orca, Yu et al. 2022).
"""

from __future__ import annotations

import asyncio
import threading
import traceback
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import count

from lit_gpt.generation.completion import Batch, CompletionChunk, Request
from lit_gpt.model import GPT
from lit_gpt.text.tokenizer import Tokenizer


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
    """One request of a job, waiting or running."""

    job: Job
    index: int  # of the request
    is_finished: bool = False

    @property
    def is_active(self) -> bool:
        return not (self.job.is_cancelled or self.is_finished)


def fail(rows: Iterable[Row], problem: str) -> None:
    """Tells those who wait for active rows that they will not be completed."""
    active = [row for row in rows if row.is_active]
    for row in active:
        row.is_finished = True
    deliver([(row.job, Failure(problem)) for row in active])


def described(error: Exception) -> str:
    """What a client may know of an error; the rest is printed."""
    traceback.print_exception(error)
    return f"the model failed ({type(error).__name__}), see the server's log"


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
        self._running: dict[int, Row] = {}  # by their indices in the batch
        self._indices = count()
        self._batch = Batch(model, tokenizer)
        self._is_stopping = False

    def stop(self) -> None:
        """Makes all requests fail at their next token."""
        with self._changed:
            self._is_stopping = True
            self._changed.notify()

    def counts(self) -> tuple[int, int]:
        """The numbers of running and of waiting requests."""
        with self._changed:
            running = sum(row.is_active for row in self._running.values())
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
            self._waiting += [Row(job, index) for index in range(len(requests))]
            self._changed.notify()
        return job

    def run(self) -> None:
        try:
            while not self._is_stopping:
                self._take_in()
                self._step()
        finally:  # nobody waits for a thread that an error ended
            self._is_stopping = True
            fail([*self._running.values(), *self._waiting], "the server is stopping")

    def _take_in(self) -> None:
        """Lets waiting rows join if there is room; blocks while there is nothing to do."""
        with self._changed:
            self._changed.wait_for(lambda: self._running or self._waiting or self._is_stopping)
            self._running = {i: row for i, row in self._running.items() if row.is_active}
            self._waiting = deque(row for row in self._waiting if row.is_active)
            room = self.max_batch_size - len(self._running)
            new = [self._waiting.popleft() for _ in range(min(room, len(self._waiting)))]
            joining = dict(zip(self._indices, new, strict=False))
            self._running |= joining
        if self._survives(self._drop_others):
            for index, row in joining.items():
                try:
                    self._batch.add(index, row.job.requests[row.index])
                except Exception as error:  # the thread lives on, for the others
                    fail([row], described(error))

    def _drop_others(self) -> None:
        """Drops the rows that no longer run."""
        self._batch.keep(self._running.__contains__)

    def _step(self) -> None:
        """Adds about one token to each row."""
        parts: list[tuple[Job, CompletionChunk | Failure]] = []
        problem = ""
        try:
            for piece in self._batch.step():
                row = self._running[piece.index]
                row.is_finished = piece.finish_reason is not None
                parts.append((row.job, replace(piece, index=row.index)))
        except Exception as error:  # such as out of memory; the other rows continue
            problem = described(error)
        deliver(parts)
        if problem:  # only here, as the error held the memory of the step
            self._survives(lambda: self._drop_failed(problem))

    def _drop_failed(self, problem: str) -> None:
        """Drops the rows that the last step, which failed, worked on."""
        failed = self._batch.drop_failed()
        fail([self._running[index] for index in failed], problem)

    def _survives(self, change: Callable[[], None]) -> bool:
        """Changes the batch; if that fails, all of its rows do, and the next ones get a new batch.

        Returns:
            Whether it is the same batch.
        """
        try:
            change()
        except Exception as error:
            problem = described(error)
        else:
            return True
        fail(self._running.values(), problem)
        self._batch = Batch(self.model, self.tokenizer)
        return False
