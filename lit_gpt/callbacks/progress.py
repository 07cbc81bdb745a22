"""Owns the console of a run: the progress bar and the throughput."""

from __future__ import annotations

import time
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback, ProgressBar
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class Throughput(Callback):
    """Logs tokens_per_second of training, all devices together, evaluations left out."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.tokens, self.since = 0, time.monotonic()
        self.rate: float | None = None  # the newest
        self.paused: float | None = None

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.paused = time.monotonic()

    def on_train_batch_start(self, *args: Any) -> None:
        if self.paused is not None:  # samples and checkpoints are not training either
            self.since += time.monotonic() - self.paused
            self.paused = None

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, i: int
    ) -> None:
        self.tokens += batch[0].numel() * trainer.world_size
        if pl_module.is_logged(trainer.global_step):  # which counts the step that just ended
            now = time.monotonic()
            self.rate = self.tokens / (now - self.since)
            pl_module.add_to_curves({"tokens_per_second": self.rate}, trainer.global_step)
            self.tokens, self.since = 0, now


class Bar(ProgressBar):
    """One line with step, loss and tokens a second; none where the output is no terminal."""

    def __init__(self, throughput: Throughput) -> None:
        super().__init__()
        self.throughput = throughput
        self.console = Console(highlight=False)
        self.enabled = self.console.is_terminal
        self.progress: Progress | None = None
        self.last_refresh = 0.0

    def disable(self) -> None:
        self.enabled = False

    def print(self, *args: Any, **kwargs: Any) -> None:
        self.console.print(*args, markup=False, soft_wrap=True)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self.enabled:
            return
        columns = ("loss {task.fields[loss]}", "{task.fields[rate]} tokens/s")
        self.progress = Progress(
            TextColumn("Training"),
            BarColumn(),
            MofNCompleteColumn(),
            *map(TextColumn, columns),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
        )
        total = trainer.max_steps if trainer.max_steps > 0 else None
        self.progress.add_task("", total=total, loss="-", rate="-", completed=trainer.global_step)
        self.progress.start()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any
    ) -> None:
        # Reading the loss waits for the device, so it is done five times a second, not each step.
        if self.progress and time.monotonic() - self.last_refresh > 0.2:
            self.last_refresh = time.monotonic()
            fields = {"loss": f"{pl_module.train_loss.item():.3f}"}
            if self.throughput.rate:
                fields["rate"] = f"{self.throughput.rate:,.0f}"
            self.progress.update(self.progress.task_ids[0], completed=trainer.global_step, **fields)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if self.progress:
            self.progress.stop()
            self.progress = None
