"""Owns the watch over each step's loss and gradient: a number that is none ends or skips a step."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from lit_gpt.errors import UserError


class Reading:
    """What is known of one step before its update.

    Args:
        step: number of the step, from 1.
        learning_rate: of its update.
        loss: nats a token, a scalar.
        gradients: of all weights; gone through when the norm is asked for, before they change.
        looks_at: which numbers are to be finite: loss, gradient_norm or both.
    """

    def __init__(
        self,
        step: int,
        learning_rate: float,
        loss: Tensor,
        gradients: Iterable[Tensor],
        looks_at: tuple[str, ...],
    ) -> None:
        self.step, self.learning_rate, self.loss = step, learning_rate, loss
        self.gradients, self.looks_at = gradients, looks_at
        self._norm: Tensor | None = None
        self._ready: torch.cuda.Event | None = None

    @property
    def gradient_norm(self) -> Tensor:
        """Of all gradients together; made when it is asked for: a fortieth of a small step."""
        if self._norm is None:
            self._norm = torch.nn.utils.get_total_norm(self.gradients)
        return self._norm

    def leave_device(self) -> None:
        """Begins to copy the numbers from a CUDA device, for `is_finite` to be asked later."""
        self.loss, self._norm = (
            number.to("cpu", non_blocking=True) for number in (self.loss, self.gradient_norm)
        )
        self._ready = torch.cuda.Event()
        self._ready.record()

    def is_finite(self) -> bool:
        if self._ready:
            self._ready.synchronize()
        return all(bool(torch.isfinite(getattr(self, name))) for name in self.looks_at)

    def __str__(self) -> str:
        return (
            f"step {self.step}: loss {self.loss.item():.4g}, gradient norm "
            f"{self.gradient_norm.item():.4g}, learning rate {self.learning_rate:.4g}"
        )


class StepWatch:
    """Ends a run at the first number that is none, or leaves out up to `allowed` such updates."""

    def __init__(self, allowed: int) -> None:
        self.allowed, self.skipped = allowed, 0
        self.unchecked: Reading | None = None

    def may_update(self, reading: Reading) -> bool:
        """Whether the step's update may be made.

        Asking a device for a number waits for it. So on CUDA, unless steps may be skipped, a step
        is checked during the next, or by `check` before anything is evaluated or saved.

        Raises:
            UserError: the run can't go on.
        """
        if self.allowed == 0 and reading.loss.is_cuda:
            self.check()
            reading.leave_device()
            self.unchecked = reading
            return True
        if reading.is_finite():
            return True
        if self.skipped == self.allowed:
            raise self.error(reading)
        self.skipped += 1
        return False

    def check(self) -> None:
        reading, self.unchecked = self.unchecked, None
        if reading and not reading.is_finite():
            raise self.error(reading)

    def error(self, reading: Reading) -> UserError:
        skipped = f" after {self.skipped} skipped updates" if self.skipped else ""
        return UserError(
            f"loss or gradient is no finite number at {reading}{skipped}: lower "
            "--model.learning_rate, clip with --trainer.gradient_clip_val=1, or leave such updates "
            "out with --model.skip_bad_steps=10. The checkpoints are of steps before"
        )


def check_weights(weights: list[Tensor], step: int) -> None:
    """Raises a UserError where a weight is no finite number: what is saved can be relied on."""
    if not torch.isfinite(torch.nn.utils.get_total_norm(weights)):
        raise UserError(
            f"a weight is no finite number after step {step}, so nothing was saved: lower "
            "--model.learning_rate or clip with --trainer.gradient_clip_val=1. The checkpoints are "
            "of steps before"
        )
