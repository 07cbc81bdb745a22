"""Checks what Lightning restores from a checkpoint: it takes any value, and fails later with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor

from lit_gpt.callbacks.checkpoints import StepCheckpoints
from lit_gpt.checkpoint import Checkpoint
from lit_gpt.errors import UserError

KNOWN = ("lit_gpt.", "lightning.")  # whose callbacks keep the types of their state


class OptimizerStateCheck(Callback):
    """Refuses moments of another shape than their weight's.

    Fused optimizers look only at the weight's, and would write beyond the moments' memory.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for optimizer in trainer.optimizers:
            for weight, state in optimizer.state.items():
                for name, value in state.items():
                    if not isinstance(value, Tensor) or value.shape == ():
                        continue
                    if value.shape != weight.shape:
                        raise unfit(self.path, f"optimizer_states' {name}")
                    if value.stride() != weight.stride():
                        state[name] = torch.empty_like(weight).copy_(value)


def check_restored_state(checkpoint: Checkpoint, trainer: pl.Trainer) -> None:
    """Compares the saved state of loops and callbacks with what these have at a run's start.

    Raises:
        UserError: it is of other types, or they contradict each other.
    """
    ours = {"loops": trainer.fit_loop.state_dict(), "data": {"windows_seen": 0}}
    saved = {"loops": checkpoint.fit_loop_state, "data": checkpoint.data_state}
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        state = checkpoint.callback_states.get(callback.state_key)
        if state is not None and type(callback).__module__.startswith(KNOWN):
            name = f"callbacks.{callback.state_key}"
            ours[name] = callback.state_dict()
            saved[name] = state
            if isinstance(callback, ModelCheckpoint) and not is_ranking(state, callback):
                raise unfit(checkpoint.path, name)
    for name, state in ours.items():
        if odd := odd_part(saved[name], state, name):
            raise unfit(checkpoint.path, odd)
    if optimizer_steps(checkpoint.fit_loop_state) != checkpoint.global_step:
        raise unfit(checkpoint.path, "global_step")


def optimizer_steps(counters: Any) -> Any:
    """Which of the fit loop's counters Lightning continues `global_step` from."""
    try:
        optimization = counters["epoch_loop.automatic_optimization.optim_progress"]
        return optimization["optimizer"]["step"]["total"]["completed"]
    except (LookupError, TypeError):
        return None


def unfit(path: Path, name: str) -> UserError:
    return UserError(
        f"{path} can't be continued: its {name} is not what a run saves",
        hint=f"start a new run from its weights with `init_from`={path}",
    )


def odd_part(saved: Any, ours: Any, name: str, is_whole: bool = False) -> str | None:
    """The name of a part that is of another type than ours, or missing; None: all is well.

    None in ours may be anything, and so may be what an empty dict has. Only the outermost dicts may
    lack parts: those of other versions.
    """
    if isinstance(ours, dict) and isinstance(saved, dict):
        for key, value in ours.items():
            inner = f"{name}.{key}"
            if key not in saved and is_whole:
                return inner
            if key in saved and (odd := odd_part(saved[key], value, inner, is_whole=True)):
                return odd
        return None
    if type(ours) is int:
        is_fine = type(saved) is int and saved >= 0
    elif type(ours) is float:
        is_fine = type(saved) in (int, float)
    else:
        is_fine = ours is None or isinstance(saved, type(ours))
    return None if is_fine else name


def is_ranking(state: Any, callback: ModelCheckpoint) -> bool:
    """Whether the checkpoints that a ModelCheckpoint ranks are known by path and score."""
    models = state.get("best_k_models", {}) if isinstance(state, dict) else None
    if not isinstance(models, dict):
        return False
    is_scored = all(isinstance(score, Tensor) and score.numel() == 1 for score in models.values())
    is_full = 0 < callback.save_top_k <= len(models)
    has_worst = state.get("kth_best_model_path") in [*models] or type(callback) is StepCheckpoints
    return is_scored and (has_worst or not is_full)
