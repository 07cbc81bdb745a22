"""What each evaluation prints, and the evaluation over the whole validation split at the end."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback, Checkpoint

from lit_gpt.callbacks.stopping import GracefulStop, agreed
from lit_gpt.data import Batch, TextDataModule, read_windows
from lit_gpt.module import LitGPT, next_token_loss
from lit_gpt.reports.history import FinalResult


@dataclass(eq=False)
class FullSplitBatches:
    """Batches in which each token, except the first, is a target exactly once."""

    tokens: np.ndarray
    batch_size: int
    context_length: int

    def __post_init__(self) -> None:
        self.windows, self.rest = divmod(len(self.tokens) - 1, self.context_length)

    def __len__(self) -> int:
        return -(-self.windows // self.batch_size) + (self.rest > 0)

    def __iter__(self) -> Iterator[Batch]:
        starts = np.arange(self.windows) * self.context_length
        for i in range(0, self.windows, self.batch_size):
            yield read_windows(self.tokens, starts[i : i + self.batch_size], self.context_length)
        if self.rest:
            start = len(self.tokens) - 1 - self.rest
            yield read_windows(self.tokens, np.array([start]), self.rest)


def whole_val_split(data: TextDataModule) -> FullSplitBatches:
    """Every token of the validation split, for the final loss."""
    h = data.hparams
    return FullSplitBatches(data.val_tokens, max(h.batch_size, 8), h.context_length)


@torch.inference_mode()
def full_loss(trainer: pl.Trainer, model: LitGPT, batches: Iterable[Batch]) -> FinalResult:
    """The loss over all of `batches`, split between the ranks, in the trainer's precision."""
    assert model.token_lengths is not None, "full_loss needs the trainer's datamodule"
    model.eval()
    sums = torch.zeros(3, dtype=torch.float64)  # nats, tokens, bytes
    for x, y in islice(batches, trainer.global_rank, None, trainer.world_size):
        with trainer.precision_plugin.forward_context():
            loss = next_token_loss(model.gpt, x.to(model.device), y.to(model.device)).item()
        sums += torch.tensor([loss * y.numel(), y.numel(), model.token_lengths[y].sum()])
    if trainer.world_size > 1:
        sums = trainer.strategy.reduce(sums.to(model.device), reduce_op="sum")
    nats, tokens, num_bytes = sums.tolist()
    return FinalResult(nats / tokens, nats / math.log(2) / num_bytes, int(tokens))


class EvaluationPrinter(Callback):
    """Prints the losses of each evaluation, and once that the model begins to overfit.

    Args:
        patience: how many evaluations in a row may end above the best validation loss, while the
            training loss falls, before it is called overfitting.
    """

    state_key = "StepLines"

    def __init__(self, patience: int = 3) -> None:
        self.patience = patience
        self.best = {"val": float("inf"), "train": 0.0, "step": 0}
        self.worse = 0  # evaluations since the best
        self.has_warned = False

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.sanity_checking:  # it has no metrics
            return
        train = trainer.callback_metrics["train/eval_loss"].item()
        val = trainer.callback_metrics["val/loss"].item()
        step = trainer.global_step
        pl_module.print(f"Step: {step}, Training Loss: {train:.3f}, Validation Loss: {val:.3f}")
        self.worse += 1
        if val < self.best["val"]:
            self.best = {"val": val, "train": train, "step": step}
            self.worse = 0
        elif self.worse >= self.patience and train < self.best["train"] and not self.has_warned:
            self.has_warned = True
            pl_module.print(
                f"The model is overfitting: the validation loss was best at step "
                f"{self.best['step']} ({self.best['val']:.3f}) and has been higher for "
                f"{self.worse} evaluations, while the training loss still falls. best.ckpt keeps "
                "the best model; more text, more dropout or a smaller model would help."
            )

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "worse": self.worse, "said": self.has_warned}  # 0.1.0's names

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best = state_dict["best"]
        self.worse = state_dict["worse"]
        self.has_warned = state_dict["said"]


class FinalEvaluation(Checkpoint):
    """The loss over the whole validation split, at the end of a run that wasn't stopped.

    A Checkpoint only so that Lightning calls it after those that save the last step.
    """

    result: FinalResult | None = None

    def __init__(self, stop: GracefulStop) -> None:
        self.stop = stop

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        data = getattr(trainer, "datamodule", None)
        if data is not None and not self.stop.reason:
            assert isinstance(pl_module, LitGPT)
            result = full_loss(trainer, pl_module, self._until_stopped(whole_val_split(data)))
            self.stop.reason = agreed(trainer, self.stop.signal)
            self.result = None if self.stop.reason else result

    def _until_stopped(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        for batch in batches:
            yield batch  # at least one batch: the mean of none is undefined
            if self.stop.signal:
                return
