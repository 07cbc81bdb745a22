"""A run with a budget ends with its time, on machines whose speed changes on the way."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch

from lit_gpt.callbacks.budget_clock import BudgetClock
from lit_gpt.checkpoint import read_checkpoint
from lit_gpt.evaluation import whole_text
from tests.conftest import Result

STEPS = 240
OPTIONS = {
    "model.schedule": "linear",
    "model.warmup_steps": 4,
    "model.dropout": 0.2,
    "trainer.max_steps": STEPS,
    "trainer.val_check_interval": 24,
    "trainer.log_every_n_steps": 20,
}
LEAVING = 1.0  # seconds between the end of training and that of the process


class Machine(pl.Callback):
    """A machine on which time passes only by what a run does.

    Args:
        speed: seconds of a step as a function of the steps done.
        hiccups: seconds that are lost, by the step after which.
    """

    WINDOW = 0.05  # seconds of a window in an evaluation, at a step a second
    SAVING = 0.2  # of a checkpoint

    def __init__(self, speed: Callable[[int], float] = lambda step: 1.0, **hiccups: float) -> None:
        self.speed = speed
        self.hiccups = hiccups
        self.seconds = 5.0
        self.step = 0
        self.rates: list[float] = []  # learning rate of each step
        self.losses: list[float] = []

    def clock(self) -> float:
        return self.seconds

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self.step = trainer.global_step
        parts = trainer.accumulate_grad_batches
        self.seconds += self.speed(self.step) / parts
        if batch_idx % parts == 0:
            self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])
            self.seconds += self.hiccups.get(f"at_{self.step}", 0.0)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.losses.append(outputs["loss"].item())

    def evaluate(self, windows: int) -> None:
        self.seconds += self.WINDOW * windows * self.speed(self.step)

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, *_) -> None:
        self.evaluate(len(batch[0]))

    def on_save_checkpoint(self, trainer, pl_module, checkpoint) -> None:
        self.seconds += self.SAVING * self.speed(self.step)


@pytest.fixture
def on(train, monkeypatch):
    """`on(machine, 120.0)`: trains there with this budget; None: without one."""
    read_windows = whole_text.read_windows

    def run(machine: Machine, budget: float | None, *args: str, useful: int | None = None, **more):
        def read(tokens, starts, length):
            machine.evaluate(len(starts))
            return read_windows(tokens, starts, length)

        monkeypatch.setattr(whole_text, "read_windows", read)
        clock = [BudgetClock(budget, useful, machine.clock)] if budget else []
        result = train(*args, callbacks=[*clock, machine], **OPTIONS | more)
        assert result.status == 0, result.err
        machine.seconds += LEAVING
        return result

    return run


@pytest.fixture
def budget(on, tmp_path) -> float:
    """With which the run needs no other number of steps, on a machine of constant speed."""
    machine = Machine()
    on(machine, None, **{"trainer.default_root_dir": tmp_path / "unlimited"})
    return machine.seconds / 0.98


def replanned(result: Result) -> list[tuple[int, int, int]]:
    """At which step, how many steps, and instead of how many: as it was printed."""
    lines = re.findall(r"Replanned at step (\d+): (\d+) steps instead of (\d+)", result.out)
    return [tuple(map(int, line)) for line in lines]


def weights(result: Result) -> dict[str, torch.Tensor]:
    return result.run.model.gpt.state_dict()


def same(result: Result, other: Result) -> bool:
    return all(torch.equal(w, weights(other)[name]) for name, w in weights(result).items())


def last_checkpoint(result: Result) -> Path:
    return result.run.folder / "checkpoints" / "last.ckpt"


def test_at_constant_speed_the_plan_is_kept(on, budget):
    machine = Machine()
    result = on(machine, budget)
    assert replanned(result) == []
    assert result.run.trainer.global_step == STEPS
    assert machine.seconds == pytest.approx(0.98 * budget)
    assert read_checkpoint(last_checkpoint(result))["hyper_parameters"]["horizons"] is None


SPEEDS: dict[str, Callable[[int], float]] = {
    "twice slower from the middle on": lambda step: 2.0 if step >= 120 else 1.0,
    "five times slower after an evaluation": lambda step: 5.0 if step >= 97 else 1.0,
    "five times slower after the last evaluation": lambda step: 5.0 if step >= 217 else 1.0,
    "twice slower from the start": lambda step: 2.0,
    "twice as fast from the middle on": lambda step: 0.5 if step >= 120 else 1.0,
    "five times as fast from the start": lambda step: 0.2,
    "twice as fast after the last evaluation": lambda step: 0.5 if step >= 217 else 1.0,
    "slower and slower": lambda step: 1.0 + step / 120,
    "uneven": lambda step: 0.6 + 0.8 * (step * 7919 % 13) / 12,
}


@pytest.mark.parametrize("name", SPEEDS)
def test_the_run_ends_with_its_time(on, budget, name):
    machine = Machine(SPEEDS[name])
    result = on(machine, budget)
    assert 0.95 * budget <= machine.seconds <= 1.05 * budget, result.out
    last = result.run.trainer.global_step
    assert last == result.run.trainer.max_steps == result.evaluated[-1]
    # Annealed: what the last step had left of the peak is less than a tenth.
    assert machine.rates[-1] < 0.1 * max(machine.rates)
    assert [step for step in result.evaluated if step % 24 == 0] == list(range(0, last + 1, 24))
    for step, steps, before in replanned(result):
        assert step < steps != before
