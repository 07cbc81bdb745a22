"""Stopping a run: by a signal, max_time or its last step, on all ranks at once."""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, Timer
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lit_gpt.errors import UserError

MAX_TIME = 1  # a reason to stop, as signal numbers are; lower, so that `agreed` prefers a signal
KILL = getattr(signal, "SIGKILL", signal.SIGTERM)  # Windows has only SIGTERM, which does the same


class GracefulStop(Callback):
    """Ends the run after the current step on the first Ctrl-C or SIGTERM, or after max_time.

    The step is saved at once, and an evaluation due then is left to the run that resumes it. A
    second Ctrl-C or SIGTERM ends the process at once. Also ends the run after max_steps, so that
    the last step is evaluated, on the interval or not.

    Args:
        max_time: how long this process may train, as Lightning's Timer takes it; checked after
            each step, so at least one step is done. A UserError if it isn't a time.

    Attributes:
        reason: why the run was stopped, the same on all ranks: a signal, MAX_TIME, else 0.
    """

    state_key = "GracefulStop"

    def __init__(self, max_time: str | timedelta | dict[str, int] | None = None) -> None:
        try:
            self.timer = Timer(max_time)
            if (self.timer.time_remaining() or 0) < 0:
                raise MisconfigurationException("a negative time")
        except (MisconfigurationException, TypeError) as error:
            raise UserError(
                "must be DD:HH:MM:SS (days, hours, minutes, seconds), such as 00:01:30:00",
                field="max_time",
                value=max_time,
            ) from error
        self.signals: list[int] = [signal.SIGINT, signal.SIGTERM]
        self.signal = 0  # the first that this process received
        self.reason = 0
        self.was_asked = False  # by Ctrl-C or SIGTERM
        self.evaluation_due = False  # after the newest step
        self.old_handlers: dict[int, Any] = {}
        self.unfinished: Path | None = None  # the file that is being written, if it exists
        self.launcher: Any = None  # of the other ranks, if this process started them

    @property
    def name(self) -> str:
        """Of the reason: max_time, SIGINT, ...; empty without one."""
        if self.reason == MAX_TIME:
            return "max_time"
        return signal.Signals(self.reason).name if self.reason else ""

    @property
    def status(self) -> int:
        """The exit status: a shell's for Ctrl-C and SIGTERM; anything else is a success."""
        return 128 + self.reason if self.reason in (signal.SIGINT, signal.SIGTERM) else 0

    def _handle(self, number: int, frame: Any) -> None:
        # SLURM's warning may be followed by SIGTERM, which is then the first request.
        is_request = number in (signal.SIGINT, signal.SIGTERM)
        if is_request and self.was_asked:
            self.leave(128 + number)
        self.was_asked = self.was_asked or is_request
        self.signal = self.signal or number

    def leave(self, status: int) -> None:
        """Ends the process at once: an exception inside torch.save can abort it."""
        if self.unfinished:
            self.unfinished.unlink(missing_ok=True)
        if self.launcher:
            self.launcher.kill(KILL)
        with suppress(RuntimeError):  # the signal came while something was being printed
            sys.stdout.write("\n" if sys.stdout.isatty() else "")  # ends the progress bar's line
            sys.stdout.flush()
        os._exit(status)

    def __enter__(self) -> GracefulStop:
        """Handles signals from here on, also in the evaluations before and after training."""
        self.old_handlers = {n: signal.signal(n, self._handle) for n in self.signals}
        return self

    def __exit__(self, *exception: Any) -> None:
        for number, handler in self.old_handlers.items():
            signal.signal(number, handler)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        keep_signal_handlers(trainer)
        self.launcher = trainer.strategy.launcher

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.timer.on_train_start(trainer, pl_module)
        if self.evaluation_due:
            # As Lightning's own loop evaluates, 2.6.6: docs/lightning-notes.md#private-apis.
            evaluation = trainer.fit_loop.epoch_loop.val_loop
            trainer.validating = True
            evaluation.restarting = False
            evaluation.run()
            trainer.training = True

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, i: int
    ) -> None:
        if (i + 1) % trainer.accumulate_grad_batches:
            return  # the step isn't done: its gradients so far would be lost
        is_done = trainer.global_step >= trainer.max_steps > 0
        time_left = self.timer.time_remaining()
        is_late = time_left is not None and time_left <= 0 and not is_done
        is_late = is_late and trainer.global_step >= (trainer.min_steps or 0)
        self.reason = agreed(trainer, self.signal or is_late * MAX_TIME)
        if self.reason:
            interval: Any = trainer.val_check_batch  # inf without evaluations
            self.evaluation_due = (i + 1) % interval == 0
            # Leaves the evaluation out, and lifts the lower limits, which would win over
            # should_stop: Lightning 2.6.6, docs/lightning-notes.md#private-apis.
            loop = trainer.fit_loop
            loop.epoch_loop._skip_next_val = True
            loop.min_epochs = None
            loop.epoch_loop.min_steps = None
        if self.reason or is_done:
            trainer.should_stop = True

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.evaluation_due = False

    def on_exception(self, *args: Any) -> None:
        if self.launcher:  # the other ranks would wait for this one
            self.launcher.kill(KILL)

    def state_dict(self) -> dict[str, Any]:
        return {"owed": self.evaluation_due}  # 0.1.0's name

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.evaluation_due = state_dict["owed"]


def keep_signal_handlers(trainer: pl.Trainer) -> None:
    """Keeps Lightning's signal handlers out: they save nothing, save mid-step, or hang under DDP.

    2.6.6, docs/lightning-notes.md#signals.
    """
    connector: Any = trainer._signal_connector
    connector.register_signal_handlers = lambda: None


def agreed(trainer: pl.Trainer, reason: int) -> int:
    """The highest of all ranks' reasons to stop; each rank asks at the same point of the run."""
    if trainer.world_size == 1:
        return reason  # without waiting for a GPU
    reasons = torch.tensor(reason, device=trainer.strategy.root_device)
    return int(trainer.strategy.reduce(reasons, reduce_op="max"))
