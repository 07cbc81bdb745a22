"""A run with a budget ends with its time, on machines whose speed changes on the way."""

from __future__ import annotations

import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import yaml

from lit_gpt.callbacks.budget_clock import BudgetClock
from lit_gpt.callbacks.progress import ProgressBar
from lit_gpt.checkpoint import read_checkpoint
from lit_gpt.errors import UserError
from lit_gpt.evaluation import whole_text
from lit_gpt.optim import learning_rate_factor
from tests.conftest import ROOT, Result, command_line

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

    def __init__(
        self,
        speed: Callable[[int], float] = lambda step: 1.0,
        hiccups: dict[int, float] | None = None,
    ) -> None:
        self.speed = speed
        self.hiccups = hiccups or {}
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
            self.seconds += self.hiccups.get(self.step, 0.0)

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

    def run(
        machine: Machine,
        budget: float | None,
        *args: str,
        useful: int | None = None,
        window: float = 0.0,
        more: Sequence[pl.Callback] = (),
        status: int = 0,
        options: dict[str, Any] = OPTIONS,
        **others: Any,
    ) -> Result:
        def read(tokens, starts, length):
            machine.evaluate(len(starts))
            return read_windows(tokens, starts, length)

        monkeypatch.setattr(whole_text, "read_windows", read)
        clock = [BudgetClock(budget, useful, machine.clock, window)] if budget else []
        result = train(*args, callbacks=[*more, *clock, machine], **options | others)
        assert result.status == status, result.err
        machine.seconds += LEAVING
        return result

    return run


known: list[float] = []


@pytest.fixture
def budget(on, tmp_path) -> float:
    """With which the run needs no other number of steps, on a machine of constant speed."""
    if not known:  # the same for each test
        machine = Machine()
        on(machine, None, **{"trainer.default_root_dir": tmp_path / "unlimited"})
        known.append(machine.seconds / 0.98)
    return known[0]


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
    "three times as fast from the start": lambda step: 1 / 3,
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


@pytest.mark.parametrize("step", [100, 119, 120, 230])  # within an interval, at its ends, the last
def test_a_hiccup_costs_its_own_time_and_no_more(on, budget, step):
    """Ten seconds are nine steps and their share of the evaluations, not a slower machine."""
    machine = Machine(hiccups={step: 10.0})
    result = on(machine, budget)
    assert 0.95 * budget <= machine.seconds <= 1.05 * budget
    assert STEPS - 12 <= result.run.trainer.global_step <= STEPS


@pytest.mark.parametrize("step", [30, 60, 120, 150])
@pytest.mark.parametrize(("steps", "slower"), [(3, 10), (4, 6), (10, 3)])
def test_a_stall_is_not_taken_for_the_machines_speed(on, budget, step, steps, slower):
    """Some 20 of 270 seconds are lost, and with them 20 steps, not the learning rate."""
    stalled = Machine(lambda at: slower if step <= at < step + steps else 1.0)
    result = on(stalled, budget)
    assert 0.95 * budget <= stalled.seconds <= 1.05 * budget
    assert all(last >= 0.5 * STEPS for _, last, _ in replanned(result))
    assert result.run.trainer.global_step >= STEPS - 40
    straight = [min(1.0, (at + 1) / 4, 1 - (at - 4) / (STEPS - 4)) for at in range(STEPS)]
    for rate, share in zip(stalled.rates, straight, strict=False):
        assert rate >= (share - 0.25) * max(stalled.rates)


def test_a_hiccup_of_an_evaluation_is_not_expected_of_the_next_ones(on, budget):
    machine = Machine()
    lost = pl.Callback()
    lost.on_validation_start = lambda trainer, _: setattr(
        machine, "seconds", machine.seconds + 10.0 * (trainer.global_step == 72)
    )
    result = on(machine, budget, more=[lost])
    assert 0.95 * budget <= machine.seconds <= 1.05 * budget
    assert STEPS - 12 <= result.run.trainer.global_step <= STEPS


def test_without_evaluations_the_final_loss_is_given_the_time_that_was_expected(on, budget):
    none = {"trainer.limit_val_batches": 0}
    machine = Machine()
    machine.WINDOW = 1.0
    on(machine, 2 * budget, window=1.0, **none)
    assert 0.95 < machine.seconds / (2 * budget) <= 1.0


