"""The record of a run in training: its history and report, written at each evaluation."""

from __future__ import annotations

import itertools
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Checkpoint

import lit_gpt
from lit_gpt.callbacks.evaluation import FinalEvaluation
from lit_gpt.callbacks.samples import Samples
from lit_gpt.errors import UserError
from lit_gpt.module import LitGPT
from lit_gpt.reports import report
from lit_gpt.reports.history import (
    EVALUATED,
    HISTORY,
    LOGGED,
    History,
    Session,
    read_history,
    read_run,
)
from lit_gpt.storage import atomic_write_text


class ReportWriter(Checkpoint):
    """Writes history.json and report.html into the run's folder.

    A Checkpoint only so that Lightning calls it after the samples and before those that save: all
    that a checkpoint continues is recorded.
    """

    def __init__(self, command: str, samples: Samples, final: FinalEvaluation) -> None:
        self.command = command
        self.samples = samples
        self.final = final
        self.card: list[tuple[str, str]] = []  # what the run prints at its start
        self.history: History | None = None
        self.options: dict[str, str] = {}
        self.has_warned = False

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.folder = Path(trainer.log_dir or trainer.default_root_dir)  # asks all ranks

    @contextmanager
    def warn_only(self, pl_module: pl.LightningModule) -> Iterator[None]:
        """A failed report must not end the run: if the disk is full, saving says so soon enough."""
        try:
            yield
        except Exception as error:
            if not self.has_warned:
                reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
                path = getattr(error, "filename2", None) or getattr(error, "filename", None)
                where = f" in {self.folder}" if path is None else f" to {path}"
                pl_module.print(f"Could not write the report{where}, training goes on: {reason}")
            self.has_warned = True

    def begin(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> History:
        """The history to record in: the folder's, if the run is resumed there."""
        history = History()
        try:
            history = read_history(self.folder)
        except FileNotFoundError:
            pass
        except UserError:
            history = self.without_damaged_file(pl_module)
        with suppress(UserError):  # the training command has said it already
            self.options = report.read_options(self.folder)
        versions = {"python": platform.python_version()}
        versions |= {name: version(name) for name in ("torch", "lightning", "tiktoken")}
        versions["lit_gpt"] = lit_gpt.__version__
        versions["system"] = f"{platform.system()} {platform.machine()}"
        history.begin(Session(trainer.global_step, time.time(), self.command, versions))
        history.card = self.card
        return history

    def without_damaged_file(self, pl_module: pl.LightningModule) -> History:
        """What the TensorBoard events still have of the run; the damaged history is kept aside."""
        damaged = self.folder / HISTORY
        aside = next(
            path
            for n in itertools.count()
            if not (path := self.folder / f"{HISTORY}.damaged{n or ''}").exists()
        )
        damaged.rename(aside)
        history = History()
        lost = "the curves and samples so far are lost"
        with suppress(UserError):
            history = read_run(self.folder)
            lost = "the curves are read from TensorBoard's events, earlier samples are lost"
        pl_module.print(f"{damaged} is damaged and now called {aside.name}: in the report, {lost}")
        return history

    def is_recording(self, trainer: pl.Trainer) -> bool:
        is_trial = trainer.fast_dev_run or trainer.sanity_checking  # type: ignore[attr-defined]
        return trainer.is_global_zero and not is_trial

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.is_recording(trainer) and self.history is None:  # no evaluation before
            with self.warn_only(pl_module):
                self.history = self.begin(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, i: int
    ) -> None:
        assert isinstance(pl_module, LitGPT)
        step = trainer.global_step
        is_step_done = (i + 1) % trainer.accumulate_grad_batches == 0
        if self.history and is_step_done and pl_module.is_logged(step):
            curves = pl_module.curves
            values = {name: float(f"{curves[name]:.6g}") for name in LOGGED if name in curves}
            self.history.add(step, values)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self.is_recording(trainer):
            return
        with self.warn_only(pl_module):
            if self.history is None:  # at step 0
                self.history = self.begin(trainer, pl_module)
            step = trainer.global_step
            metrics = trainer.callback_metrics
            values = {name: metrics[name].item() for name in EVALUATED if name in metrics}
            self.history.add(step, values | {"time": time.time()})
            if "trainer.max_steps" in self.options:  # BudgetClock may have set it anew
                self.options["trainer.max_steps"] = str(trainer.max_steps)
            if self.samples.texts:
                self.history.add_samples(step, self.samples.prompt_texts, self.samples.texts)
            self.write(self.history)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.history and self.is_recording(trainer):
            with self.warn_only(pl_module):
                self.history.final = self.final.result
                self.write(self.history)

    def write(self, history: History) -> None:
        history.save(self.folder)
        run = report.Run(self.folder.name, history, self.options)
        atomic_write_text(self.folder / report.REPORT, report.run_page(run))
