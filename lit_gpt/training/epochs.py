"""How long a run is, in steps and in epochs, and when it evaluates.

Lightning counts epochs and restarts the data at each; a run here is one endless epoch, so that a
resumed run knows its place. What is given in epochs becomes steps once the text is known.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import jsonargparse
import lightning.pytorch as pl

from lit_gpt.checkpoint import Checkpoint
from lit_gpt.data import TextDataModule
from lit_gpt.errors import UserError
from lit_gpt.training import slurm

if TYPE_CHECKING:
    from lit_gpt.training.options import TrainOptions


def prefer_epochs(config: jsonargparse.Namespace, given: Callable[[str], bool]) -> None:
    """Lets a number of epochs replace our default number of steps.

    Args:
        config: the Trainer's options, which this changes.
        given: whether an option was given, by its full name.
    """
    if config.max_epochs is not None and not given("trainer.max_steps"):
        config.max_steps = -1
    if config.check_val_every_n_epoch is not None and not given("trainer.val_check_interval"):
        config.val_check_interval = None


@dataclass(frozen=True)
class Epoch:
    """One pass over the training text, or over its first batches if they have a limit.

    Args:
        windows: how many it has, those of all devices together.
        step_windows: how many of them a step takes.
        context_length: tokens per window.
    """

    windows: int
    step_windows: int
    context_length: int

    @property
    def step_tokens(self) -> int:
        return self.step_windows * self.context_length

    def steps(self, epochs: float) -> int:
        """The fewest steps that cover this many epochs, at least one."""
        share = Fraction(str(epochs))  # 0.1 is a tenth
        return max(1, math.ceil(share * self.windows / self.step_windows))

    def count(self, steps: int) -> str:
        """A number of steps for people to read: `500 of 256 tokens, 1.6 epochs`."""
        epochs = steps * self.step_windows / self.windows
        number = f"{epochs:,.1f}" if epochs >= 0.1 else f"{epochs:.2g}"
        return f"{steps:,} of {self.step_tokens:,} tokens, {number} epochs"


def epoch_of(trainer: pl.Trainer, data: TextDataModule) -> Epoch:
    h = data.hparams
    batch = h.batch_size * trainer.world_size
    windows = data.order.epoch_windows
    if data.train_batches is not None:
        windows = data.train_batches * batch
    return Epoch(windows, batch * trainer.accumulate_grad_batches, h.context_length)


def set_limits(trainer: pl.Trainer, data: TextDataModule, options: dict[str, Any]) -> None:
    """Sets how long the trainer runs, which batches it sees and when it evaluates."""
    data.overfit = bool(options["overfit_batches"])
    name = "overfit_batches" if data.overfit else "limit_train_batches"
    data.train_batches = count_batches(trainer, data, name, options[name])
    if data.overfit and trainer.limit_val_batches:
        trainer.limit_val_batches = data.train_batches  # type: ignore[assignment]
    epoch = epoch_of(trainer, data)
    max_steps = options["max_steps"]
    if (epochs := options["max_epochs"] or -1) > 0:
        max_steps = min(epoch.steps(epochs), max_steps if max_steps >= 0 else math.inf)
    interval = options["val_check_interval"]
    if not isinstance(interval, int):  # a share of an epoch, or none
        interval = epoch.steps(interval or options["check_val_every_n_epoch"])
    # As fast_dev_run sets them, Lightning 2.6.6: docs/lightning-notes.md#epochs.
    trainer.fit_loop.epoch_loop.max_steps = max_steps
    trainer.fit_loop.epoch_loop.min_steps = min_steps(options, epoch, max_steps)
    # Lightning's interval counts batches; ours counts steps, like everything else here.
    trainer.val_check_interval = interval * trainer.accumulate_grad_batches


def check_horizons(trainer: pl.Trainer, horizons: Sequence[Sequence[int]] | None) -> None:
    """Refuses horizons that don't end where the run does."""
    if horizons and horizons[-1][1] != trainer.max_steps:
        raise UserError(
            f"end at step {horizons[-1][1]:,}, but the run at {trainer.max_steps:,}",
            field="horizons",
            value=[list(pair) for pair in horizons],
            hint=f"give `max_steps`={horizons[-1][1]}, or `horizons`=null for another length",
        )


def min_steps(options: dict[str, Any], epoch: Epoch, max_steps: int) -> int | None:
    """The steps before which nothing but a signal ends the run; None: there are none."""
    least = {"min_steps": options["min_steps"] or 0}
    if options["min_epochs"]:
        least["min_epochs"] = epoch.steps(options["min_epochs"])
    for name, steps in least.items():
        if steps > max_steps >= 0:
            problem = f"asks for {steps:,} steps, but the run has {max_steps:,}"
            hint = "raise `max_steps` or `max_epochs`"
            raise UserError(problem, field=name, value=options[name], hint=hint)
    return max(least.values()) or None


def count_batches(
    trainer: pl.Trainer, data: TextDataModule, name: str, limit: int | float | None
) -> int | None:
    """How many batches come round, on each device; None: without a limit."""
    if isinstance(limit, int):
        return limit
    if limit is None or (limit == 1 and not data.overfit):
        return None
    h = data.hparams
    windows = Fraction(str(limit)) * data.order.epoch_windows
    batches = int(windows / (h.batch_size * trainer.world_size))
    if batches < 1:
        problem = f"is less than one batch ({float(windows):.2g} windows)"
        raise UserError(problem, field=name, value=limit, hint="give a number of batches")
    return batches


def check_epochs_left(options: TrainOptions, epoch: Epoch, checkpoint: Checkpoint) -> None:
    """Refuses to resume a run that has done all its epochs, naming epochs rather than steps.

    Raises:
        UserError: it has.
        SystemExit: it has, and SLURM requeued the job that did them.
    """
    config = options.config
    epochs = config.trainer.max_epochs
    step = checkpoint.global_step or 0
    if epochs is None or epochs < 1 or epoch.steps(epochs) > step:
        return
    if slurm.checkpoint_of_job(config.trainer.default_root_dir or ".", options.argv):
        slurm.end_done("max_epochs", epochs)
    raise UserError(
        f"ends at step {epoch.steps(epochs):,}, and {checkpoint.path} is at step {step:,}",
        field="max_epochs",
        value=epochs,
        hint="raise it, or set it to null and give `max_steps`",
    )