def test_no_more_steps_are_planned_than_are_useful(on, budget):
    result = on(Machine(lambda step: 0.5), budget, useful=260)
    assert result.run.trainer.global_step == 260
    assert {last for _, last, _ in replanned(result)} == {260}


def test_a_run_that_is_late_already_ends_at_once_and_not_before_min_steps(on):
    assert on(Machine(lambda step: 9.0), 30.0).run.trainer.global_step < 10
    late = on(Machine(lambda step: 9.0), 30.0, **{"trainer.min_steps": 26})
    assert late.run.trainer.global_step == 26


def factor(step: int, horizons: list[list[int]], warmup: int, schedule: str, least: float) -> float:
    """The learning rate's share of its peak, by going from step to step.

    Each step takes an equal part of what is left until the last step of the plan of its time. A
    new plan first gives back what a run of its length wouldn't have taken.
    """
    if step < warmup:
        return (step + 1) / warmup
    left = 1.0
    for at in range(warmup, step):
        begun, last = [(start, last) for start, last in horizons if start <= at][-1]
        if at == begun:
            left = max(left, (last - at) / (last - warmup))
        left -= left / max(1, last - at) if at < last else 0.0
    share = left if schedule == "linear" else (1 + math.cos(math.pi * (1 - left))) / 2
    return least + (1 - least) * share


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize(
    ("horizons", "warmup"),
    [
        ([[0, 50]], 0),
        ([[0, 50], [30, 48]], 0),
        ([[0, 50], [30, 48], [40, 80], [79, 80]], 4),
        ([[0, 50], [3, 20]], 10),  # within the warm-up
        ([[0, 50], [30, 31]], 5),
    ],
)
def test_the_learning_rate_goes_from_where_it_is_to_its_end(horizons, warmup, schedule):
    last = horizons[-1][1]
    found = [
        learning_rate_factor(step, last, warmup, schedule, 0.1, horizons)
        for step in range(last + 2)
    ]
    expected = [factor(step, horizons, warmup, schedule, 0.1) for step in range(last + 2)]
    assert found == pytest.approx(expected, abs=1e-9)
    assert found[last] == pytest.approx(0.1)
    for i in range(1, len(horizons)):  # what was before is not changed, not by a bit
        before = horizons[:i]
        for step in range(horizons[i][0] + 1):
            assert found[step] == learning_rate_factor(step, -1, warmup, schedule, 0.1, before)


def test_a_straight_line_by_hand():
    """Half of the rate is left after 25 of 50 steps: 15 steps more take it to nothing."""
    horizons = [[0, 50], [25, 40]]
    found = [learning_rate_factor(step, 40, 0, "linear", 0.0, horizons) for step in (25, 28, 40)]
    assert found == pytest.approx([0.5, 0.4, 0.0])
    assert learning_rate_factor(30, 40, 0, "constant", 0.0, horizons) == 1.0


def test_a_longer_plan_gives_the_rate_back_that_a_shorter_one_took():
    """Planned for 100, for 30 at step 20, and for 100 again at 25: then as if never shortened."""
    horizons = [[0, 100], [20, 30], [25, 100]]
    found = [learning_rate_factor(at, 100, 0, "linear", 0.0, horizons) for at in (20, 25, 26, 60)]
    assert found == pytest.approx([0.8, 0.4, 0.74, 0.4])


def halting(step: int) -> float:
    return 1.0 if step < 110 else 1.4


def horizons_of(result: Result) -> list[list[int]]:
    saved = read_checkpoint(last_checkpoint(result))["hyper_parameters"]["horizons"]
    return [list(pair) for pair in saved]


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_the_printed_horizons_repeat_the_run(on, budget, tmp_path, schedule):
    machine = Machine(halting)
    result = on(machine, budget, **{"model.schedule": schedule})
    horizons = horizons_of(result)
    assert horizons == [[0, STEPS], *([step, last] for step, last, _ in replanned(result))]
    assert len(horizons) > 1
    options = {"trainer.max_steps": horizons[-1][1], "model.horizons": horizons}
    options |= {"model.schedule": schedule, "trainer.default_root_dir": tmp_path / "again"}
    same_machine = Machine()
    again = on(same_machine, None, **options)
    assert same_machine.losses == machine.losses
    assert same_machine.rates == machine.rates
    assert same(again, result)
    assert again.steps == result.steps


