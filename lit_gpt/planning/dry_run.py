"""Owns the trial: a few real evaluations and steps, timed, of a run that leaves nothing behind."""

from __future__ import annotations

import sys
import time
from itertools import islice
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback

from lit_gpt.callbacks.checkpoints import checkpoint_bytes, free_bytes
from lit_gpt.callbacks.samples import Samples
from lit_gpt.callbacks.stopping import agreed
from lit_gpt.errors import UserError

WARM_UP, MEASURED = 0.5, 2.5  # seconds of steps
EVALUATED = 3  # batches of each split


class Trial(Callback):
    """Times what a run is made of, in the order of a run.

    Attributes:
        evaluation: how many batches a whole one has for each device, of both splits.
        around: seconds of setting up, which a run takes once.
        steps: how many were timed.
        first_steps: seconds that the first ones took beyond what later ones take (torch.compile).
        step, eval_batch, final_batch: seconds of one; the last is of the final evaluation.
        samples, save: seconds of one evaluation's samples, and of writing a checkpoint.
    """

    def __init__(self, samples: Samples, folder: Path) -> None:
        self.writer, self.folder = samples, folder
        self.evaluation, self.around = 0, 0.0
        self.steps, self.step, self.first_steps = 0, 0.0, 0.0
        self.eval_batch = self.final_batch = self.samples = self.save = 0.0
        self.ends: list[float] = []  # of evaluation batches

    def run(
        self, trainer: pl.Trainer, model: pl.LightningModule, data: pl.LightningDataModule
    ) -> None:
        """Evaluates and trains for about three seconds, however many steps are planned.

        Raises:
            UserError: the trainer would make no step at all.
        """
        start, limit, loop = time.perf_counter(), trainer.limit_val_batches, trainer.fit_loop
        data.trainer = trainer
        if limit != 0:
            loaders = data.val_dataloader().values()
            batches = [-(-len(loader.starts) // loader.batch_size) for loader in loaders]
            self.evaluation = sum(batches)
            trainer.limit_val_batches = min(EVALUATED, *batches)
            trainer.validate(model, datamodule=data, verbose=False)
            self.around -= self.ends[-1] - self.ends[0]
        trainer.limit_val_batches = 0  # none between the steps
        planned, loop.epoch_loop.max_steps = loop.epoch_loop.max_steps, -1
        loop.max_epochs, loop.min_epochs, loop.epoch_loop.min_steps = -1, 0, None
        try:
            trainer.fit(model, datamodule=data, weights_only=True)
        finally:
            trainer.limit_val_batches, loop.epoch_loop.max_steps = limit, planned
        self.around += time.perf_counter() - start
        if not self.steps:
            raise UserError("no step could be tried: raise --trainer.limit_train_batches")

    def on_validation_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        self.ends.append(now(trainer))

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.eval_batch = (self.ends[-1] - self.ends[0]) / (len(self.ends) - 1)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.begin, self.since, self.first, self.seen = now(trainer), None, 0, 0

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, i: int
    ) -> None:
        if trainer.global_step == self.seen:  # within an accumulation
            return
        self.seen, done = trainer.global_step, trainer.global_step - self.first
        began, limit = (self.begin, WARM_UP) if self.since is None else (self.since, MEASURED)
        if not agreed(trainer, time.perf_counter() - began >= limit):  # a GPU is not waited for
            return
        end = now(trainer)
        if self.since is None:
            self.since, self.first, self.first_steps = end, done, end - began
            return
        self.steps, self.step = done, (end - began) / done
        self.first_steps = max(0.0, self.first_steps - self.first * self.step)
        self.around -= end - self.begin
        trainer.should_stop = True

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """What comes beside the steps, while the model is on its device and the memory is full."""
        pl_module.eval()
        begin = start = now(trainer)
        self.writer.on_validation_end(trainer, pl_module)
        self.samples = now(trainer) - start
        if checkpoint_bytes(pl_module) < free_bytes(self.folder) / 2:
            trainer.save_checkpoint(self.folder / "trial.ckpt", weights_only=False)
            self.save = now(trainer) - start - self.samples
        batches = trainer.datamodule.whole_val_split()
        pl_module.full_loss(islice(batches, trainer.world_size))  # the first takes longer
        count = min(len(batches), 4 * trainer.world_size)
        start = now(trainer)
        pl_module.full_loss(islice(batches, count))
        self.final_batch = (now(trainer) - start) / count
        self.around -= now(trainer) - begin


def now(trainer: pl.Trainer) -> float:
    """Seconds, once the device has done all that it was given."""
    if trainer.strategy.root_device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter()


def peak_memory() -> int:
    """Bytes that this process has held at most (its resident set); 0 where none can tell."""
    try:
        import resource  # Unix
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
