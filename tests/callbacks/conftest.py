"""A small model, trained by a plain Trainer in this process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
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


@pytest.fixture
def data(text_file: Path, tmp_path: Path) -> TextDataModule:
    return TextDataModule(str(text_file), context_length=16, cache=str(tmp_path / "cache"))


@pytest.fixture
def fit(data: TextDataModule, tmp_path: Path):
    """`fit([callback], skip_bad_steps=1, trainer={"max_steps": 9})`: the Trainer afterwards."""

    def run(
        callbacks: list[pl.Callback],
        trainer: dict[str, Any] | None = None,
        ckpt_path: Path | None = None,
        **model: Any,
    ) -> pl.Trainer:
        torch.manual_seed(1337)
        sizes = {"context_length": 16, "d_model": 16, "num_blocks": 2, "num_heads": 2}
        gpt = LitGPT(vocab_size=data.vocab_size, **sizes | model)
        saves = any(isinstance(callback, Checkpoint) for callback in callbacks)
        options = TRAINER | {"default_root_dir": tmp_path, "enable_checkpointing": saves}
        options |= trainer or {}
        made = pl.Trainer(callbacks=callbacks, **options)
        made.fit(gpt, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
        return made

    return run
