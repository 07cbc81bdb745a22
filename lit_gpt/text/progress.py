"""How far a long text has been read: a bar on a terminal, a line now and then anywhere else."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

SILENT = 1.0  # seconds until a bar is shown
FIRST_LINE = 30.0  # seconds until the first line; the next comes after twice as long, ...
LONGEST_WAIT = 600.0  # ... but no later than this
REFRESH = 0.2  # seconds


@contextmanager
def progress(task: str, size: int) -> Iterator[Callable[[int], None]]:
    """Yields a function that is told how many of `size` bytes were read since the last call."""
    shown = _Bar(task, size) if sys.stderr.isatty() else _Lines(task, size)
    try:
        yield shown.advance
    finally:
        shown.close()


class _Lines:
    """Lines like "Encoding the text: 40% of 3,000 MB, about 5 min left" on stderr."""

    wait = FIRST_LINE

    def __init__(self, task: str, size: int) -> None:
        self.task = task
        self.size = size
        self.done = 0
        self.start = time.monotonic()
        self.due = self.start + self.wait

    def advance(self, number: int) -> None:
        self.done += number
        now = time.monotonic()
        if now >= self.due:
            self.show(now)

    def show(self, now: float) -> None:
        self.wait = min(2 * self.wait, LONGEST_WAIT)
        self.due = now + self.wait
        share = self.done / max(self.size, 1)
        left = (now - self.start) * (1 / share - 1) if share else 0.0
        amount = f"{share:.0%} of {self.size / 1e6:,.0f} MB"
        print(
            f"{self.task}: {amount}, about {left / 60:,.0f} min left", file=sys.stderr, flush=True
        )

    def close(self) -> None:
        """Leaves the lines as they are."""


class _Bar(_Lines):
    """A bar that goes away in the end; drawn by the reading thread itself."""

    wait = SILENT
    bar: Any = None

    def show(self, now: float) -> None:
        if self.bar is None:
            self.bar = self.open()
        self.due = now + REFRESH
        self.bar.update(self.bar.task_ids[0], completed=self.done, refresh=True)

    def open(self) -> Any:
        from rich import progress as parts  # takes 50 ms to load
        from rich.console import Console

        bar = parts.Progress(
            parts.TextColumn("{task.description}"),
            parts.BarColumn(),
            parts.TaskProgressColumn(),
            parts.DownloadColumn(),
            parts.TransferSpeedColumn(),
            parts.TimeRemainingColumn(),
            console=Console(stderr=True),
            auto_refresh=False,
            transient=True,
        )
        bar.add_task(self.task, total=self.size)
        bar.start()
        return bar

    def close(self) -> None:
        if self.bar is not None:
            self.bar.stop()
