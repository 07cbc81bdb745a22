"""Owns one trial of a sweep: a training run in a process of its own that reports as it goes."""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
import traceback
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from lit_gpt.callbacks import evaluation
from lit_gpt.command import shortage
from lit_gpt.errors import UserError
from lit_gpt.training import train


class Pruned(Exception):
    """The sweep has seen enough of this run."""


class Report(pl.Callback):
    """Tells the sweep the validation bits per byte of each evaluation, and ends the run if told to.

    Bits per byte, since a loss can't be compared between tokenizers.
    """

    def __init__(self, connection: Connection) -> None:
        self.connection = connection

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.global_step:  # before the first step all runs look alike
            return
        bits_per_byte = trainer.callback_metrics["val/bits_per_byte"].item()
        share = trainer.global_step / trainer.max_steps if trainer.max_steps > 0 else 1.0
        self.connection.send(("evaluated", trainer.global_step, bits_per_byte, share))
        if self.connection.recv():
            raise Pruned


def die_with_parent() -> None:
    """Where the sweep is killed, its run ends too, and does not train on for nobody."""
    wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def run_trial(words: list[str], log: Path, connection: Connection) -> None:
    """Trains with these options, its output in the file `log`.

    Sends ("evaluated", step, bits per byte, share of the steps), each answered by whether to end
    here, then one of ("done", bits per byte, folder), ("pruned", None, folder) and
    ("failed", message, folder).
    """
    threading.Thread(target=die_with_parent, daemon=True).start()
    with log.open("wb") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    sys.stdout.reconfigure(encoding="utf-8", errors="replace", line_buffering=True)
    train.quieten()
    folder = ""
    try:
        training = train.TrainingCLI(words)
        training.trainer.callbacks.append(Report(connection))
        folder = training.trainer.log_dir or training.trainer.default_root_dir
        training.run()
        by_type: dict[type, Any] = {type(c): c for c in training.trainer.callbacks}
        result = by_type[evaluation.FinalEvaluation].result
        if result is None:
            raise UserError("the run ended without a final validation loss")
        connection.send(("done", result.bits_per_byte, folder))
    except Pruned:
        connection.send(("pruned", None, folder))
    except Exception as error:
        traceback.print_exc()
        connection.send(("failed", message_of(error), folder))


def check_options(runs: list[list[str]], connection: Connection) -> None:
    """Sends what is wrong with the first of these runs' options that can't be used, else None.

    Each is set up as far as it goes without leaving anything behind.
    """
    threading.Thread(target=die_with_parent, daemon=True).start()
    train.quieten()
    try:
        for words in runs:
            trainer = train.TrainingCLI(words).trainer
            if trainer.world_size > 1:  # Lightning would start this command once more for each
                raise UserError("a sweep trains on one device: leave out --trainer.devices")
    except Exception as error:
        connection.send(message_of(error))
    else:
        connection.send(None)


def message_of(error: Exception) -> str:
    told = str(error) if isinstance(error, UserError) else shortage(error)
    return " ".join((told or f"{type(error).__name__}: {error}").split())
