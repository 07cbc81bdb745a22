"""Writes down which windows each rank of a run trains on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback


class WindowRecorder(Callback):
    """FOLDER/from-STEP-rank-N.json: the ids of each batch (B, T) that a rank trained on."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.name = f"from-{trainer.global_step}-rank-{trainer.global_rank}.json"
        self.batches: list[list[list[int]]] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, i: int) -> None:
        self.batches.append(batch[0].tolist())

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / self.name).write_text(json.dumps(self.batches), encoding="utf-8")


def windows_of(folder: Path, step: int) -> list[list[int]]:
    """The windows that all ranks together read from a step on, in the order of the batches."""
    paths = sorted(folder.glob(f"from-{step}-rank-*.json"))
    ranks = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    return [window for batches in zip(*ranks, strict=True) for batch in batches for window in batch]
