"""The guard against non-finite numbers: a NaN or infinite loss or gradient never does damage."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from lit_gpt.checkpoint import skipped_steps, write_skipped_steps
from lit_gpt.errors import UserError
from lit_gpt.module import LitGPT, total_norm


@dataclass
class StepValues:
    """What is known of a step before its update."""

    step: int  # from 1
    learning_rate: float
    loss: Tensor  # nats/token, a scalar
    gradient_norm: Callable[[], Tensor]  # a scalar, which takes time to compute
    checked: tuple[str, ...]  # which of the two must be finite
    copied: torch.cuda.Event | None = None

    def copy_from_device(self) -> None:
        """Starts copying the numbers from a CUDA device; `is_finite` waits for them."""
        norm = self.gradient_norm().to("cpu", non_blocking=True)
        self.loss = self.loss.to("cpu", non_blocking=True)
        self.gradient_norm = lambda: norm
        self.copied = torch.cuda.Event()
        self.copied.record()

    def is_finite(self) -> bool:
        if self.copied:
            self.copied.synchronize()
        if "loss" in self.checked and not torch.isfinite(self.loss):
            return False
        return "gradient_norm" not in self.checked or bool(torch.isfinite(self.gradient_norm()))

    def __str__(self) -> str:
        return (
            f"step {self.step}: loss {self.loss.item():.4g}, gradient norm "
            f"{self.gradient_norm().item():.4g}, learning rate {self.learning_rate:.4g}"
        )


class NonFiniteGuard(Callback):
    """Stops a run at a non-finite loss or gradient, once `skip_bad_steps` updates were skipped.

    Weights that are not finite are never saved.
    """

    allowed = 0
    skipped = 0  # updates so far, those before a resume included
    pending: StepValues | None = None  # of the newest step, not checked yet

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        assert isinstance(pl_module, LitGPT)
        self.allowed = pl_module.hparams.skip_bad_steps

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Decides on the update; raises a UserError if no further one may be skipped.

        Reading a number from a device waits for it. So on CUDA, unless updates may be skipped, a
        step is checked during the next one, or before anything is evaluated or saved.
        """
        assert isinstance(pl_module, LitGPT)
        self.check_pending()
        values = StepValues(
            trainer.global_step + 1,
            optimizer.param_groups[0]["lr"],
            pl_module.train_loss,
            pl_module.gradient_norm,
            self.checked_values(trainer),
        )
        if self.allowed == 0 and values.loss.is_cuda:
            values.copy_from_device()
            self.pending = values
        elif not values.is_finite():
            if self.skipped == self.allowed:
                raise self.error(values)
            self.skip(pl_module, values)

    def checked_values(self, trainer: pl.Trainer) -> tuple[str, ...]:
        """What must be finite at each step; all ranks have to come to the same decision."""
        if trainer.precision == "16-mixed":  # its scaler handles infinite gradients
            return ("loss",)
        if trainer.world_size > 1:  # each rank has its own loss; a NaN of any is in the shared norm
            return ("gradient_norm",)
        # The norm costs time. Without it a bad gradient shows in the next loss.
        return ("loss", "gradient_norm") if self.allowed else ("loss",)

    def skip(self, model: LitGPT, values: StepValues) -> None:
        self.skipped += 1
        model.print(f"Skipped the update at {values} ({self.skipped} of {self.allowed} allowed)")
        model.add_to_curves({"skipped_steps": self.skipped}, values.step)
        for weight in model.parameters():
            weight.grad = None  # the optimizer passes over it: no decay, no change of its moments

    def check_pending(self) -> None:
        values = self.pending
        self.pending = None
        if values and not values.is_finite():
            raise self.error(values)

    def error(self, values: StepValues) -> UserError:
        skipped = f", after {self.skipped} skipped updates" if self.skipped else ""
        return UserError(
            f"non-finite loss or gradient at {values}{skipped}",
            hint="lower `learning_rate`, clip with `gradient_clip_val`=1, or skip such updates "
            "with `skip_bad_steps`=10; checkpoints saved earlier are intact",
        )

    def on_validation_start(self, *args: Any) -> None:
        self.check_pending()

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self.check_pending()
        if not torch.isfinite(total_norm(list(pl_module.parameters()))):
            raise UserError(
                f"a weight is not finite after step {trainer.global_step}, so nothing was saved",
                hint="lower `learning_rate` or clip with `gradient_clip_val`=1; checkpoints "
                "saved earlier are intact",
            )
        write_skipped_steps(checkpoint, self.skipped)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self.skipped = skipped_steps(checkpoint)
