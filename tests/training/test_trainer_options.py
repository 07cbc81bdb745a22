"""Every option of the Trainer does what the table of docs/options.md says, or is refused there."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import yaml

from tests.conftest import ROOT, Result

SMALLER = {"data.context_length": 8, "model.num_blocks": 1, "samples.num_tokens": 0}
SMALLER |= {"trainer.max_steps": 4, "trainer.limit_val_batches": 1}


def rows() -> list[tuple[str, list[str], list[str]]]:
    """The names of the table's options, the values that work and those that are refused."""
    page = (ROOT / "docs" / "options.md").read_text(encoding="utf-8")
    lines = re.findall(r"^\| `--trainer\.(\w+)` \|.*\|(.*)\|(.*)\|$", page, re.MULTILINE)
    return [
        (name, re.findall("`([^`]+)`", works), re.findall("`([^`]+)`", refused))
        for name, works, refused in lines
    ]


ROWS = rows()


def test_the_table_has_every_option_of_the_trainer():
    assert [name for name, _, _ in ROWS] == list(inspect.signature(pl.Trainer).parameters)
    assert all(works or refused for _, works, refused in ROWS)


def of_trainer(look: Callable[[pl.Trainer, Any], bool]) -> Callable[[Result, Any], bool]:
    return lambda result, value: look(result.run.trainer, value)


EPOCH = {"trainer.limit_train_batches": 3}  # so that an epoch is short
MORE = {  # further options of a row's runs
    "min_steps": {"trainer.max_steps": 5},
    "max_epochs": EPOCH | {"trainer.max_steps": 4},
    "min_epochs": EPOCH,
    "check_val_every_n_epoch": EPOCH | {"trainer.val_check_interval": "null"},
}
INSTEAD = "bf16-mixed (16-mixed needs a GPU)"
PRECISIONS = {"bf16": "bf16-mixed", "16": INSTEAD, "16-mixed": INSTEAD}  # on the CPU


def folder(result: Result) -> Path:
    return Path(result.run.trainer.log_dir or result.run.trainer.default_root_dir)


