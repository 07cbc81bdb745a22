"""A small model, trained by a plain Trainer in this process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Checkpoint

from lit_gpt.data import TextDataModule
from lit_gpt.module import LitGPT

TRAINER = {
    "accelerator": "cpu",
    "max_steps": 6,
    "val_check_interval": 2,
    "check_val_every_n_epoch": None,
    "limit_val_batches": 2,
    "log_every_n_steps": 1,
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def fit(
    text: Path,
    folder: Path,
    callbacks: list[pl.Callback],
    trainer: dict[str, Any] | None = None,
    ckpt_path: Path | None = None,
    **model: Any,
) -> pl.Trainer:
    """Trains on `text`, with the cache and the Trainer's files in `folder`."""
    data = TextDataModule(str(text), context_length=16, cache=str(folder / "cache"))
    torch.manual_seed(1337)
    sizes = {"context_length": 16, "d_model": 16, "num_blocks": 2, "num_heads": 2}
    gpt = LitGPT(vocab_size=data.vocab_size, **sizes | model)
    saves = any(isinstance(callback, Checkpoint) for callback in callbacks)
    options = TRAINER | {"default_root_dir": folder, "enable_checkpointing": saves}
    made = pl.Trainer(callbacks=callbacks, **options | (trainer or {}))
    made.fit(gpt, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
    return made
