"""One trial of a sweep: a training run in a process of its own that reports as it trains."""

from __future__ import annotations

import io
import multiprocessing
import os
import sys
import tempfile
import threading
import traceback
from multiprocessing.connection import Connection, wait
from pathlib import Path

import lightning.pytorch as pl

from lit_gpt.command import as_user_error
from lit_gpt.errors import UserError
from lit_gpt.training.train import build_run, option_name, train
from lit_gpt.training.warning_filters import silence_warnings
from lit_gpt.tuning.search_space import no_budget


class Pruned(Exception):
    """The sweep has seen enough of this run."""


class Reporter(pl.Callback):
    """Tells the sweep the bits per byte of each evaluation, and ends the run if told to.

    Bits per byte, since losses of different tokenizers can't be compared.
    """

    def __init__(self, connection: Connection) -> None:
        self.connection = connection

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.global_step:  # before the first step, all runs are alike
            return
        bits_per_byte = trainer.callback_metrics["val/bits_per_byte"].item()
        share = trainer.global_step / trainer.max_steps if trainer.max_steps > 0 else 1.0
        self.connection.send(("evaluated", trainer.global_step, bits_per_byte, share))
        if self.connection.recv():
            raise Pruned


def die_with_parent() -> None:
    """Ends this process if the sweep is killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def prepare() -> None:
    """What each process of a sweep does first."""
    threading.Thread(target=die_with_parent, daemon=True).start()
    silence_warnings()


def run_trial(argv: list[str], log: Path, connection: Connection) -> None:
    """Trains with these options, its output in the file `log`.

    Sends ("evaluated", step, bits per byte, share of the steps), each answered by whether to stop
    there, then one of ("done", bits per byte, folder), ("pruned", None, folder) and
    ("failed", message, folder).
    """
    with log.open("wb") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    assert isinstance(sys.stdout, io.TextIOWrapper)
    sys.stdout.reconfigure(encoding="utf-8", errors="replace", line_buffering=True)
    folder = ""
    try:
        run = build_run(argv, callbacks=[Reporter(connection)])
        folder = str(run.folder)
        train(run)
        if run.final.result is None:
            raise UserError("the run ended without a final validation loss")
        connection.send(("done", run.final.result.bits_per_byte, folder))
    except Pruned:
        connection.send(("pruned", None, folder))
    except Exception as error:
        traceback.print_exc()
        connection.send(("failed", message_of(error), folder))


def check_options(runs: list[list[str]], connection: Connection) -> None:
    """Sends what is wrong with the first of these runs that can't be built, else None."""
    try:
        for argv in runs:
            with tempfile.TemporaryDirectory() as folder:
                run = build_run(argv, scratch=Path(folder))
            if run.options.budget is not None:  # in a file
                raise no_budget()
            if run.trainer.world_size > 1:  # Lightning would start the sweep for each
                raise UserError("a sweep trains on one device", hint="leave out `devices`")
    except Exception as error:
        connection.send(message_of(error))
    else:
        connection.send(None)


def message_of(error: Exception) -> str:
    """One line that says what went wrong."""
    known = as_user_error(error)
    return known.render(option_name) if known else f"{type(error).__name__}: {error}".strip()
