"""Owns --find_lr: Lightning's learning-rate range test, what it suggests, and its plot."""

from __future__ import annotations

import copy
import io
import math
import sys
from contextlib import ExitStack, redirect_stderr
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.plugins.io import CheckpointIO
from lightning.pytorch.tuner import Tuner

from lit_gpt.command import stop_at_once
from lit_gpt.errors import UserError
from lit_gpt.module import LitGPT
from lit_gpt.reports.charts import Chart, Series
from lit_gpt.reports.html import charts_page
from lit_gpt.storage import write_whole
from lit_gpt.training.summary import command, shorten

NUM_STEPS = 200  # enough for the smoothed loss, of about 50 steps, to follow
FIRST, LAST = 1e-6, 1.0
BETA = 0.98  # of Lightning's smoothing
SKIPPED = 10  # steps at the start that are too noisy to be read


class InMemory(CheckpointIO):
    """Keeps the weights from before the test, which Lightning puts back: no file to be left."""

    def save_checkpoint(self, checkpoint: dict, path: Any, storage_options: Any = None) -> None:
        self.checkpoint = copy.deepcopy(checkpoint)

    def load_checkpoint(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return self.checkpoint

    def remove_checkpoint(self, path: Any) -> None:
        del self.checkpoint


def find_learning_rate(
    trainer: pl.Trainer, model: LitGPT, data: pl.LightningDataModule, checkpoint: Any
) -> None:
    """Prints a learning rate for the model and this text, and saves the plot in a run's folder.

    Raises:
        UserError: it can't be done with these options.
    """
    if checkpoint:
        raise UserError("--find_lr tries a run from its start: leave out --ckpt_path")
    if trainer.fast_dev_run:
        raise UserError("--find_lr needs more than one step: leave out --trainer.fast_dev_run")
    rates, losses = range_test(trainer, model, data)
    best = suggestion(rates, losses)
    if trainer.global_rank:
        return
    folder = Path(trainer.log_dir or trainer.default_root_dir)
    save_config = next(c for c in trainer.callbacks if isinstance(c, SaveConfigCallback))
    save_config.setup(trainer, model, "fit")
    save_plot(rates, losses, best, folder / "lr_find.html")
    print(f"Learning rates tried: {rates[0]:.2g} to {rates[-1]:.2g}, in {len(rates)} steps")
    print(f"Plot: {shorten(folder / 'lr_find.html')}")
    if best is None:
        print("No suggestion: the loss never falls. Look at the plot, and at the other options")
        return
    words = ["--config", shorten(folder / "config.yaml"), f"--model.learning_rate={best:.2g}"]
    print(f"Suggestion: {command('python', 'scripts/train.py', *words)}")


def range_test(
    trainer: pl.Trainer, model: LitGPT, data: pl.LightningDataModule
) -> tuple[list[float], list[float]]:
    """Learning rates tried, rising, and the smoothed loss at each, in nats a token.

    The run's schedule has no part in it. Nothing is logged, evaluated or saved.
    """
    callbacks, loggers = trainer.callbacks, trainer.loggers
    trainer.callbacks, trainer.loggers = [], []  # no guard: the loss explodes at the end
    trainer.strategy.checkpoint_io = InMemory()
    data.trainer = trainer
    with stop_at_once(), ExitStack() as stack:
        if not sys.stderr.isatty():  # where Lightning would draw its bar
            stack.enter_context(redirect_stderr(io.StringIO()))
        # Without the datamodule, whose validation would be evaluated.
        found = Tuner(trainer).lr_find(
            model,
            train_dataloaders=data.train_dataloader(),
            min_lr=FIRST,
            max_lr=LAST,
            num_training=NUM_STEPS,
            update_attr=False,
        )
    trainer.callbacks, trainer.loggers = callbacks, loggers
    rates, losses = found.results["lr"], found.results["loss"]
    # Its mean of the newest losses counts one step too many, so that it starts at half the loss.
    unbiased = [loss * (1 - BETA ** (n + 1)) / (1 - BETA**n) for n, loss in enumerate(losses, 1)]
    return rates[: len(losses)], unbiased


def suggestion(rates: list[float], losses: list[float]) -> float | None:
    """Where the loss falls fastest with the logarithm of the learning rate (Smith 2017).

    Lightning's own suggestion takes the slope over the learning rate itself, which is steepest
    where the rates are smallest: five times lower for this model. None: it never falls.
    """
    places = [n for n in range(SKIPPED, len(losses) - 1) if math.isfinite(losses[n + 1])]
    slopes = {n: losses[n + 1] - losses[n - 1] for n in places}  # the rates rise by one factor
    steepest = min(slopes, key=slopes.__getitem__, default=None)
    return rates[steepest] if steepest is not None and slopes[steepest] < 0 else None


def save_plot(rates: list[float], losses: list[float], best: float | None, path: Path) -> None:
    """Writes a page with the loss at each learning rate and the suggestion."""
    finite = [(r, x) for r, x in zip(rates, losses, strict=True) if math.isfinite(x)]
    points = finite[SKIPPED:]
    lowest = min((loss for _, loss in points), default=0.0)
    highest = 1.1 * points[0][1] if points else 1.0  # a loss that explodes may leave the chart
    line = Series("training loss", points)
    subtitle = "The loss never falls."
    if best is not None:
        note = f"suggestion: {best:.2g}"
        line = Series("training loss", points, mark=(best, dict(finite)[best]), note=note)
        subtitle = f"Suggested learning rate: {best:.2g}, where the loss falls fastest."
    chart = Chart(
        "Training loss, nats/token (smoothed)",
        [line],
        x_name="learning rate",
        log_x=True,
        y_range=(lowest - 0.05 * (highest - lowest), highest),
        main=True,
    )
    title = "Learning-rate range test"
    write_whole(path, charts_page("charts.html", title=title, subtitle=subtitle, charts=[chart]))
