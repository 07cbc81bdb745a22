"""Owns the exact record of a run, and how two records or two checkpoints are compared."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback

from lit_gpt.checkpoint import read_checkpoint


class Recorder(Callback):
    """Appends each batch's and each evaluation's exact losses to FOLDER/rank-N.txt.

    A line is written at once, so what was computed before a SIGKILL is known after it:
    `batch STEP PART LOSS`, `evaluating STEP`, `evaluated STEP TRAIN_LOSS VAL_LOSS`. Losses are
    float.hex's, STEP counts the steps done before, PART the batches of a step.

    `--trainer.callbacks=tests.kill_test.recorder.Recorder --trainer.callbacks.folder=FOLDER`
    """

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"rank-{trainer.global_rank}.txt"
        self.file = path.open("ab", buffering=0)
        self.write("pid", os.getpid())

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.file.close()

    def write(self, *words: Any) -> None:
        texts = (word.hex() if isinstance(word, float) else str(word) for word in words)
        self.file.write(f"{' '.join(texts)}\n".encode())

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.where = (trainer.global_step, batch_idx % trainer.accumulate_grad_batches)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, i: int
    ) -> None:
        self.write("batch", *self.where, outputs["loss"].item())

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.write("evaluating", trainer.global_step)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        metrics = trainer.callback_metrics
        losses = (metrics["train/eval_loss"].item(), metrics["val/loss"].item())
        self.write("evaluated", trainer.global_step, *losses)


def read_record(path: Path) -> list[str]:
    """Its whole lines, pids left out; a killed process may have left half a line at the end."""
    lines = path.read_text(encoding="ascii").split("\n")[:-1] if path.exists() else []
    return [line for line in lines if not line.startswith("pid")]


def place_of(line: str) -> list[str]:
    """What a line is about, without its losses."""
    words = line.split()
    return words[: 3 if words[0] == "batch" else 2]


def compare_records(found: list[str], whole: list[str]) -> str | None:
    """None where `found` is a stretch of the uninterrupted run's lines; else what differs first."""
    if not found:
        return None
    places = [place_of(line) for line in whole]
    if place_of(found[0]) not in places:
        return f"{found[0]!r} is not in the uninterrupted run"
    for i, line in enumerate(found, places.index(place_of(found[0]))):
        expected = whole[i] if i < len(whole) else "ended"
        if line != expected:
            return f"{line!r} where the uninterrupted run has {expected!r}"
    return None


def differences(found: Any, whole: Any, where: str) -> Iterator[str]:
    """The places where two structures of plain values and tensors differ, if only in a bit."""
    if type(found) is not type(whole):
        yield where
    elif isinstance(whole, dict) and found.keys() == whole.keys():
        for key in whole:
            yield from differences(found[key], whole[key], f"{where}: {key}")
    elif isinstance(whole, list | tuple) and len(found) == len(whole):
        for i, pair in enumerate(zip(found, whole, strict=True)):
            yield from differences(*pair, f"{where}: {i}")
    elif isinstance(whole, torch.Tensor):
        kinds = [(part.dtype, part.shape) for part in (found, whole)]
        if kinds[0] != kinds[1] or found.numpy().tobytes() != whole.numpy().tobytes():
            yield where
    elif found != whole:
        yield where


def compare_checkpoints(found: Path, whole: Path) -> str | None:
    """None where both hold the same step, weights, optimizer and schedule; else what differs."""
    if not found.is_file():
        return f"there is no {found.name}"
    names = ("global_step", "state_dict", "optimizer_states", "lr_schedulers", "gpt", "tokenizer")
    contents = [{k: read_checkpoint(path)[k] for k in names} for path in (found, whole)]
    places = list(differences(*contents, found.name))
    return f"not as in the uninterrupted run: {', '.join(places[:3])}" if places else None
