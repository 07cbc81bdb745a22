"""--profile: what ten steps spend their time on.

After a warm-up, a run is timed for ten steps, then traced for ten. Tracing takes time itself, so
speed and the waiting for data are measured without it.
"""

from __future__ import annotations

import gzip
import math
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.profilers import Profiler
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from lit_gpt.storage import atomic_open

WARM_UP = 3  # steps: the first ones compile, allocate and fill caches
STEPS = 10
NUM_ROWS = 10
FETCH = "[_TrainingEpochLoop].train_dataloader_next"  # 2.6: docs/lightning-notes.md#private-apis
COMPILED = ("Torch-Compiled Region", "## Call CompiledFxGraph")  # what fused kernels are a part of
ENGINE = ("autograd::", "c10d::", "_c10d_", "gloo:", "nccl:")  # they only wait for others
Interval = tuple[float, float]  # microseconds


@dataclass
class Stretch:
    """Consecutive optimizer steps without an evaluation among them.

    Attributes:
        first: number of its first step.
        steps: how many there are.
        began: clock time.
        seconds: that they took.
        waiting: seconds of them in which this process waited for batches.
        tokens: of this process.
    """

    first: int
    steps: int
    began: float = 0.0
    seconds: float = 0.0
    waiting: float = 0.0
    tokens: int = 0

    @property
    def last(self) -> int:
        return self.first + self.steps - 1


class Actions(Profiler):
    """Tells a `Profile` what Lightning's loop does, and makes it a span of the trace."""

    def __init__(self, owner: Profile) -> None:
        super().__init__()
        self.owner = owner
        self.spans: dict[str, Any] = {}
        self.since = 0.0

    def start(self, action_name: str) -> None:
        if action_name == FETCH:
            self.owner.before_fetch()
            self.since = time.perf_counter()
        if self.owner.tracer is not None:
            self.spans[action_name] = record_function(action_name)
            self.spans[action_name].__enter__()

    def stop(self, action_name: str) -> None:
        if action_name == FETCH and self.owner.current:
            self.owner.current.waiting += time.perf_counter() - self.since
        if span := self.spans.pop(action_name, None):
            span.__exit__(None, None, None)


class Profile(Callback):
    """Times and traces some steps of rank 0, prints where the time goes and saves the trace.

    Evaluations are left out: of fewer than ten steps between two of them, it takes these.

    Attributes:
        actions: must be the Trainer's profiler.
    """

    def __init__(self) -> None:
        self.actions = Actions(self)
        self.todo: list[Stretch] = []  # to time, to trace
        self.current: Stretch | None = None
        self.timed: Stretch | None = None
        self.tracer: profile | None = None  # while it traces
        self.device = torch.device("cpu")
        self.folder = Path()
        self.step = 0  # the newest that is done

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.folder = Path(trainer.log_dir or trainer.default_root_dir)  # asks all ranks

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        self.device = pl_module.device
        self.step = trainer.global_step
        batches: Any = trainer.val_check_batch  # inf without evaluations
        interval = batches / trainer.accumulate_grad_batches
        timed = stretch_after(self.step + WARM_UP, interval)
        traced = stretch_after(timed.last, interval)
        if 0 <= trainer.max_steps < traced.last:
            end = f"it ends with step {trainer.max_steps}"
            pl_module.print(f"Nothing is profiled: this run would need {traced.last} steps, {end}")
        else:
            self.todo = [timed, traced]

    def before_fetch(self) -> None:
        """Begins a stretch: the waiting for its first batch is a part of it."""
        if self.current or not self.todo or self.todo[0].first != self.step + 1:
            return
        self.current = self.todo.pop(0)
        if not self.todo:
            kinds = [ProfilerActivity.CPU]
            if self.device.type == "cuda":
                kinds.append(ProfilerActivity.CUDA)
            self.tracer = profile(activities=kinds)
            with silent_stderr():
                self.tracer.start()
        synchronize(self.device)
        self.current.began = time.perf_counter()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, i: int
    ) -> None:
        if self.current:
            self.current.tokens += batch[0].numel()
        self.step = trainer.global_step
        is_whole = (i + 1) % trainer.accumulate_grad_batches == 0
        if not self.current or not is_whole or self.step < self.current.last:
            return
        synchronize(self.device)
        stretch = self.current
        stretch.seconds = time.perf_counter() - stretch.began
        self.current = None
        if self.tracer is None:
            self.timed = stretch
            return
        tracer = self.stop()
        assert tracer
        assert self.timed
        lines = report(self.timed, stretch, tracer, self.device, trainer.world_size)
        pl_module.print("\n".join([*lines, save(tracer, self.folder, stretch)]))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.todo or self.current:
            pl_module.print(f"Nothing is profiled: the run ended with step {self.step}")
        self.stop()

    def on_exception(self, *args: Any) -> None:
        self.stop()

    def stop(self) -> profile | None:
        """Ends the trace, if there is one, and returns it."""
        tracer = self.tracer
        self.tracer = None
        if tracer:
            for action in [*self.actions.spans]:
                self.actions.stop(action)
            with silent_stderr():
                tracer.stop()
        return tracer