def test_the_config_and_the_checkpoints_have_the_newest_plan(on, budget, tmp_path):
    machine = Machine(halting)
    result = on(machine, budget)
    horizons = horizons_of(result)
    saved = read_checkpoint(last_checkpoint(result))
    config = yaml.safe_load((result.run.folder / "config.yaml").read_text())
    for options in (saved["options"], config):
        assert options["model"]["horizons"] == horizons
        assert options["trainer"]["max_steps"] == horizons[-1][1]
    assert saved["trainer"]["max_steps"] == horizons[-1][1]
    same_machine = Machine()
    places = {"trainer.default_root_dir": tmp_path / "again"}
    config_file = f"--config={result.run.folder / 'config.yaml'}"
    again = on(same_machine, None, config_file, defaults=places, options={})
    assert same(again, result)
    page = (result.run.folder / "report.html").read_text()
    assert f"of {horizons[-1][1]:,}" in page


class Stop(pl.Callback):
    """Ends the process's training by Ctrl-C during a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if trainer.global_step == self.step:
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("stop", [130, 160, 191])  # before, after and at an evaluation
@pytest.mark.parametrize("options", ["those of its config.yaml", "those it began with"])
def test_a_resumed_run_is_the_one_without_interruption(on, budget, tmp_path, stop, options):
    """And it plans nothing anew, on a machine that is fast again."""
    first = Machine(halting)
    stopped = on(first, budget, more=[Stop(stop)], status=130)
    horizons = horizons_of(stopped)
    assert len(horizons) > 1
    second = Machine(lambda step: 0.1)
    args = ["--ckpt_path=last"]
    settings: dict[str, Any] = {}
    if options == "those of its config.yaml":
        args = [f"--config={stopped.run.folder / 'config.yaml'}", *args]
        settings = {"options": {"trainer.default_root_dir": tmp_path / "logs"}, "defaults": {}}
    resumed = on(second, budget, *args, **settings)
    assert replanned(resumed) == []
    assert f"The budget was planned when the run began: it ends at step {horizons[-1][1]}" in (
        resumed.out
    )
    assert "different options" not in resumed.out
    assert horizons_of(resumed) == horizons
    whole = Machine()
    given = {"trainer.max_steps": horizons[-1][1], "model.horizons": horizons}
    result = on(whole, None, **given, **{"trainer.default_root_dir": tmp_path / "whole"})
    assert first.losses + second.losses == whole.losses
    assert same(resumed, result)


def test_a_replan_after_the_last_checkpoint_is_forgotten_by_a_kill(on, budget, tmp_path):
    """The checkpoint has an earlier plan: the resumed run is exactly the run of that plan."""
    machine = Machine(lambda step: 4.0 if step >= 170 else 1.0)
    planned: list[int] = []

    class Copy(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
            if trainer.global_step == 185:
                planned.append(trainer.max_steps)
                shutil.copytree(trainer.log_dir, tmp_path / "killed" / "version_0")

    result = on(machine, budget, more=[Copy()])
    assert 168 < replanned(result)[0][0] < 185
    assert planned[0] < STEPS
    resumed = on(
        Machine(), None, "--ckpt_path=last", **{"trainer.default_root_dir": tmp_path / "killed"}
    )
    whole = on(Machine(), None, **{"trainer.default_root_dir": tmp_path / "whole"})
    assert same(resumed, whole)


def test_another_max_steps_ends_the_plan(on, budget):
    """It is the user's: an ordinary schedule of that length, which is said."""
    result = on(Machine(halting), budget)
    last = horizons_of(result)[-1][1]
    options = {"ckpt_path": "last", "trainer.max_steps": 2 * last}
    longer = on(Machine(), None, **options)
    assert f"max_steps {last} -> {2 * last}, so the learning rate jumps from 0 to" in longer.out
    assert longer.run.model.hparams.horizons is None
    assert longer.run.trainer.global_step == 2 * last


