"""The parts of Lightning that are not in its documentation and that lit_gpt uses are there.

Each has its reason in docs/lightning-notes.md. One that is gone or renamed would mostly be set on
an object that no longer reads it, and fail silently.
"""

from __future__ import annotations

import inspect
import re

import lightning.pytorch as pl
import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.strategies import ModelParallelStrategy
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
    source = inspect.getsource(ModelParallelStrategy.setup_environment)
    assert "self._data_parallel_size, self._tensor_parallel_size, self.world_size" in source
    assert "self._skip_next_val" in inspect.getsource(_TrainingEpochLoop)
    assert "register_signal_handlers" in dir(_SignalConnector)
    source = inspect.getsource(pl.Trainer._run)
    assert "_signal_connector.register_signal_handlers()" in source


def test_the_notes_list_what_the_callbacks_use():
    """Every private attribute of another object in lit_gpt/callbacks has its line in the notes."""
    notes = (ROOT / "docs" / "lightning-notes.md").read_text(encoding="utf-8")
    for path in (ROOT / "lit_gpt" / "callbacks").glob("*.py"):
        code = path.read_text(encoding="utf-8")
        own = set(re.findall(r"def (_[a-z]\w*)", code))
        for name in set(re.findall(r"\.(_[a-z]\w*)", code)) - own - {"_exit"}:
            assert name in notes, f"{name} in {path.name}"
