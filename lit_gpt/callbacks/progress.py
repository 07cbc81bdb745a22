"""Progress of a run: throughput and the progress bar."""

from __future__ import annotations

import builtins
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback, TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from torch import Tensor

from lit_gpt.module import LitGPT
from lit_gpt.windows import IGNORED

Item = TypeVar("Item")
REFRESH = 0.2  # seconds; reading the loss waits for the device


class Throughput(Callback):
    """Logs tokens_per_second of training: all devices together, without evaluations."""

    tokens: int | Tensor = 0
    since = 0.0
    rate: float | None = None  # the newest, tokens/s
    paused: float | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.tokens = 0
        self.since = time.monotonic()
        self.paused = None

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.paused = time.monotonic()

    def on_train_batch_start(self, *args: Any) -> None:
        if self.paused is not None:  # samples and checkpoints are not training either
            self.since += time.monotonic() - self.paused
            self.paused = None

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, i: int
    ) -> None:
        assert isinstance(pl_module, LitGPT)
        # Of conversations, those to learn; on a GPU they are added without waiting for it.
        has_all = len(batch) == 2
        number = batch[1].numel() if has_all else (batch[1] != IGNORED).sum()
        self.tokens = self.tokens + number * trainer.world_size
        if pl_module.is_logged(trainer.global_step):  # which counts the step that just ended
            now = time.monotonic()
            self.rate = float(self.tokens) / (now - self.since)
            pl_module.add_to_curves({"tokens_per_second": self.rate}, trainer.global_step)
            self.tokens = 0
            self.since = now


def planned_steps(trainer: pl.Trainer) -> int | None:
    """The last step, which BudgetClock may set anew; None: there is none."""
    return trainer.max_steps if trainer.max_steps > 0 else None


class ProgressBar(TQDMProgressBar):
    """Shows all optimizer steps of the run, loss and tokens/s; nothing without a terminal."""

    def __init__(self, throughput: Throughput) -> None:
        super().__init__()
        self.throughput = throughput
        self.train_progress_bar = Tqdm(disable=True)  # until training starts
        self.last_refresh = 0.0

    @property
    def is_enabled(self) -> bool:
        return super().is_enabled and sys.stdout.isatty()

    def init_validation_tqdm(self) -> Tqdm:
        return Tqdm(disable=True)

    init_sanity_tqdm = init_validation_tqdm

    def on_train_start(self, trainer: pl.Trainer, *_: Any) -> None:
        bar = self.init_train_tqdm()
        bar.leave = False
        bar.reset(total=planned_steps(trainer))
        bar.initial = trainer.global_step  # of a resumed run
        bar.n = trainer.global_step
        self.train_progress_bar = bar

    def track(self, items: Iterable[Item], total: int, name: str) -> Iterator[Item]:
        """Yields the items, and shows how many of the total are done and when all will be."""
        yield from Tqdm(
            items,
            name,
            total,
            leave=False,
            disable=self.is_disabled,
            dynamic_ncols=True,
            file=sys.stdout,
            bar_format=self.BAR_FORMAT,
        )

    def on_train_epoch_start(self, *_: Any) -> None:
        """Does nothing: progress is counted in steps, and the one epoch never ends."""

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, i: int
    ) -> None:
        if (i + 1) % trainer.accumulate_grad_batches:
            return  # the loss is not yet that of a whole step
        if self.is_enabled and time.monotonic() - self.last_refresh > REFRESH:
            self.last_refresh = time.monotonic()
            self.train_progress_bar.n = trainer.global_step
            self.train_progress_bar.total = planned_steps(trainer)
            self.train_progress_bar.set_postfix(self.get_metrics(trainer, pl_module))

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        assert isinstance(pl_module, LitGPT)
        metrics = {"loss": f"{pl_module.train_loss.item():.3f}"}
        if rate := self.throughput.rate:
            metrics["tokens/s"] = f"{rate:,.0f}"
        return metrics

    def on_exception(self, *_: Any) -> None:
        self.train_progress_bar.close()

    def print(self, *args: Any, **kwargs: Any) -> None:
        if self.train_progress_bar.disable:  # where Lightning's would print nothing
            builtins.print(*args, **kwargs)
        else:
            super().print(*args, **kwargs)