@pytest.mark.parametrize(
    ("horizons", "problem"),
    [
        ("[]", "must be [step, last step] pairs"),
        ("[[5, 240]]", "must be [step, last step] pairs"),
        ("[[0, 0]]", "must be [step, last step] pairs"),
        ("[[0, 300], [100, 250], [100, 240]]", "must be [step, last step] pairs"),
        ("[[0, 300], [100, 90]]", "must be [step, last step] pairs"),
        ("[[0, 200], [210, 240]]", "must be [step, last step] pairs"),
        ("[[0, 300], [100, 250]]", "end at step 250, but the run at 240"),
        ("[[0, 240, 1]]", "--model.horizons"),
        ("[0, 240]", "--model.horizons"),
        ("[[0, 240.5]]", "--model.horizons"),
    ],
)
def test_what_is_no_plan_is_one_line(train, horizons, problem):
    result = train(**OPTIONS | {"model.horizons": horizons})
    assert result.status == 2
    assert len(result.err.splitlines()) == 1
    assert result.err.startswith("error: ")
    assert problem in result.err
    assert "--model.horizons" in result.err


def test_a_strangers_horizons_are_not_taken(on, budget):
    result = on(Machine(halting), budget, more=[Stop(130)], status=130)
    path = last_checkpoint(result)
    contents = read_checkpoint(path)
    contents["hyper_parameters"]["horizons"] = [[0, "many"]]
    torch.save(contents, path)
    resumed = on(Machine(), None, **{"ckpt_path": "last"})
    assert resumed.run.trainer.global_step == STEPS


def test_the_bar_counts_to_the_new_last_step(on, budget):
    result = on(Machine(lambda step: 2.0), budget)
    (bar,) = [c for c in result.run.trainer.callbacks if isinstance(c, ProgressBar)]
    trainer = result.run.trainer
    bar.last_refresh = 0.0
    bar.train_progress_bar.total = STEPS
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ProgressBar, "is_enabled", True)
        bar.on_train_batch_end(trainer, result.run.model, None, None, 0)
    assert bar.train_progress_bar.total == trainer.global_step < STEPS


@pytest.mark.parametrize("seconds", [0, -1, math.nan])
def test_no_time_is_no_budget(seconds):
    with pytest.raises(UserError, match="must be above 0"):
        BudgetClock(seconds)


@pytest.mark.slow
def test_all_processes_follow_the_first_ones_clock(start, tmp_path):
    """58.8 s less 1 s to leave are 57.8 s, of which 20 steps take 20 s: 37 s are 19 steps more."""
    options = {"trainer.callbacks": "tests.callbacks.slow_rank.SlowRank"}
    options |= {"trainer.callbacks.folder": tmp_path, "trainer.strategy": "ddp"}
    options |= {"trainer.devices": 2, "trainer.max_steps": 58, "trainer.val_check_interval": 5}
    code, out, err = start(env={"PYTHONPATH": str(ROOT)}, **options).end()
    assert code == 0, err
    printed = [line for line in out if line.startswith("Replanned")]
    assert ": 39 steps instead of " in printed[-1]  # by one process only
    assert printed[-1] not in printed[:-1]
    ranks = [(tmp_path / f"rank-{rank}.txt").read_text() for rank in (0, 1)]
    assert ranks[0] == ranks[1]
    assert ranks[0].startswith("39 39 [[0, 58], ")


@pytest.mark.slow
def test_a_minute_is_a_minute_also_when_the_machine_becomes_slow(places, tmp_path):
    """In real time: other processes take the processor away from the middle on."""
    argv = command_line(places | {"budget": "1m", "trainer.accelerator": "cpu"})
    hogs: list[subprocess.Popen] = []
    begin = time.monotonic()
    command = [sys.executable, "-u", str(ROOT / "scripts" / "train.py"), *argv]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                if line.startswith("Step: ") and time.monotonic() > begin + 30 and not hogs:
                    hog = [sys.executable, "-c", "while True: pass"]
                    hogs += [subprocess.Popen(hog) for _ in range(2 * (os.cpu_count() or 1))]
        finally:
            seconds = time.monotonic() - begin
            for other in hogs:
                other.kill()
                other.wait()
    assert process.returncode == 0
    assert hogs
    assert 57 <= seconds <= 63
