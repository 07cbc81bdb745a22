"""A loss or gradient that is no number: the run stops at that step, or the update is skipped."""

from __future__ import annotations

import re
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch

from lit_gpt.callbacks.nonfinite import Reading, StepWatch
from lit_gpt.checkpoint import read_checkpoint
from lit_gpt.errors import UserError
from lit_gpt.training import train as train_command
from tests.core.test_module import curves


class Poison(pl.Callback):
    """Spoils the loss or the gradient at some steps; keeps the weights after each step."""

    def __init__(self, what: str, value: float, *steps: int) -> None:
        self.what, self.value, self.steps = what, value, steps
        self.weights: dict[int, torch.Tensor] = {}
        self.norms: list[float] = []

    def on_train_start(self, trainer, pl_module) -> None:
        def spoil(module, args, logits):
            now = module.training and trainer.global_step + 1 in self.steps
            return logits * self.value if now and self.what == "loss" else logits

        pl_module.gpt.head.register_forward_hook(spoil)

    def on_after_backward(self, trainer, pl_module) -> None:
        if self.what == "gradient" and trainer.global_step + 1 in self.steps:
            pl_module.gpt.head.weight.grad[0, 0] = self.value

    def on_train_batch_end(self, trainer, pl_module, *args) -> None:
        self.weights[trainer.global_step] = pl_module.gpt.head.weight.detach().clone()


@pytest.fixture
def poisoned(train, monkeypatch):
    def run(what: str, value: float, *steps: int, **options):
        poison = Poison(what, value, *steps)
        with monkeypatch.context() as patch:  # in the place of a callback that only measures
            patch.setattr(train_command, "Throughput", lambda: poison)
            return train(**options), poison

    return run


def last_of(result) -> Path:
    return Path(result.cli.trainer.default_root_dir) / "version_0" / "checkpoints" / "last.ckpt"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_bad_loss_stops_the_run_at_that_step(poisoned, tmp_path, value, accumulate):
    options = {"trainer.accumulate_grad_batches": accumulate, "model.learning_rate": 2e-3}
    result, _ = poisoned("loss", value, 5, **options)
    assert (result.status, len(result.err.splitlines())) == (2, 1), result.err
    assert "no finite number at step 5: loss nan, gradient norm nan, learning rate 0.002" in (
        result.err
    )
    assert "--model.skip_bad_steps" in result.err
    last = read_checkpoint(tmp_path / "logs" / "version_0" / "checkpoints" / "last.ckpt")
    assert last["global_step"] == 4
    assert all(torch.isfinite(weight).all() for weight in last["state_dict"].values())


def test_a_bad_gradient_shows_in_the_next_loss_and_is_never_saved(poisoned, tmp_path):
    result, _ = poisoned("gradient", float("nan"), 3)
    assert result.status == 2
    assert "no finite number at step 4: loss nan" in result.err
    steps = {"checkpoints.every_n_steps": 1, "trainer.default_root_dir": tmp_path / "other"}
    result, _ = poisoned("gradient", float("nan"), 3, **steps)
    assert result.status == 2
    assert "a weight is no finite number after step 3, so nothing was saved" in result.err
    saved = {path.name for path in (tmp_path / "other").rglob("*.ckpt")}
    assert saved == {"step_1.ckpt", "step_2.ckpt", "best.ckpt", "last.ckpt"}


@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_bad_updates_are_skipped_and_counted(poisoned, what, optimizer):
    options = {"model.skip_bad_steps": 2, "model.optimizer": optimizer}
    options |= {"trainer.gradient_clip_val": 1}
    result, poison = poisoned(what, float("nan"), 3, 5, **options)
    assert result.status == 0, result.err
    weights = poison.weights
    assert [torch.equal(weights[i], weights[i - 1]) for i in range(2, 7)] == [
        *(False, True, False, True, False),
    ]
    lines = [line for line in result.out.splitlines() if line.startswith("No update at")]
    assert [re.match(r"No update at step (\d): loss ", line)[1] for line in lines] == ["3", "5"]
    assert lines[1].endswith("(2 of 2)")
    assert "Updates left out: 2 (loss or gradient was no finite number)" in result.out
    logged = curves(Path(result.cli.trainer.log_dir))["skipped_steps"]
    assert logged == [(3, 1.0), (5, 2.0)]
    assert result.evaluated == [0, 2, 4, 6]


def test_more_bad_updates_than_allowed_stop_the_run(poisoned):
    result, _ = poisoned("loss", float("nan"), 2, 4, **{"model.skip_bad_steps": 1})
    assert (result.status, len(result.err.splitlines())) == (2, 1)
    assert "at step 4: loss nan" in result.err
    assert "after 1 skipped updates" in result.err


def test_skipped_updates_are_counted_over_a_resume(poisoned):
    options = {"model.skip_bad_steps": 1}
    result, _ = poisoned("loss", float("nan"), 2, **options)
    last = last_of(result)
    assert read_checkpoint(last)["skipped_steps"] == 1
    more = {"ckpt_path": last, "trainer.max_steps": 9, **options}
    result, _ = poisoned("loss", float("nan"), 8, **more)
    assert result.status == 2
    assert "at step 8: loss nan" in result.err


def test_watching_changes_nothing_where_all_is_well(train):
    assert train().steps == train(**{"model.skip_bad_steps": 3}).steps


def test_a_learning_rate_far_too_high(train):
    result = train(**{"model.learning_rate": 1e30, "trainer.max_steps": 40})
    assert (result.status, len(result.err.splitlines())) == (2, 1), result.err
    assert "loss or gradient is no finite number at step 2:" in result.err


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA card")
def test_on_cuda_a_step_is_checked_during_the_next():
    watch = StepWatch(allowed=0)
    good, bad = (torch.tensor(value, device="cuda") for value in (1.0, float("nan")))

    def step(number: int, loss: torch.Tensor) -> bool:
        return watch.may_update(Reading(number, 0.1, loss, [good], ("loss",)))

    assert step(1, good)
    assert step(2, bad)
    with pytest.raises(UserError, match=r"at step 2: loss nan, gradient norm 1, learning"):
        step(3, good)
    assert step(4, bad)
    with pytest.raises(UserError, match="at step 4"):
        watch.check()
