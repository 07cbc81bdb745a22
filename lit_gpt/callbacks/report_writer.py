"""Owns the record of a run in training: its history and its report, written at each evaluation."""

from __future__ import annotations

import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Checkpoint

import lit_gpt
from lit_gpt.callbacks import evaluation
from lit_gpt.callbacks.samples import Samples
from lit_gpt.command import shortage
from lit_gpt.errors import UserError
from lit_gpt.reports import report
from lit_gpt.reports.history import (
    EVALUATED,
    LOGGED,
    FinalResult,
    History,
    Session,
    read_history,
)
from lit_gpt.storage import write_whole


class ReportWriter(Checkpoint):
    """Writes history.json and report.html into the run's folder.

    A Checkpoint only so that Lightning calls it after the samples and before those that save: what
    a checkpoint goes on from, is recorded.

    Args:
        command: that made the run, as one would type it.
        final: holds the final loss, once it is known.
    """

    def __init__(self, command: str, final: evaluation.FinalEvaluation) -> None:
        self.command, self.final = command, final
        self.card: list[tuple[str, str]] = []  # what the run says at its start
        self.history: History | None = None
        self.said = False

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.folder = Path(trainer.log_dir or trainer.default_root_dir)  # asks all ranks

    @contextmanager
    def harmless(self, pl_module: pl.LightningModule) -> Iterator[None]:
        """No report is worth a run; but what a full disk does to it, it does to checkpoints."""
        try:
            yield
        except Exception as error:
            if shortage(error):
                raise
            if not self.said:
                pl_module.print(f"No report is written: {type(error).__name__}: {error}")
            self.said = True

    def begin(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Opens the history: that of the folder, if the run goes on there."""
        try:
            self.history = read_history(self.folder)
        except FileNotFoundError:
            self.history = History()
        except UserError as error:
            pl_module.print(f"The history of the run begins anew: {error}")
            self.history = History()
        self.options = report.read_options(self.folder)
        python = {"python": platform.python_version()}
        packages = {name: version(name) for name in ("torch", "lightning", "tiktoken")}
        versions = python | packages | {"lit_gpt": lit_gpt.__version__}
        versions["system"] = f"{platform.system()} {platform.machine()}"
        self.history.begin(Session(trainer.global_step, time.time(), self.command, versions))
        self.history.card = self.card

    def records(self, trainer: pl.Trainer) -> bool:
        return trainer.is_global_zero and not (trainer.fast_dev_run or trainer.sanity_checking)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.records(trainer) and self.history is None:  # else the evaluation before did it
            with self.harmless(pl_module):
                self.begin(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, i: int
    ) -> None:
        whole = (i + 1) % trainer.accumulate_grad_batches == 0
        if whole and pl_module.is_logged(trainer.global_step) and self.records(trainer):
            values = {name: pl_module.curves[name] for name in LOGGED if name in pl_module.curves}
            rounded = {name: float(f"{value:.6g}") for name, value in values.items()}
            if self.history:
                self.history.add(trainer.global_step, rounded)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self.records(trainer):
            return
        with self.harmless(pl_module):
            if self.history is None:  # at step 0
                self.begin(trainer, pl_module)
            step, metrics = trainer.global_step, trainer.callback_metrics
            values = {name: metrics[name].item() for name in EVALUATED if name in metrics}
            self.history.add(step, values | {"time": time.time()})
            samples = next(c for c in trainer.callbacks if isinstance(c, Samples))
            if samples.texts:
                self.history.add_samples(step, samples.beginnings, samples.texts)
            self.write()

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.records(trainer) and self.history:
            with self.harmless(pl_module):
                if result := self.final.result:
                    self.history.final = FinalResult(
                        result.loss, result.bits_per_byte, result.num_tokens
                    )
                self.write()

    def write(self) -> None:
        self.history.save(self.folder)
        run = report.Run(self.folder.name, self.history, self.options)
        write_whole(self.folder / report.REPORT, report.run_page(run))
