"""What Lightning restores from a stranger's checkpoint: refused in one line, or harmless."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from lit_gpt.callbacks.checkpoints import save_atomically
from lit_gpt.checkpoint import read_checkpoint
from tests.conftest import train_apart

COUNTERS = ("loops", "fit_loop")
OPTIMIZER_STEPS = (
    *COUNTERS,
    "epoch_loop.automatic_optimization.optim_progress",
    "optimizer",
    "step",
    "total",
    "completed",
)
LAST = ("callbacks", "LastCheckpoint")
BEST = ("callbacks", "BestCheckpoint")


@pytest.fixture(scope="module")
def last(tmp_path_factory) -> Path:
    """The checkpoint of a run of four steps."""
    return train_apart(tmp_path_factory.mktemp("run"), 4)


@pytest.fixture
def stranger(last, tmp_path):
    """`stranger(("epoch",), 3)`: that checkpoint with another value there."""

    def make(place: tuple[str, ...], value: Any) -> Path:
        contents: Any = read_checkpoint(last)
        part = contents
        for key in place[:-1]:
            part = part[key]
        assert place[-1] in part
        part[place[-1]] = value
        save_atomically(contents, tmp_path / "stranger.ckpt")
        return tmp_path / "stranger.ckpt"

    return make


@pytest.mark.parametrize(
    ("place", "value", "name"),
    [
        ((*COUNTERS, "epoch_progress", "current", "processed"), {}, "current.processed"),
        (
            (*COUNTERS, "epoch_progress", "total", "completed"),
            "x",
            "epoch_progress.total.completed",
        ),
        ((*COUNTERS, "epoch_progress", "total", "ready"), -1, "loops.epoch_progress.total.ready"),
        ((*COUNTERS, "epoch_progress", "total"), {}, "loops.epoch_progress.total.ready"),
        (COUNTERS, 3, "loops"),
        (OPTIMIZER_STEPS, 1e300, "optim_progress.optimizer.step.total.completed"),
        (OPTIMIZER_STEPS, 10**12, "global_step"),
        ((*LAST, "best_model_path"), -1, "callbacks.LastCheckpoint.best_model_path"),
        ((*LAST, "kth_value"), "x", "callbacks.LastCheckpoint.kth_value"),
        ((*BEST, "best_k_models"), {"x": "y"}, "callbacks.BestCheckpoint"),
        ((*BEST, "kth_best_model_path"), "elsewhere", "callbacks.BestCheckpoint"),
        ((*BEST, "kth_best_model_path"), {}, "callbacks.BestCheckpoint"),
        (BEST, [], "callbacks.BestCheckpoint"),
        (("callbacks", "StepLines", "best"), {"val": 1.0}, "callbacks.StepLines.best.train"),
        (("callbacks", "StepLines", "worse"), None, "callbacks.StepLines.worse"),
        (("TextDataModule",), None, "data"),
        (("TextDataModule", "windows_seen"), -1, "data.windows_seen"),
        (("TextDataModule", "windows_seen"), 1.5, "data.windows_seen"),
        (("TextDataModule", "windows_seen"), True, "data.windows_seen"),
    ],
    ids=str,
)
def test_state_of_another_kind_is_refused(train, stranger, place, value, name):
    path = stranger(place, value)
    result = train(ckpt_path=path)
    assert result.status == 2, result.out
    assert result.err.startswith(f"error: {path} can't be continued: its ")
    assert f"{name} is not what a run saves; start a new run" in " ".join(result.err.split())
    assert len(result.err.splitlines()) == 1
    assert result.steps == []


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("optimizer_states",), [3]),
        (("lr_schedulers",), [{"last_epoch": "x"}]),
        (("loops",), {}),
        (("pytorch-lightning_version",), "x"),
        (("callbacks", "GracefulStop"), None),
    ],
    ids=str,
)
def test_what_cannot_be_restored_is_one_line(train, stranger, place, value):
    result = train(ckpt_path=stranger(place, value))
    assert result.status in (0, 2)
    if result.status == 2:
        assert len(result.err.splitlines()) == 1, result.err


@pytest.mark.parametrize("named", [True, False])
def test_moments_of_another_weight_are_refused(train, stranger, last, named):
    """A fused optimizer wrote beyond them: the same shapes in all, but not where they belong."""
    (optimizer,) = read_checkpoint(last)["optimizer_states"]
    state = optimizer["state"]
    shapes = {name: moments["exp_avg"].shape for name, moments in state.items()}
    largest = max(shapes, key=lambda name: shapes[name].numel())
    smallest = min(shapes, key=lambda name: shapes[name].numel())
    state[largest], state[smallest] = state[smallest], state[largest]
    problem = "has no optimizer state that fits its weights"
    if not named:  # as before 0.3.0, when shapes told nothing of single weights
        names = [name for group in optimizer["param_groups"] for name in group["params"]]
        optimizer["state"] = {names.index(name): moments for name, moments in state.items()}
        for group in optimizer["param_groups"]:
            group["params"] = [names.index(name) for name in group["params"]]
        problem = "its optimizer_states' exp_avg is not what a run saves"
    result = train(ckpt_path=stranger(("optimizer_states",), [optimizer]))
    assert result.status == 2
    assert problem in result.err


def test_moments_in_another_order_of_memory_are_the_same(train, stranger, last):
    (optimizer,) = read_checkpoint(last)["optimizer_states"]
    whole = train(ckpt_path=last)
    for moments in optimizer["state"].values():
        if moments["exp_avg"].ndim == 2:
            moments["exp_avg"] = moments["exp_avg"].T.contiguous().T
    result = train(ckpt_path=stranger(("optimizer_states",), [optimizer]))
    assert result.status == 0, result.err
    assert result.steps == whole.steps


@pytest.mark.parametrize("name", ["hyper_parameters", "datamodule_hyper_parameters", "corpus"])
def test_plain_parts_have_no_tensors(train, stranger, name):
    path = stranger((name,), {"learning_rate": torch.ones(3), "seed": [torch.ones(3)]})
    result = train(ckpt_path=path)
    assert result.status == 2
    assert result.err == (
        f"error: {path} is damaged or not from lit_gpt: its {name} has a tensor; use another "
        "checkpoint\n"
    )


@pytest.mark.parametrize("is_folder", [False, True])
def test_a_continued_run_removes_no_file_but_its_own(train, stranger, tmp_path, is_folder):
    """Lightning removes the checkpoint before the last, with all that is below such a path."""
    precious = tmp_path / "precious"
    if is_folder:
        precious.mkdir()
    thesis = precious / "thesis.txt" if is_folder else precious
    thesis.write_text("Chapter 1")
    own = tmp_path / "logs" / "version_0" / "checkpoints"
    path = stranger((*LAST, "best_model_path"), f"{own}/../../../precious")
    result = train(ckpt_path=path)
    assert result.status == 0, result.err
    assert (own / "last.ckpt").is_file()
    assert thesis.read_text() == "Chapter 1"


class Seen(Callback):
    """Has a state of the user's own."""

    state_key = "Seen"

    def __init__(self, state: dict[str, Any]) -> None:
        self.state = state

    def state_dict(self) -> dict[str, Any]:
        return self.state


def test_what_could_not_be_read_again_is_not_saved(train):
    result = train(callbacks=[Seen({"words": {"a", "b"}})])
    assert result.status == 2
    assert result.err == (
        "error: the callbacks can't be saved: Seen has a set; save numbers, text, "
        "lists, dicts and tensors only\n"
    )


def test_a_callback_of_ones_own_is_saved(train):
    state = {"words": ["a", "b"], "weights": torch.ones(3, dtype=torch.bfloat16)}
    result = train(callbacks=[Seen(state)])
    assert result.status == 0, result.err
    folder = Path(result.run.trainer.log_dir) / "checkpoints"
    saved = read_checkpoint(folder / "last.ckpt")["callbacks"]["Seen"]
    assert saved["words"] == ["a", "b"]
    assert torch.equal(saved["weights"], state["weights"])
