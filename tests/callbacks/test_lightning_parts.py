"""The parts of Lightning that are not in its documentation and that lit_gpt uses are there.

Each has its reason in docs/lightning-notes.md. One that is gone or renamed would mostly be set on
an object that no longer reads it, and fail silently.
"""

from __future__ import annotations

import inspect

import lightning.pytorch as pl
import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector

from tests.conftest import ROOT


@pytest.fixture(scope="module")
def trainer() -> pl.Trainer:
    return pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)


@pytest.mark.parametrize(
    "path",
    [
        "_signal_connector.register_signal_handlers",
        "_accelerator_connector",
        "strategy.launcher",
        "fit_loop.min_epochs",
        "fit_loop.epoch_loop.min_steps",
        "fit_loop.epoch_loop._skip_next_val",
        "fit_loop.epoch_loop.val_loop.run",
        "fit_loop.epoch_loop.val_loop.restarting",
    ],
)
def test_the_trainer_has_them(trainer, path):
    part = trainer
    for name in path.split("."):
        assert hasattr(part, name), f"Lightning's Trainer has no {path}"
        part = getattr(part, name)


@pytest.mark.parametrize(
    "name",
    ["_should_skip_saving_checkpoint", "_save_topk_checkpoint", "_monitor_candidates"],
)
def test_model_checkpoint_has_the_methods(name):
    assert callable(getattr(ModelCheckpoint, name, None))


def test_model_checkpoint_has_the_attribute():
    assert ModelCheckpoint()._last_global_step_saved == 0


def test_lightning_reads_what_is_set():
    assert "self._skip_next_val" in inspect.getsource(_TrainingEpochLoop)
    assert "register_signal_handlers" in dir(_SignalConnector)
    source = inspect.getsource(pl.Trainer._run)
    assert "_signal_connector.register_signal_handlers()" in source


def test_no_other_private_part_is_used_in_the_callbacks():
    listed = {"_signal_connector", "_skip_next_val", "_last_global_step_saved"}
    listed |= {"_should_skip_saving_checkpoint", "_save_topk_checkpoint", "_monitor_candidates"}
    notes = (ROOT / "docs" / "lightning-notes.md").read_text(encoding="utf-8")
    assert all(f"`{name}" in notes or f"{name}`" in notes or name in notes for name in listed)
