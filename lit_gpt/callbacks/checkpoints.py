"""Owns which checkpoints a run keeps, how they are written, and whether there is room for them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor

from lit_gpt.callbacks.stopping import GracefulStop, agreed
from lit_gpt.checkpoint import read_checkpoint, save_atomically
from lit_gpt.errors import UserError
from lit_gpt.module import LitGPT
from lit_gpt.storage import unfinished


class BestCheckpoint(ModelCheckpoint):
    """checkpoints/best.ckpt: the lowest validation loss."""

    def __init__(self) -> None:
        super().__init__(monitor="val/loss", filename="best", enable_version_counter=False)


class StepCheckpoints(ModelCheckpoint):
    """checkpoints/step_N.ckpt: every so many steps, the newest of them kept.

    Args:
        every_n_steps: 0: none.
        keep: how many; -1: all.
    """

    def __init__(self, every_n_steps: int = 0, keep: int = 3) -> None:
        if every_n_steps < 0:
            raise UserError(f"--checkpoints.every_n_steps must be 0 or more, not {every_n_steps}")
        if keep < 1 and keep != -1:
            raise UserError(f"--checkpoints.keep must be at least 1, or -1 for all, not {keep}")
        self.every_n_steps, self.keep = every_n_steps, keep
        super().__init__(
            filename="step_{step}",
            auto_insert_metric_name=False,
            monitor="step",
            mode="max",
            save_top_k=keep,
            every_n_train_steps=every_n_steps,
            enable_version_counter=False,
        )

    @property
    def state_key(self) -> str:
        return "StepCheckpoints"  # whatever the numbers: a continued run may have others

    def _monitor_candidates(self, trainer: pl.Trainer) -> dict[str, Tensor]:
        return {"step": torch.tensor(trainer.global_step)}  # Lightning's is of the last evaluation

    def most_files(self, max_steps: int) -> int:
        """How many there will be at the most."""
        if not self.every_n_steps:
            return 0
        made = max_steps // self.every_n_steps if max_steps > 0 else self.keep
        return max(1, made if self.keep < 0 else min(made, self.keep))


class LastCheckpoint(ModelCheckpoint):
    """checkpoints/last.ckpt: after each evaluation, at the end, and as soon as a run is stopped."""

    def __init__(self, stop: GracefulStop) -> None:
        super().__init__(filename="last", enable_version_counter=False)
        self.stop = stop

    def save(self, trainer: pl.Trainer) -> None:
        if not self._should_skip_saving_checkpoint(trainer):
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if self.stop.reason:
            self.save(trainer)

    def on_validation_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        """Saves before the evaluation's end, which a short period of grace may not allow for."""
        if not self.stop.owed and agreed(trainer, self.stop.signal):
            self.stop.owed = True
            self.save(trainer)
            self._last_global_step_saved = 0  # to be saved again, with the result

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.save(trainer)


class CheckpointIO(TorchCheckpointIO):
    """Whole files, checked files: Lightning's own can leave half a file under the final name."""

    def __init__(self, stop: GracefulStop) -> None:
        super().__init__()
        self.stop = stop

    def save_checkpoint(self, checkpoint: dict, path: Any, storage_options: Any = None) -> None:
        self.stop.unfinished = unfinished(path)
        save_atomically(checkpoint, path)

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return read_checkpoint(path)


def checkpoint_bytes(model: LitGPT) -> int:
    """About how large a checkpoint is: the weights and the optimizer's moments of each."""
    weights = sum(p.nbytes for p in model.parameters())
    moments = 2 * weights  # AdamW's two
    if model.hparams.optimizer == "muon":  # one for the blocks' matrices
        moments -= sum(p.nbytes for p in model.gpt.blocks.parameters() if p.ndim > 1)
    return weights + moments


def file_bytes(model: LitGPT, data: pl.LightningDataModule) -> int:
    """About how large the file is: the tokenizer is in it too."""
    return checkpoint_bytes(model) + len(data.tokenizer.to_dict()["vocabulary"])


def free_bytes(folder: Path) -> int:
    """Room on the disk of a folder that need not be there yet."""
    folder = folder.absolute()
    return shutil.disk_usage(next(p for p in (folder, *folder.parents) if p.exists())).free


def check_space(folder: Path, model: LitGPT, data: pl.LightningDataModule, num_files: int) -> None:
    """That the disk has room for the checkpoints still to come, and one more while it is written.

    Raises:
        UserError: it has not.
    """
    size = file_bytes(model, data)
    there = [path.stat().st_size for path in folder.glob("*.ckpt")]
    needed = (num_files + 1) * size - sum(there)
    free = free_bytes(folder)
    if needed > free:
        raise UserError(
            f"{folder} has {free / 1e6:,.0f} MB free, and this run's {num_files} checkpoints of "
            f"{size / 1e6:,.0f} MB each need {needed / 1e6:,.0f} MB: make room, keep fewer "
            "(--checkpoints.keep) or name another folder with --trainer.default_root_dir"
        )
