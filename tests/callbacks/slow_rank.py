"""Runs on two processes, of which one is slower, or whose clocks disagree."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from lit_gpt.callbacks.budget_clock import BudgetClock


class SlowRank(BudgetClock):
    """For rank 0 a step takes a second, and two from step 20 on; for the others next to nothing.

    Each rank writes its last step into FOLDER/rank-N.txt.
    """

    def __init__(self, folder: str) -> None:
        super().__init__(60.0, clock=lambda: self.passed)
        self.folder = Path(folder)
        self.passed = 0.0

    def on_train_batch_start(self, *args: Any) -> None:
        super().on_train_batch_start(*args)
        trainer: pl.Trainer = args[0]
        is_slow = trainer.global_step >= 20
        self.passed += 0.001 if trainer.global_rank else 1.0 + is_slow

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        steps = f"{trainer.max_steps} {trainer.global_step} {pl_module.hparams['horizons']}"
        (self.folder / f"rank-{trainer.global_rank}.txt").write_text(steps)


class LateRank(Callback):
    """All ranks but the first sleep before each batch."""

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_rank:
            time.sleep(0.2)
