"""Which checkpoints a run keeps, how they are written, and whether the disk has room for them."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor

from lit_gpt.callbacks.stopping import GracefulStop, agreed
from lit_gpt.checkpoint import is_sharded, read_checkpoint
from lit_gpt.checkpoint_file import check_parts
from lit_gpt.data import TextDataModule
from lit_gpt.errors import UserError, check_least
from lit_gpt.module import LitGPT
from lit_gpt.storage import atomic_open, unfinished


class BestCheckpoint(ModelCheckpoint):
    """checkpoints/best.ckpt: the lowest validation loss."""

    state_key = "BestCheckpoint"

    def __init__(self) -> None:
        super().__init__(monitor="val/loss", filename="best", enable_version_counter=False)


class StepCheckpoints(ModelCheckpoint):
    """checkpoints/step_N.ckpt: every so many steps, of which the newest are kept.

    Args:
        every_n_steps: steps between them; 0: none.
        keep: how many of the newest to keep; -1: all.
        sharded: whether all checkpoints of the run are folders, in which each process of fsdp2
            writes its part, instead of files.
    """

    state_key = "StepCheckpoints"  # whatever the arguments: a resumed run may have others

    def __init__(self, every_n_steps: int = 0, keep: int = 3, sharded: bool = False) -> None:
        check_least(0, every_n_steps=every_n_steps)
        if keep < 1 and keep != -1:
            raise UserError("must be at least 1, or -1 for all", field="keep", value=keep)
        self.every_n_steps = every_n_steps
        self.keep = keep
        self.sharded = sharded
        super().__init__(
            filename="step_{step}",
            auto_insert_metric_name=False,
            monitor="step",
            mode="max",
            save_top_k=keep,
            every_n_train_steps=every_n_steps,
            enable_version_counter=False,
        )

    def _monitor_candidates(self, trainer: pl.Trainer) -> dict[str, Tensor]:
        # Lightning's "step" is that of the last evaluation, which LitGPT logs for the curves:
        # 2.6.6, docs/lightning-notes.md#private-apis.
        return {"step": torch.tensor(trainer.global_step)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Ranks the files again: `keep` may be lower now, and Lightning expects a worst one."""
        super().load_state_dict(state_dict)
        oldest_first = sorted(self.best_k_models, key=lambda path: self.best_k_models[path])
        kept = oldest_first if self.keep < 0 else oldest_first[-self.keep :]
        self.best_k_models = {path: self.best_k_models[path] for path in kept}
        self.kth_best_model_path = kept[0] if kept else ""

    def most_files(self, max_steps: int) -> int:
        """How many files there will be at most."""
        if not self.every_n_steps:
            return 0
        saved = max_steps // self.every_n_steps if max_steps > 0 else self.keep
        return max(1, saved if self.keep < 0 else min(saved, self.keep))


class LastCheckpoint(ModelCheckpoint):
    """checkpoints/last.ckpt: after each evaluation, at the end, and as soon as a run is stopped.

    Lightning saves only at its own moments, so `save` calls private methods of its ModelCheckpoint:
    2.6.6, docs/lightning-notes.md#private-apis.
    """

    state_key = "LastCheckpoint"

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
        """Saves before the evaluation's end, which may come too late for a short grace period."""
        if not self.stop.evaluation_due and agreed(trainer, self.stop.signal):
            self.stop.evaluation_due = True
            self.save(trainer)
            self._last_global_step_saved = 0  # so that it is saved again, with the result

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.save(trainer)


def save_atomically(contents: Mapping[str, Any], path: str | Path) -> None:
    """Writes a checkpoint by `atomic_open`; a UserError if the disk is full or can't be written."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_open(path) as file:
            torch.save(contents, file)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        raise UserError(
            f"cannot write the checkpoint {path} ({_reason(error, path)}): earlier checkpoints are "
            "unharmed",
            hint="make room, then continue with `ckpt_path` last",
        ) from error


def _reason(error: Exception, path: Path) -> str:
    """Why a file can't be written; of a full disk torch says no more than that writing failed."""
    with suppress(OSError):
        if isinstance(error, OSError) and error.strerror:
            return error.strerror
        return f"{shutil.disk_usage(path.parent).free:,} bytes are free there"
    return str(error)


