"""A dry run: a few real evaluations and steps, timed, that leave nothing behind."""

from __future__ import annotations

import time
from itertools import islice
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import psutil
import torch
from lightning.pytorch.callbacks import Callback

from lit_gpt.callbacks.checkpoints import checkpoint_bytes, free_bytes
from lit_gpt.callbacks.stopping import agreed
from lit_gpt.errors import UserError
from lit_gpt.training.train import Run

WARM_UP = 0.5  # seconds of steps that are not timed
MEASURED = 2.5  # seconds of steps that are
EVALUATED = 3  # batches of each split


class DryRun(Callback):
    """Times the parts of a run, in the order in which a run has them.

    Args:
        folder: where a checkpoint may be written.
    """

    num_eval_batches = 0  # of a whole evaluation of both splits, on each device
    steps = 0  # that were timed; the rest is in seconds
    step = 0.0
    eval_batch = 0.0  # of an evaluation between the steps
    final_batch = 0.0  # of the final evaluation
    samples = 0.0  # of one evaluation
    save = 0.0  # of a checkpoint
    first_steps = 0.0  # beyond what later steps take (torch.compile)
    overhead = 0.0  # of setting up, once a run

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._eval_ends: list[float] = []  # of each batch

    def measure(self, run: Run) -> None:
        """Evaluates and trains for about three seconds, however many steps are planned.

        Raises:
            UserError: the trainer would make no step at all.
        """
        self._run = run
        trainer = run.trainer
        start = time.perf_counter()
        limit = trainer.limit_val_batches
        run.data.trainer = trainer
        if limit != 0:
            loaders = run.data.val_dataloader().values()
            batches = [-(-loader.rank_windows // loader.batch_size) for loader in loaders]
            self.num_eval_batches = sum(batches)
            trainer.limit_val_batches = min(EVALUATED, *batches)
            trainer.validate(run.model, datamodule=run.data, verbose=False)
            self.overhead -= self._eval_ends[-1] - self._eval_ends[0]
        trainer.limit_val_batches = 0  # none between the steps
        # The clock ends the run, not its limits: Lightning 2.6.6, docs/lightning-notes.md.
        loop = trainer.fit_loop
        max_steps = loop.epoch_loop.max_steps
        loop.epoch_loop.max_steps = -1
        loop.epoch_loop.min_steps = None
        loop.max_epochs = -1
        loop.min_epochs = 0
        try:
            trainer.fit(run.model, datamodule=run.data, weights_only=True)
        finally:
            trainer.limit_val_batches = limit
            loop.epoch_loop.max_steps = max_steps
        self.overhead += time.perf_counter() - start
        if not self.steps:
            raise UserError("no step could be timed", hint="raise `limit_train_batches`")

    def on_validation_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        self._eval_ends.append(synchronized_time(trainer))

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        seconds = self._eval_ends[-1] - self._eval_ends[0]
        self.eval_batch = seconds / (len(self._eval_ends) - 1)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._start = synchronized_time(trainer)
        self._warm_since: float | None = None
        self._warm_up_steps = 0
        self._last_step = 0

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, i: int
    ) -> None:
        if trainer.global_step == self._last_step:  # within an accumulation
            return
        self._last_step = trainer.global_step
        steps = trainer.global_step - self._warm_up_steps
        since = self._start if self._warm_since is None else self._warm_since
        limit = WARM_UP if self._warm_since is None else MEASURED
        if not agreed(trainer, time.perf_counter() - since >= limit):  # does not wait for a GPU
            return
        end = synchronized_time(trainer)
        if self._warm_since is None:
            self._warm_since = end
            self._warm_up_steps = steps
            self.first_steps = end - since
            return
        self.steps = steps
        self.step = (end - since) / steps
        self.first_steps = max(0.0, self.first_steps - self._warm_up_steps * self.step)
        self.overhead -= end - self._start
        trainer.should_stop = True

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Times what comes beside the steps, while model and optimizer are in memory."""
        model = self._run.model
        model.eval()
        start = synchronized_time(trainer)
        self._run.samples.on_validation_end(trainer, model)
        sampled = synchronized_time(trainer)
        self.samples = sampled - start
        if checkpoint_bytes(model) < free_bytes(self.folder) / 2:
            trainer.save_checkpoint(self.folder / "dry_run.ckpt", weights_only=False)
            self.save = synchronized_time(trainer) - sampled
        self.time_final(trainer)
        self.overhead -= synchronized_time(trainer) - start

    def time_final(self, trainer: pl.Trainer) -> None:
        final = self._run.final
        batches = final.batches(self._run.data, trainer.global_rank, trainer.world_size)
        if not batches:
            return
        for number in (1, min(len(batches), 4)):  # the first takes longer
            before = synchronized_time(trainer)
            final.measure(trainer, self._run.model, islice(batches, number), batches.num_targets)
            seconds = synchronized_time(trainer) - before
            self.final_batch = seconds / (number * trainer.world_size)


def synchronized_time(trainer: pl.Trainer) -> float:
    """Seconds, once the device has finished its queue."""
    if trainer.strategy.root_device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter()


def peak_memory() -> int:
    """The most bytes that this process has held (its resident set); 0 where unknown."""
    try:
        import resource  # Unix
    except ImportError:
        return getattr(psutil.Process().memory_info(), "peak_wset", 0)  # Windows
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if psutil.MACOS else 1024 * peak
