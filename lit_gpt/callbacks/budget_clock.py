"""Keeping a run's time: its last step is moved where it would end too early or too late."""

from __future__ import annotations

import statistics
from bisect import bisect_right
from collections import defaultdict, deque
from collections.abc import Callable
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
NEWEST = (5, 100)  # steps, at least and at most, whose median is the present pace
FURTHEST = 1 << 40  # no run has more steps


class Pace:
    """How long the parts of a run take now: by the newest of each, without outliers.

    A machine that becomes slower does so for steps and evaluations alike. So an evaluation's
    seconds are kept with those of a step at that time.
    """

    def __init__(self) -> None:
        self.steps: deque[float] = deque(maxlen=10_000)  # seconds of each
        self.others: dict[str, deque[tuple[float, float]]] = defaultdict(lambda: deque(maxlen=3))
        self.num_newest = NEWEST[0]

    def average(self) -> float:
        """Seconds of a step: the mean of the newer half without its longest twentieth."""
        newer = sorted(list(self.steps)[len(self.steps) // 2 :])
        dropped = max(1, len(newer) // 20) if len(newer) > 2 else 0
        return statistics.fmean(newer[: len(newer) - dropped])

    def now(self) -> float:
        """Seconds of a step at this moment."""
        return statistics.median(list(self.steps)[-self.num_newest :])

    def add(self, part: str, seconds: float) -> None:
        self.others[part].append((seconds, self.average() if self.steps else 0.0))

    def of(self, part: str, step: float) -> float:
        """Seconds of another part when a step takes `step` seconds."""
        known = [pair for pair in self.others[part] if pair[1]] or self.others[part]
        seconds = [taken * step / then if then else taken for taken, then in known]
        return statistics.median(seconds) if seconds else 0.0

    def begin_interval(self, moment: float) -> None:
        """Drops all but the newest steps; `moment`: how many seconds they should cover."""
        if average := self.average():
            least, most = NEWEST
            self.num_newest = min(most, max(least, round(moment / average)))
        while len(self.steps) > 2 * self.num_newest:
            self.steps.popleft()


class BudgetClock(Callback):
    """Plans another last step for a new run whose process would not end on time.

    It aims at 98 % of the budget. At each evaluation, before its checkpoints are saved, it corrects
    a plan that would miss that by more than a hundredth of the budget; between evaluations, one
    that would miss it by three hundredths, if the next evaluation comes too late. The plan is in
    LitGPT's `horizons`, by which the run can be repeated. A resumed run keeps its plan, so that it
    equals one without interruption.

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

    def on_train_batch_start(self, *args: Any) -> None:
        if self.is_paused:
            self.is_paused = False
            self.pace.add("saving", self._lap())

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, i: int
    ) -> None:
        if (i + 1) % trainer.accumulate_grad_batches == 0:
            self.pace.steps.append(self._lap())
            choose = self._last_step if self.is_due else self._last_step_now
            is_evaluated = trainer.global_step % interval(trainer) == 0  # next, and plans then
            if not is_evaluated and len(self.pace.steps) >= 3:
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
            self.pace.add("window", (self.clock() - self.began) / self.num_windows)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.since = self.clock()
        self.is_paused = True
        self.pace.add("evaluation", self.since - self.began)
        if self.pace.steps:
            self.is_due = not self.pace.others["saving"]  # as soon as a checkpoint was timed
            if not self.is_due:
                self._plan(trainer, pl_module, self._last_step)
            self.pace.begin_interval(AT_EVALUATIONS * self.seconds)

    def _lap(self) -> float:
        """Seconds since the last lap."""
        now = self.clock()
        seconds, self.since = now - self.since, now
        return seconds

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

    def _last_step(self, trainer: pl.Trainer) -> tuple[int, float]:
        """The last step to plan for, and after how many seconds the present plan would end."""
        return self._in_time(trainer, self.pace.average(), AT_EVALUATIONS)

    def _last_step_now(self, trainer: pl.Trainer) -> tuple[int, float]:
        """The same between evaluations, if the next one would come too late to decide."""
        pace = self.pace.now()
        step, planned, every = trainer.global_step, trainer.max_steps, interval(trainer)
        next_evaluation = (step // every + 1) * every
        pause = self.pace.of("evaluation", pace) + self.pace.of("saving", pace)
        wait = (next_evaluation - step) * pace + pause
        left = TARGET * self.seconds - self.clock() - self._closing(pace)
        if next_evaluation < planned and wait <= left / 2:
            return planned, 0.0
        return self._in_time(trainer, pace, BETWEEN)

    def _in_time(self, trainer: pl.Trainer, pace: float, tolerance: float) -> tuple[int, float]:
        """The same at a pace of seconds a step, if the present plan misses by more than a share."""
        step, planned, every = trainer.global_step, trainer.max_steps, interval(trainer)
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