def check_plain(contents: Mapping[str, Any]) -> None:
    """Checks that a checkpoint can be read again, which that of a user's own callback may not.

    Raises:
        UserError: what holds more than plain values and tensors.
    """
    for group, state in contents.items():
        parts = state if isinstance(state, dict) else {"it": state}
        for name, part in parts.items():
            try:
                check_parts(part)
            except (TypeError, ValueError) as error:
                raise UserError(
                    f"the {group} can't be saved: {name} has {error}",
                    hint="save numbers, text, lists, dicts and tensors only",
                ) from error


class CheckpointIO(TorchCheckpointIO):
    """Writes whole files, reads checked ones and removes none but its own.

    Lightning's can leave half a file behind.
    """

    def __init__(self, stop: GracefulStop) -> None:
        super().__init__()
        self.stop = stop
        self.folders: set[Path] = set()  # that checkpoints were saved in

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        self.stop.unfinished = unfinished(path)
        check_plain(checkpoint)
        save_atomically(checkpoint, path)
        folder = Path(path).resolve().parent
        self.folders.add(folder.parent if is_sharded(folder) else folder)

    def remove_checkpoint(self, path: Any) -> None:
        """Removes a file, or a sharded checkpoint, beside those that were saved.

        A continued run has the paths from its checkpoint, which may be a stranger's, and Lightning
        would remove any folder.
        """
        path = Path(path)
        if path.resolve().parent not in self.folders or path.is_symlink():
            return
        if path.is_file():
            path.unlink()
        elif is_sharded(path):
            shutil.rmtree(path)

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return dict(read_checkpoint(path))


def checkpoint_bytes(model: LitGPT) -> int:
    """Approximate size of a checkpoint's tensors: the trained weights, the optimizer's moments."""
    size = 3 * sum(p.nbytes for p in model.parameters() if p.requires_grad)  # AdamW has two moments
    if model.hparams.optimizer == "muon":  # which has one for the blocks' matrices
        matrices = (p for p in model.gpt.blocks.parameters() if p.ndim > 1 and p.requires_grad)
        size -= sum(p.nbytes for p in matrices)
    return size


def base_bytes(model: LitGPT) -> int:
    """Size of the frozen weights, which are beside the checkpoints of adapters, once."""
    return sum(p.nbytes for p in model.parameters() if not p.requires_grad)


def file_bytes(model: LitGPT, data: TextDataModule) -> int:
    """Approximate size of a checkpoint file, which holds the tokenizer too."""
    return checkpoint_bytes(model) + len(data.tokenizer.to_dict()["vocabulary"])


def free_bytes(folder: Path) -> int:
    """Free space on the disk of a folder that need not exist yet."""
    folder = folder.absolute()
    return shutil.disk_usage(next(p for p in (folder, *folder.parents) if p.exists())).free


def check_space(folder: Path, model: LitGPT, data: TextDataModule, num_files: int) -> None:
    """Raises a UserError if the disk has no room for a run's checkpoints, and one being written."""
    size = file_bytes(model, data)
    found = (*folder.glob("*.ckpt"), *folder.glob("*.ckpt/*"))  # files, and those of folders
    existing = sum(path.stat().st_size for path in found)
    needed = (num_files + 1) * size + base_bytes(model) - existing
    free = free_bytes(folder)
    if needed > free:
        raise UserError(
            f"{folder} has {free / 1e6:,.0f} MB free, and this run's {num_files} checkpoints of "
            f"{size / 1e6:,.0f} MB each need {needed / 1e6:,.0f} MB",
            hint="make room, lower `keep`, or name another folder with `default_root_dir`",
        )