def curve_steps(result: Result) -> int:
    """How many points the curve of the training loss has."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder(result)))
    events.Reload()
    return len(events.Scalars("train/loss")) if "train/loss" in events.Tags()["scalars"] else 0


def logged(result: Result, value: Any) -> bool:
    kinds = [type(logger).__name__ for logger in result.run.trainer.loggers]
    if value is False:
        return kinds == []
    return kinds == (["RunLogger"] if value is True else ["RunLogger", "CSVLogger"])


def called(result: Result, value: Any) -> bool:
    given = value if isinstance(value, list) else [value]
    names = [item if isinstance(item, str) else item["class_path"] for item in given]
    kinds = [type(callback).__name__ for callback in result.run.trainer.callbacks]
    return all(name in kinds for name in names)


EFFECTS: dict[str, Callable[[Result, Any], bool]] = {
    "accelerator": lambda r, v: "Device: cpu" in r.out,
    "strategy": of_trainer(
        lambda t, v: (
            type(t.strategy).__name__
            == ("FSDP2Strategy" if v == "fsdp2" else "SingleDeviceStrategy")
        )
    ),
    "devices": of_trainer(lambda t, v: t.num_devices == 1),
    "num_nodes": of_trainer(lambda t, v: t.num_nodes == 1),
    "precision": lambda r, v: f"precision {PRECISIONS.get(str(v), v)}\n" in r.out,
    "logger": logged,
    "callbacks": called,
    "fast_dev_run": lambda r, v: r.evaluated == [0, int(v)] and not list(folder(r).rglob("*.ckpt")),
    "max_epochs": lambda r, v: r.evaluated[-1] == (3 if v == 1 else 4),
    "min_epochs": of_trainer(lambda t, v: t.min_steps == 3),
    "max_steps": lambda r, v: r.evaluated == [0, 2, 3],
    "min_steps": lambda r, v: r.evaluated == [0, 2, 4, 5] and r.run.trainer.min_steps == 3,
    "max_time": lambda r, v: 3500 < r.run.stop.timer.time_remaining() <= 3600,
    "limit_train_batches": lambda r, v: (
        r.run.data.train_batches
        == {3: 3, 1.0: None, 0.1: (len(r.run.data.train_tokens) - 8) // 8 // 10 // 2}[v]
    ),
    "limit_val_batches": lambda r, v: (
        bool(r.evaluated) == (v != 0)
        and (v == 0 or r.run.trainer.num_val_batches == [{2: 2, 0.5: 9, 1.0: 19}[v]] * 2)
    ),
    "overfit_batches": lambda r, v: (
        len(r.run.data.val_dataloader()["train"].starts) == 2 * r.run.data.train_batches
    ),
    "val_check_interval": lambda r, v: r.evaluated == ([0, 3, 4] if v == 3 else [0, 2, 4]),
    "check_val_every_n_epoch": lambda r, v: r.evaluated == [0, 3, 4],
    "num_sanity_val_steps": lambda r, v: r.evaluated == [0, 2, 4],
    "log_every_n_steps": lambda r, v: curve_steps(r) == 4 * v,
    "enable_checkpointing": lambda r, v: (folder(r) / "checkpoints" / "last.ckpt").is_file(),
    "enable_progress_bar": of_trainer(lambda t, v: (t.progress_bar_callback is not None) == v),
    "enable_model_summary": lambda r, v: "Total estimated model params" in r.out,
    "accumulate_grad_batches": lambda r, v: "Steps: 4 of 48 tokens" in r.out,
    "gradient_clip_val": of_trainer(lambda t, v: t.gradient_clip_val == v),
    "deterministic": lambda r, v: (
        torch.are_deterministic_algorithms_enabled()
        and torch.is_deterministic_algorithms_warn_only_enabled() == (v == "warn")
    ),
    "benchmark": lambda r, v: torch.backends.cudnn.benchmark,
    "inference_mode": of_trainer(lambda t, v: t.validate_loop.inference_mode == v),
    "use_distributed_sampler": lambda r, v: True,
    "profiler": lambda r, v: type(r.run.trainer.profiler).__name__ == "SimpleProfiler",
    "detect_anomaly": of_trainer(lambda t, v: t._detect_anomaly),
    "plugins": lambda r, v: True,
    "default_root_dir": lambda r, v: Path("elsewhere/version_0/checkpoints/last.ckpt").is_file(),
    "enable_autolog_hparams": lambda r, v: (
        not (folder(r) / "hparams.yaml").read_text().strip("{}\n")
    ),
}


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.benchmark = False


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, works, _ in ROWS for value in works]
)
def test_what_works_has_its_effect(name, value, train, recwarn):
    options = SMALLER | MORE.get(name, {})
    result = train(**options | {f"trainer.{name}": value})
    assert result.status == 0, result.err
    given = 3 if value == "3e0" else yaml.safe_load(value)
    assert EFFECTS[name](result, given)
    assert not [w.message for w in recwarn if "/lightning/" in w.filename.replace("\\", "/")]


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, _, refused in ROWS for value in refused]
)
def test_what_is_refused_is_one_line_that_names_the_option(name, value, train):
    result = train(**SMALLER | {f"trainer.{name}": value})
    assert result.status == 2, result.out
    assert len(result.err.splitlines()) == 1, result.err
    assert result.err.startswith("error: ")
    assert len(result.err) < 300
    assert f"--trainer.{name}" in result.err


@pytest.mark.parametrize(
    "more", [{"inference_mode": True}, {"num_sanity_val_steps": 2}, {"detect_anomaly": True}]
)
@pytest.mark.parametrize("style", ["classic", "modern"])
def test_numbers_stay_the_same(more, style, train):
    """Also if tensors of the evaluation at step 0 are used again in the fit."""
    options = {"model.style": style, "model.dropout": 0.2}
    changed = train(**options | {f"trainer.{name}": value for name, value in more.items()})
    assert changed.steps == train(**options).steps


def test_gradients_are_clipped_by_norm_or_by_value(train):
    by_norm = Gradients()
    by_value = Gradients()
    for algorithm, callback in (("norm", by_norm), ("value", by_value)):
        options = {"trainer.gradient_clip_val": 1e-3, "trainer.gradient_clip_algorithm": algorithm}
        assert train(callbacks=[callback], **options).status == 0
    assert len(by_norm.norms) == len(by_value.norms) == 6
    assert all(norm == pytest.approx(1e-3, rel=1e-3) for norm in by_norm.norms)
    assert all(norm > 2e-3 for norm in by_value.norms)
    assert max(by_value.largest) == pytest.approx(1e-3, rel=1e-3)


class Gradients(pl.Callback):
    """The norm and the largest value of the gradients of each step, as the optimizer sees them."""

    def __init__(self) -> None:
        self.norms: list[float] = []
        self.largest: list[float] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
        if gradients:
            self.norms.append(torch.nn.utils.get_total_norm(gradients).item())
            self.largest.append(max(g.abs().max().item() for g in gradients))


def test_a_moving_average_of_the_weights_resumes_exactly(train):
    """The one of Lightning's callbacks with weights of its own."""
    callback = "--trainer.callbacks=EMAWeightAveraging"
    whole = train(callback)
    first = train(callback, **{"trainer.max_steps": 3})
    path = folder(first) / "checkpoints" / "last.ckpt"
    second = train(callback, f"--ckpt_path={path}")
    assert second.steps == whole.steps[-2:]
    assert whole.steps != train().steps
