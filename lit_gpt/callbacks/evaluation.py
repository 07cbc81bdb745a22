"""Owns what happens around the steps: console, samples, overfit notice, the last evaluation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback, Checkpoint
from lightning.pytorch.utilities import rank_zero_only

from lit_gpt.callbacks.stopping import GracefulStop, agreed


class StepLines(Callback):
    """Says the losses of each evaluation, and once when the model begins to overfit.

    Args:
        patience: how many evaluations in a row may end above the best validation loss, while the
            training loss falls, before it is called overfitting.
    """

    def __init__(self, patience: int = 3) -> None:
        self.patience = patience
        self.best = {"val": float("inf"), "train": 0.0, "step": 0}
        self.worse, self.said = 0, False

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        train = trainer.callback_metrics["train/eval_loss"].item()
        val = trainer.callback_metrics["val/loss"].item()
        step = trainer.global_step
        self.print(trainer, f"Step: {step}, Training Loss: {train:.3f}, Validation Loss: {val:.3f}")
        if val < self.best["val"]:
            self.best, self.worse = {"val": val, "train": train, "step": step}, 0
            return
        self.worse += 1
        if self.worse >= self.patience and train < self.best["train"] and not self.said:
            self.said = True
            self.print(
                trainer,
                f"The model is overfitting: the validation loss was best at step "
                f"{self.best['step']} ({self.best['val']:.3f}) and has been higher for "
                f"{self.worse} evaluations, while the training loss still falls. best.ckpt keeps "
                "the best model; more text, more dropout or a smaller model would help.",
            )

    @rank_zero_only
    def print(self, trainer: pl.Trainer, line: str) -> None:
        (trainer.progress_bar_callback.print if trainer.progress_bar_callback else print)(line)

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "worse": self.worse, "said": self.said}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best, self.worse, self.said = (state_dict[k] for k in ("best", "worse", "said"))


class FinalEvaluation(Checkpoint):
    """The loss over the whole validation split, once, at the end of a run that wasn't stopped.

    A Checkpoint only so that Lightning calls it after those that save the last step.
    """

    def __init__(self, stop: GracefulStop) -> None:
        self.stop, self.result = stop, None

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.datamodule is not None and not self.stop.reason:
            batches = trainer.datamodule.whole_val_split()
            result = pl_module.full_loss(self.until_stopped(batches))
            self.stop.reason = agreed(trainer, self.stop.signal)
            self.result = None if self.stop.reason else result

    def until_stopped(self, batches: Iterable[Any]) -> Iterator[Any]:
        for batch in batches:
            yield batch  # at least one: a mean of none is no number
            if self.stop.signal:
                return
