"""Stopping a run whose validation loss no longer improves."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import EarlyStopping

from lit_gpt.errors import check_least


class EarlyStop(EarlyStopping):
    """Ends the run after evaluations in a row without a new lowest validation loss.

    The evaluation at step 0 doesn't count, and no run ends before `min_steps`.

    Args:
        patience: how many such evaluations end the run; 0: it never ends early.
        min_delta: by how much the loss must be lower to count as an improvement, in nats/token.
    """

    state_key = "EarlyStopping"

    def __init__(self, patience: int = 0, min_delta: float = 0.0) -> None:
        check_least(0, patience=patience, min_delta=min_delta)
        # A loss that is not finite ends the run with an error of its own.
        super().__init__(
            "val/loss", min_delta, patience, check_finite=False, check_on_train_epoch_end=False
        )
        self.best_step: int | None = None

    @property
    def is_exhausted(self) -> bool:
        return 0 < self.patience <= self.wait_count

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self.patience:
            return
        super().on_validation_end(trainer, pl_module)
        if self.wait_count == 0:
            self.best_step = trainer.global_step
        if self.is_exhausted and trainer.global_step < (trainer.min_steps or 0):
            trainer.should_stop = False  # it would end the run at min_steps, whatever the loss

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"best_step": self.best_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The count and the best loss; the patience is that of the options."""
        super().load_state_dict(state_dict | {"patience": self.patience})
        self.best_step = state_dict.get("best_step")
