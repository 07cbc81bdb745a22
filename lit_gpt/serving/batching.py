"""Owns the thread that completes: what waits is taken into a batch, batches take turns.

A batch can't take in more while it goes on. So whoever comes meanwhile waits for its end, and
together they are the next batch; but nobody waits longer than PATIENCE if there is room: then a
batch of those who wait begins beside the others, and each writes a token in turn.
"""

from __future__ import annotations

import asyncio
import threading
import time
import traceback
from collections import deque
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import islice

from lit_gpt.generation.completion import Piece, Request, complete
from lit_gpt.model import GPT
from lit_gpt.text.tokenizer import Tokenizer

PATIENCE = 0.2  # seconds


class Refusal(Exception):
    """Nothing is taken in: there is no room, or it stops."""


class Failure(Exception):
    """What was taken in is not completed: the server stops, or the model failed."""


class Call:
    """Requests that somebody waits for, and the pieces that come of them.

    It is made, read and given up in an event loop; the pieces come from a thread, by `hand_over`.
    """

    def __init__(self, requests: Sequence[Request]) -> None:
        self.requests = requests
        self.is_wanted = True
        self.loop = asyncio.get_running_loop()
        self.received: asyncio.Queue[Piece | Failure | None] = asyncio.Queue()

    def give_up(self) -> None:
        """Nobody waits any more: the work stops at the next token, and so does `pieces`."""
        self.is_wanted = False
        self.received.put_nowait(None)

    async def pieces(self) -> AsyncIterator[Piece]:
        """Each with the index of its request, until all are finished or it is given up.

        Raises:
            Failure: they won't be.
        """
        unfinished = len(self.requests)
        while unfinished and (piece := await self.received.get()):
            if isinstance(piece, Failure):
                raise piece
            yield piece
            unfinished -= piece.finish_reason is not None


def hand_over(parts: list[tuple[Call, Piece | Failure]]) -> None:
    """From a thread to whoever waits; all at once, as each time costs a system call."""

    def receive() -> None:
        for call, part in parts:
            call.received.put_nowait(part)

    if parts:
        with suppress(RuntimeError):  # the loop is closed: nobody waits any more
            parts[0][0].loop.call_soon_threadsafe(receive)


@dataclass(eq=False)
class Row:
    """A request of a call, on its way."""

    call: Call
    index: int
    since: float  # seconds of the monotonic clock
    is_finished: bool = False

    @property
    def is_going(self) -> bool:
        return self.call.is_wanted and not self.is_finished


class Batch:
    """Rows that are completed side by side."""

    def __init__(self, model: GPT, tokenizer: Tokenizer, rows: list[Row]) -> None:
        self.rows = rows
        requests = [row.call.requests[row.index] for row in rows]
        self.pieces: Iterator[Piece] = complete(
            model, tokenizer, requests, lambda index: rows[index].is_going
        )

    @property
    def going(self) -> list[Row]:
        return [row for row in self.rows if row.is_going]

    def step(self) -> None:
        """About a token for each row."""
        parts: list[tuple[Call, Piece | Failure]] = []
        reason = None
        try:
            for piece in islice(self.pieces, len(self.going)):
                row = self.rows[piece.index]
                row.is_finished = piece.finish_reason is not None
                parts.append((row.call, replace(piece, index=row.index)))
        except Exception as error:  # of the model, or of a device that is too small: others go on
            traceback.print_exception(error)
            reason = f"the model failed ({type(error).__name__}), see the server's messages"
        hand_over(parts)
        if reason:
            self.fail(reason)

    def fail(self, reason: str) -> None:
        going = self.going
        for row in going:
            row.is_finished = True
        hand_over([(row.call, Failure(reason)) for row in going])


class Batcher:
    """Completes what is submitted, in a thread of its own.

    Args:
        model: in eval mode.
        tokenizer: the model's.
        max_concurrent: requests that may run and wait at a time, together.
        max_batch_size: requests that may run at a time.
    """

    def __init__(
        self, model: GPT, tokenizer: Tokenizer, max_concurrent: int, max_batch_size: int
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.max_concurrent, self.max_batch_size = max_concurrent, max_batch_size
        self._changed = threading.Condition()
        self._waiting: deque[Row] = deque()
        self._batches: list[Batch] = []
        self._is_stopping = False
        self._thread = threading.Thread(target=self._run, name="completion")

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """What is under way fails, at its next token."""
        with self._changed:
            self._is_stopping = True
            self._changed.notify()

    def join(self) -> None:
        self._thread.join()

    def counts(self) -> tuple[int, int]:
        """Requests that run and that wait."""
        with self._changed:
            running = sum(len(batch.going) for batch in self._batches)
            return running, sum(row.is_going for row in self._waiting)

    def submit(self, requests: Sequence[Request]) -> Call:
        """To be called in an event loop.

        Raises:
            Refusal: they would be more than max_concurrent, or it stops.
        """
        with self._changed:
            if self._is_stopping:
                raise Refusal("the server stops")
            under_way = sum(self.counts())
            if under_way + len(requests) > self.max_concurrent:
                raise Refusal(
                    f"{under_way} requests are under way and {self.max_concurrent} may be: "
                    "try again later"
                )
            call, now = Call(requests), time.monotonic()
            self._waiting += [Row(call, index, now) for index in range(len(requests))]
            self._changed.notify()
        return call

    def _run(self) -> None:
        while not self._is_stopping:
            self._take_in()
            for batch in self._batches:
                batch.step()
        for batch in [*self._batches, Batch(self.model, self.tokenizer, list(self._waiting))]:
            batch.fail("the server stops")

    def _take_in(self) -> None:
        """Begins a batch of those who wait, if it is time; sleeps while there is nothing to do."""
        with self._changed:
            self._batches = [batch for batch in self._batches if batch.going]
            if not self._batches:
                self._changed.wait_for(lambda: self._waiting or self._is_stopping)
            self._waiting = deque(row for row in self._waiting if row.is_going)
            if not self._waiting:
                return
            waited = time.monotonic() - self._waiting[0].since
            room = self.max_batch_size - sum(len(batch.going) for batch in self._batches)
            if room > 0 and (not self._batches or waited > PATIENCE):
                rows = [self._waiting.popleft() for _ in range(min(room, len(self._waiting)))]
                self._batches.append(Batch(self.model, self.tokenizer, rows))
