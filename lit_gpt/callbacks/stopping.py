"""Owns how a run is stopped: by a signal, --trainer.max_time or its last step, on all ranks."""

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

MAX_TIME = 1  # beside the numbers of signals, as a reason to stop; below those that we handle


class GracefulStop(Callback):
    """The first Ctrl-C or SIGTERM, or max_time, ends the run after the step in hand.

    It is saved at once: an evaluation that is due then is left to the run that goes on. A second
    Ctrl-C or SIGTERM ends the process at once. Also ends the run after max_steps, so that the last
    step is evaluated, on the interval or not.

    Args:
        max_time: how long this process may train, as Lightning's Timer takes it; the clock is
            looked at after each step, and whatever the time is, one step is done.

    Attributes:
        signal: the first signal that this process was sent, else 0.
        reason: why the run was stopped, the same on all ranks: a signal, MAX_TIME, else 0.
        owed: whether the evaluation after the newest step has still to be run.

    Raises:
        UserError: a max_time that is no time.
    """

    def __init__(self, max_time: str | timedelta | dict[str, int] | None = None) -> None:
        try:
            self.timer = Timer(max_time)
        except (MisconfigurationException, TypeError) as error:
            raise UserError(
                "--trainer.max_time must be DD:HH:MM:SS (days, hours, minutes, seconds, as "
                f"00:01:30:00), not {max_time!r}"
            ) from error
        self.signals = [signal.SIGINT, signal.SIGTERM]
        self.signal, self.reason = 0, 0
        self.insisted, self.owed = False, False
        self.old_handlers: dict[int, Any] = {}
        self.unfinished: Path | None = None  # the file that is being written, if it is there
        self.launcher: Any = None  # of the other ranks, where this process has started them

    @property
    def name(self) -> str:
        if self.reason == MAX_TIME:
            return "--trainer.max_time"
        return signal.Signals(self.reason).name if self.reason else ""

    @property
    def status(self) -> int:
        """The exit status: what a shell would say of Ctrl-C and SIGTERM; all else is a success."""
        return 128 + self.reason if self.reason in (signal.SIGINT, signal.SIGTERM) else 0

    def _handle(self, number: int, frame: Any) -> None:
        # SLURM's warning may well be followed by SIGTERM: that one doesn't yet insist.
        insists = number in (signal.SIGINT, signal.SIGTERM)
        if insists and self.insisted:
            self.leave(128 + number)
        self.insisted = self.insisted or insists
        self.signal = self.signal or number

    def leave(self, status: int) -> None:
        """Ends the process where it is: an exception inside torch.save can abort it."""
        if self.unfinished:
            self.unfinished.unlink(missing_ok=True)
        if self.launcher:
            self.launcher.kill(signal.SIGKILL)
        with suppress(RuntimeError):  # in the midst of printing
            sys.stdout.write("\x1b[?25h\n" if sys.stdout.isatty() else "")  # the bar hid the cursor
            sys.stdout.flush()
        os._exit(status)

    def __enter__(self) -> GracefulStop:
        """Listens from here on, also while the model is evaluated before and after training."""
        for number in self.signals:
            self.old_handlers[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception: Any) -> None:
        for number, handler in self.old_handlers.items():
            signal.signal(number, handler)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        # Lightning's own handlers save nothing, or inside a step, and hang under DDP.
        trainer._signal_connector.register_signal_handlers = lambda: None
        self.launcher = trainer.strategy.launcher

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.timer.on_train_start(trainer, pl_module)
        if self.owed:
            evaluation = trainer.fit_loop.epoch_loop.val_loop
            trainer.validating, evaluation.restarting = True, False  # as Lightning does it
            evaluation.run()
            trainer.training = True

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, i: int
    ) -> None:
        if (i + 1) % trainer.accumulate_grad_batches:
            return  # the step is not done: what it has added up would be lost
        done = trainer.global_step >= trainer.max_steps > 0
        time_left = self.timer.time_remaining()
        may = not done and trainer.global_step >= (trainer.min_steps or 0)
        late = may and time_left is not None and time_left <= 0
        self.reason = agreed(trainer, self.signal or late * MAX_TIME)
        if self.reason:
            self.owed = (i + 1) % trainer.val_check_batch == 0
            loop = trainer.fit_loop
            loop.epoch_loop._skip_next_val = True
            loop.min_epochs = loop.epoch_loop.min_steps = None  # else it would not stop
        if self.reason or done:
            trainer.should_stop = True

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.owed = False

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        if self.launcher:  # the other ranks would wait for this one
            self.launcher.kill(signal.SIGKILL)

    def state_dict(self) -> dict[str, Any]:
        return {"owed": self.owed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.owed = state_dict["owed"]


def agreed(trainer: pl.Trainer, reason: int) -> int:
    """The highest of all ranks' reasons to stop; each rank asks at the same point of the run."""
    if trainer.world_size == 1:
        return reason  # and a GPU is not waited for
    reasons = torch.tensor(reason, device=trainer.strategy.root_device)
    return int(trainer.strategy.reduce(reasons, reduce_op="max"))
