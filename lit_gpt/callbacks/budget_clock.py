"""Keeping a run's time: its last step is moved where it would end too early or too late."""

from __future__ import annotations

import statistics
from bisect import bisect_right
from collections import defaultdict, deque
from collections.abc import Callable
from itertools import islice
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback

from lit_gpt.callbacks.evaluation import FinalEvaluation
from lit_gpt.callbacks.stopping import agreed
from lit_gpt.command import seconds_since_start
from lit_gpt.errors import UserError, check_least

TARGET = 0.98  # of the budget: where the end is aimed at
AT_EVALUATIONS = 0.01  # of the budget: a larger miss is corrected
BETWEEN = 0.03  # the same between evaluations, where less is known
LEAVING = 1.0  # seconds from the end of training to that of the process, the final loss left out
PRESENT = 0.15  # of the steps that are left: so many past ones show how long these will take
LEAST_STEPS = 5
FURTHEST = 1 << 40  # no run has more steps


class Pace:
    """How long the parts of a run take now.

    A machine that becomes slower does so for steps and evaluations alike. So the seconds of an
    evaluation are kept with those that a step was expected to take at that time.
    """

    def __init__(self) -> None:
        self.steps: deque[float] = deque(maxlen=10_000)  # seconds of each
        self.others: dict[str, deque[tuple[float, float]]] = defaultdict(lambda: deque(maxlen=3))

    def step(self, num_newest: int) -> float:
        """Seconds of a step: the mean of the newest, without the slowest tenth, perhaps stalled."""
        newest = sorted(islice(reversed(self.steps), num_newest))
        stalled = max(1, len(newest) // 10) if len(newest) > 2 else 0
        return statistics.fmean(newest[: len(newest) - stalled]) if newest else 0.0

    def add(self, part: str, seconds: float, step: float) -> None:
        self.others[part].append((seconds, step))

    def of(self, part: str, step: float) -> float:
        """Seconds of another part when a step takes `step` seconds."""
        known = [pair for pair in self.others[part] if pair[1]] or self.others[part]
        seconds = [taken * step / then if then else taken for taken, then in known]
        return statistics.median(seconds) if seconds else 0.0


class BudgetClock(Callback):
    """Plans another last step for a new run whose process would not end on time.

    It aims at 98 % of the budget. At each evaluation, before its checkpoints are saved, it corrects
    a plan that would miss that by more than a hundredth of the budget; between evaluations, one
    that would miss it by three hundredths, if the next evaluation comes too late. A step is
    expected to take as long as the latest did, 15 % as many as are left: a stall of some seconds
    doesn't end a long run early, and a run near its end follows each change.

    The plan is in LitGPT's `horizons`, by which the run can be repeated. A resumed run keeps its
    plan, so that it equals one without interruption.

    Args:
        seconds: the budget, from the start of the process to its end.
        max_useful_steps: more are never planned; None: without a limit.
        clock: seconds since the start of the process.
        window: seconds of an evaluated window, as expected, until one was evaluated.

    Raises:
        UserError: no time at all.
    """

    def __init__(
        self,
        seconds: float,
        max_useful_steps: int | None = None,
        clock: Callable[[], float] = seconds_since_start,
        window: float = 0.0,
    ) -> None:
        if not seconds > 0:
            raise UserError("must be above 0", field="budget", value=seconds)
        check_least(1, max_useful_steps=max_useful_steps)
        self.seconds = seconds
        self.max_useful_steps = max_useful_steps
        self.window = window
        self.clock = clock
        self.pace = Pace()
        self.is_planning = False
        self.final_windows = 0.0  # that this process evaluates at the end
        self.num_windows = 0  # of the present evaluation
        self.began = 0.0  # the present evaluation
        self.since = 0.0  # of the present step, or of what follows an evaluation
        self.checked = 0.0  # when the plan was last looked at between evaluations
        self.is_paused = False  # by an evaluation and what follows it
        self.is_due = False  # the first evaluation's plan, which waits until a checkpoint was saved

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.is_planning = trainer.global_step == 0 and trainer.max_steps > 0
        if trainer.global_step:
            pl_module.print(
                f"The budget was planned when the run began: it ends at step {trainer.max_steps:,}"
            )
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, FinalEvaluation) and callback.max_tokens != 0:
                whole = callback.batches(trainer.datamodule)  # type: ignore[attr-defined]
                self.final_windows = (len(whole.starts) + (whole.rest > 0)) / trainer.world_size
        self.is_paused = False
        self.since = self.clock()

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        if self.is_paused:
            self.is_paused = False
            self._add(trainer, "saving", self._lap())

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, i: int
    ) -> None:
        if (i + 1) % trainer.accumulate_grad_batches == 0:
            self.pace.steps.append(self._lap())
            is_evaluated = trainer.global_step % interval(trainer) == 0  # next, and plans then
            if not is_evaluated and len(self.pace.steps) >= 3:
                choose = self._last_step if self.is_due else self._last_step_between
                self._plan(trainer, pl_module, choose)
                self.is_due = False

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.num_windows = 0
        self.began = self.clock()

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        self.num_windows += len(batch[0])

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.strategy.root_device.type != "cpu":
            torch.accelerator.synchronize()
        if self.num_windows:
            self._add(trainer, "window", (self.clock() - self.began) / self.num_windows)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.since = self.clock()
        self.is_paused = True
        self._add(trainer, "evaluation", self.since - self.began)
        if self.pace.steps:
            self.is_due = not self.pace.others["saving"]  # as soon as a checkpoint was timed
            if not self.is_due:
                self._plan(trainer, pl_module, self._last_step)

    def _lap(self) -> float:
        """Seconds since the last lap."""
        now = self.clock()
        seconds, self.since = now - self.since, now
        return seconds

    def _step(self, trainer: pl.Trainer) -> float:
        """Seconds of a step, as far as can be told now."""
        left = trainer.max_steps - trainer.global_step
        return self.pace.step(max(LEAST_STEPS, round(PRESENT * left)))

    def _add(self, trainer: pl.Trainer, part: str, seconds: float) -> None:
        self.pace.add(part, seconds, self._step(trainer))

    def _plan(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        choose: Callable[[pl.Trainer], tuple[int, float]],
    ) -> None:
        """Sets the last step that rank 0 chooses, on all ranks."""
        step, planned = trainer.global_step, trainer.max_steps
        if not self.is_planning or step >= planned:
            return
        chosen, end = choose(trainer) if trainer.is_global_zero else (0, 0.0)
        last = agreed(trainer, chosen)
        if last == planned:
            return
        horizons = pl_module.hparams["horizons"] or [(0, planned)]
        pl_module.hparams["horizons"] = [*map(list, horizons), [step, last]]
        # As the Trainer's own limit is set, Lightning 2.6.6: docs/lightning-notes.md#epochs.
        trainer.fit_loop.epoch_loop.max_steps = last
        pl_module.print(
            f"Replanned at step {step:,}: {last:,} steps instead of {planned:,} "
            f"({planned:,} would end after {end:,.1f} s of {self.seconds:,.0f} s)"
        )

    def _last_step_between(self, trainer: pl.Trainer) -> tuple[int, float]:
        """As `_last_step`, if the next evaluation would come too late to decide."""
        step, planned, every = trainer.global_step, trainer.max_steps, interval(trainer)
        if self.clock() - self.checked < BETWEEN / 10 * self.seconds:
            return planned, 0.0
        self.checked = self.clock()
        pace = self._step(trainer)
        next_evaluation = (step // every + 1) * every
        pause = self.pace.of("evaluation", pace) + self.pace.of("saving", pace)
        wait = (next_evaluation - step) * pace + pause
        left = TARGET * self.seconds - self.clock() - self._closing(pace)
        if next_evaluation < planned and wait <= left / 2:
            return planned, 0.0
        return self._last_step(trainer, BETWEEN)

    def _last_step(
        self, trainer: pl.Trainer, tolerance: float = AT_EVALUATIONS
    ) -> tuple[int, float]:
        """The last step to plan for, and after how many seconds the present plan would end.

        It is the present one unless that misses the target by more than a share of the budget.
        """
        step, planned, every = trainer.global_step, trainer.max_steps, interval(trainer)
        pace = self._step(trainer)
        now = self.clock()
        saving = self.pace.of("saving", pace)
        pause = self.pace.of("evaluation", pace) + saving

        def end(last: int) -> float:
            pauses = last // every - step // every + (last % every > 0)
            training = (last - step) * pace + pauses * pause
            return now + self.is_paused * saving + training + self._closing(pace)

        target = TARGET * self.seconds
        expected = end(planned)
        if pace <= 0 or abs(expected - target) <= tolerance * self.seconds:
            return planned, expected
        least = max(step + 1, trainer.min_steps or 0)
        last_steps = range(least, max(least, self.max_useful_steps or FURTHEST) + 1)
        found = bisect_right(last_steps, target, key=end)  # the first that is later
        nearest = last_steps[max(0, found - 1) : found + 1]
        in_time = [last for last in nearest if end(last) <= self.seconds] or nearest[:1]
        return min(in_time, key=lambda last: abs(end(last) - target)), expected

    def _closing(self, pace: float) -> float:
        """Seconds from the last evaluation to the end of the process."""
        return self.final_windows * (self.pace.of("window", pace) or self.window) + LEAVING


def interval(trainer: pl.Trainer) -> float:
    """Steps between evaluations; infinity: there are none."""
    batches: Any = trainer.val_check_batch
    return batches // trainer.accumulate_grad_batches
