"""What each evaluation prints, and the evaluation over the whole validation split at the end."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback, Checkpoint

from lit_gpt.callbacks.progress import ProgressBar
from lit_gpt.callbacks.stopping import GracefulStop, agreed
from lit_gpt.data import Batch, TextDataModule
from lit_gpt.errors import check_least
from lit_gpt.evaluation.whole_text import WholeText, whole_loss
from lit_gpt.module import LitGPT
from lit_gpt.reports.history import FinalResult


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

    Args:
        max_tokens: how many tokens of the split are predicted, in windows spread evenly over it;
            None: all of them; 0: no final evaluation.
    """

    result: FinalResult | None = None
    stop: GracefulStop  # the run's: `build_run` sets it

    def __init__(self, max_tokens: int | None = None) -> None:
        check_least(0, max_tokens=max_tokens)
        self.max_tokens = max_tokens

    def batches(self, data: TextDataModule, rank: int = 0, world_size: int = 1) -> WholeText:
        h = data.hparams
        sizes = (max(h.batch_size, 8), h.context_length)
        return WholeText(data.windows["val"], *sizes, self.max_tokens, rank, world_size)

    def measure(
        self, trainer: pl.Trainer, model: LitGPT, batches: Iterable[Batch], num_targets: int
    ) -> FinalResult:
        """The loss over the `batches` of all ranks together, in the trainer's precision."""
        assert model.token_lengths is not None, "the final evaluation needs a datamodule"
        context = trainer.precision_plugin.forward_context
        gathered = getattr(trainer.strategy, "gathered", nullcontext)  # distributed/fsdp2.py
        with gathered():
            return whole_loss(model.gpt, batches, model.token_lengths, num_targets, context)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        data = getattr(trainer, "datamodule", None)
        if data is None or self.stop.reason or self.max_tokens == 0:
            return
        assert isinstance(pl_module, LitGPT)
        whole = self.batches(data, trainer.global_rank, trainer.world_size)
        batches = self._until_stopped(trainer, whole)
        if isinstance(bar := trainer.progress_bar_callback, ProgressBar):
            batches = bar.track(batches, len(whole), "Final evaluation")
        result = self.measure(trainer, pl_module, batches, whole.num_targets)
        self.stop.reason = agreed(trainer, self.stop.signal)
        self.result = None if self.stop.reason else result

    def _until_stopped(self, trainer: pl.Trainer, batches: Iterable[Batch]) -> Iterator[Batch]:
        for batch in batches:
            yield batch  # at least one batch: the mean of none is undefined
            if agreed(trainer, self.stop.signal):  # no rank computes more batches than another
                return
