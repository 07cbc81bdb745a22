"""Records a run's exact losses, and compares the records and checkpoints of two runs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback

from lit_gpt.checkpoint import RESUME_KEYS, Checkpoint


class Recorder(Callback):
    """Appends the losses of each batch and each evaluation to FOLDER/rank-N.txt.

    Each line is written at once, so it survives a SIGKILL: `batch STEP PART LOSS`,
    `evaluating STEP`, `evaluated STEP TRAIN_LOSS VAL_LOSS`. STEP counts the completed steps, PART
    the batches of this step, and losses are exact (`float.hex`).

    Args:
        folder: made if it is missing.
    """

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.file = (self.folder / f"rank-{trainer.global_rank}.txt").open("ab", buffering=0)
        self.write("pid", os.getpid())

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.file.close()

    def write(self, *fields: str | int | float) -> None:
        texts = (field.hex() if isinstance(field, float) else str(field) for field in fields)
        self.file.write(f"{' '.join(texts)}\n".encode())

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.step = trainer.global_step
        self.part = batch_idx % trainer.accumulate_grad_batches

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, *args: Any
    ) -> None:
        self.write("batch", self.step, self.part, outputs["loss"].item())

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.write("evaluating", trainer.global_step)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        losses = [trainer.callback_metrics[name].item() for name in ("train/eval_loss", "val/loss")]
        self.write("evaluated", trainer.global_step, *losses)


def read_record(path: Path) -> list[str]:
    """The complete lines without the pid; a killed process may leave half a line at the end."""
    lines = path.read_text(encoding="ascii").split("\n")[:-1] if path.exists() else []
    return [line for line in lines if not line.startswith("pid")]


def event_of(line: str) -> list[str]:
    """A line without its losses."""
    fields = line.split()
    return fields[: 3 if fields[0] == "batch" else 2]


def compare_records(found: list[str], whole: list[str]) -> str | None:
    """The first difference of `found` from a part of the uninterrupted run; None: it is equal."""
    if not found:
        return None
    events = [event_of(line) for line in whole]
    if event_of(found[0]) not in events:
        return f"{found[0]!r} is not in the uninterrupted run"
    for i, line in enumerate(found, start=events.index(event_of(found[0]))):
        expected = whole[i] if i < len(whole) else "ended"
        if line != expected:
            return f"{line!r} where the uninterrupted run has {expected!r}"
    return None


def leaves(part: Any, name: str) -> Iterator[tuple[str, Any]]:
    """All values in nested dicts and lists, each with its place: `optimizer: state: 0: step`."""
    if isinstance(part, dict | list | tuple):
        items = part.items() if isinstance(part, dict) else enumerate(part)
        for key, value in items:
            yield from leaves(value, f"{name}: {key}")
    else:
        yield name, part


def is_equal(found: Any, whole: Any) -> bool:
    if type(found) is not type(whole):
        return False
    if not isinstance(whole, torch.Tensor):
        return found == whole
    try:
        torch.testing.assert_close(found, whole, rtol=0, atol=0, equal_nan=True)
    except AssertionError:
        return False
    return torch.equal(found.signbit(), whole.signbit())  # 0.0 and -0.0 are not the same bits


def compare_checkpoints(found: Path, whole: Path) -> str | None:
    """The first places where two checkpoints differ in what a run continues with; None: nowhere."""
    if not found.is_file():
        return f"there is no {found.name}"

    def values(path: Path) -> dict[str, Any]:
        saved = Checkpoint.read(path, RESUME_KEYS)
        parts = {
            "step": saved.global_step,
            "weights": saved.weights,
            "optimizer": saved.optimizer_state,
            "schedules": saved.contents["lr_schedulers"],
            "config": vars(saved.gpt_config),
            "tokenizer": saved.tokenizer.to_dict(),
            "best": saved.best_evaluation,
        }
        return dict(leaves(parts, found.name))

    pair = (values(found), values(whole))
    places = sorted(pair[0].keys() ^ pair[1].keys())
    common = [name for name in pair[1] if name in pair[0]]
    places += [name for name in common if not is_equal(pair[0][name], pair[1][name])]
    return f"not as in the uninterrupted run: {', '.join(places[:3])}" if places else None