def stretch_after(step: int, interval: float) -> Stretch:
    """The next steps after this one that no evaluation interrupts.

    >>> [stretch_after(step, 50).first for step in (3, 40, 41)]
    [4, 41, 51]

    Args:
        step: the last one before.
        interval: steps between evaluations.
    """
    length = int(min(STEPS, interval))
    left = interval - step % interval if math.isfinite(interval) else math.inf
    return Stretch(step + 1 if left >= length else step + int(left) + 1, length)


def synchronize(device: torch.device) -> None:
    """Waits for what a GPU still has to do."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


@contextmanager
def silent_stderr() -> Iterator[None]:
    """Hides what the tracer writes there when it starts and ends, at any of its log levels."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def report(
    timed: Stretch, traced: Stretch, tracer: profile, device: torch.device, world_size: int
) -> list[str]:
    """Lines to print, of at most 80 characters."""
    of_rank = f" of rank 0 of {world_size}" if world_size > 1 else ""
    slower = traced.seconds / traced.steps / (timed.seconds / timed.steps) - 1
    lines = [
        f"Profile{of_rank}: steps {timed.first} to {timed.last} timed, {traced.first} to "
        f"{traced.last} traced, {max(slower, 0):.0%} slower",
        f"Speed: {timed.tokens / timed.seconds:,.0f} tokens/s per device",
        f"Waiting for data: {timed.waiting / timed.seconds:.1%} of the time",
    ]
    if world_size > 1:
        all_of_it, alone = between_ranks(tracer.events(), device)
        waiting, exchanging = (f"{us / 1e6 / traced.seconds:.1%}" for us in (alone, all_of_it))
        lines.append(
            f"Waiting for other ranks: {waiting} of the time (exchanging data: {exchanging})"
        )
    return [*lines, *table(tracer, device, traced)]


def table(tracer: profile, device: torch.device, traced: Stretch) -> list[str]:
    """The operations that take the most time, without those that they call."""
    on_gpu = device.type == "cuda"
    rows: list[tuple[float, str, int]] = []
    for row in tracer.key_averages():
        taken = row.self_device_time_total if on_gpu else row.self_cpu_time_total
        is_span = row.is_user_annotation and not row.key.startswith(COMPILED)
        if row.device_type == DeviceType.CPU and not is_span and not row.key.startswith(ENGINE):
            rows.append((taken, row.key, row.count))
    lines = [f"{'Operation':<42}{'of the time':>12}{'ms/step':>12}{'calls/step':>12}"]
    for taken, name, calls in sorted(rows, reverse=True)[:NUM_ROWS]:
        share = taken / 1e6 / traced.seconds
        each = f"{taken / 1e3 / traced.steps:,.3f}"
        shown = name if len(name) <= 41 else f"{name[:20]}...{name[-18:]}"  # ends tell more
        lines.append(f"{shown:<42}{share:>12.1%}{each:>12}{calls / traced.steps:>12,.1f}")
    all_of_them = sum(taken for taken, *_ in rows) / 1e6 / traced.seconds
    lines.append(f"{'All operations (the rest: Python, waiting)':<42}{all_of_them:>12.1%}")
    return lines


def between_ranks(events: Iterable[Any], device: torch.device) -> tuple[float, float]:
    """How long ranks exchanged data, and how much of that nothing was computed meanwhile.

    In both, the slowest rank is waited for. On a CPU, gloo's operations count, on a GPU NCCL's
    kernels.

    Returns: microseconds.
    """
    on_gpu = device.type == "cuda"
    kind = DeviceType.CUDA if on_gpu else DeviceType.CPU
    exchanges: list[Interval] = []
    computing: list[Interval] = []
    for event in events:
        if event.device_type != kind:
            continue
        span = (event.time_range.start, event.time_range.end)
        if event.name.startswith("nccl" if on_gpu else "gloo:"):
            exchanges.append(span)
        elif on_gpu or event.name.startswith("aten::"):
            computing.append(span)
    both = length(exchanges) + length(computing) - length([*exchanges, *computing])
    return length(exchanges), length(exchanges) - both


def length(intervals: list[Interval]) -> float:
    """Of the union of intervals."""
    total = 0.0
    end = -math.inf
    for start, stop in sorted(intervals):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total


def save(tracer: profile, folder: Path, traced: Stretch) -> str:
    """Writes the trace into the run's folder; returns a line that says so, or why not."""
    path = folder / f"trace_steps_{traced.first}_to_{traced.last}.json.gz"
    try:
        with tempfile.TemporaryDirectory() as scratch:
            plain = Path(scratch) / "trace.json"
            tracer.export_chrome_trace(str(plain))
            with plain.open("rb") as source, atomic_open(path) as file, gzip.open(file, "wb") as to:
                shutil.copyfileobj(source, to)
    except OSError as error:
        return f"Could not write {path}: {error.strerror}"
    return f"Trace, to open at ui.perfetto.dev: {path}"
