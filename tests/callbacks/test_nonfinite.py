"""A non-finite loss or gradient: the run stops at that step, or the update is skipped."""

from __future__ import annotations

import re
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from lit_gpt.callbacks.checkpoints import StepCheckpoints
from lit_gpt.callbacks.nonfinite import NonFiniteGuard
from lit_gpt.checkpoint import Checkpoint
from lit_gpt.errors import UserError
from lit_gpt.module import LitGPT

NAN, INF = float("nan"), float("inf")


class Poison(pl.Callback):
    """Spoils the loss or the gradient at some steps; keeps the weights after each step."""

    def __init__(self, what: str, value: float, *steps: int) -> None:
        self.what = what
        self.value = value
        self.steps = steps
        self.weights: dict[int, torch.Tensor] = {}

    def on_train_start(self, trainer, pl_module) -> None:
        def spoil(module, args, hidden_states):
            now = module.training and trainer.global_step + 1 in self.steps
            return hidden_states * self.value if now and self.what == "loss" else hidden_states

        pl_module.gpt.norm.register_forward_hook(spoil)  # the input of the output layer

    def on_after_backward(self, trainer, pl_module) -> None:
        if self.what == "gradient" and trainer.global_step + 1 in self.steps:
            pl_module.gpt.head.weight.grad[0, 0] = self.value

    def on_train_batch_end(self, trainer, pl_module, *args) -> None:
        self.weights[trainer.global_step] = pl_module.gpt.head.weight.detach().clone()


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_bad_loss_stops_the_run_at_that_step(fit, tmp_path, value, accumulate):
    callbacks = [NonFiniteGuard(), Poison("loss", value, 5), StepCheckpoints(1, keep=-1)]
    with pytest.raises(UserError) as error:
        fit(callbacks, {"accumulate_grad_batches": accumulate}, learning_rate=2e-3)
    numbers = "at step 5: loss nan, gradient norm nan, learning rate 0.002"
    assert error.value.problem == f"non-finite loss or gradient {numbers}"
    assert "`skip_bad_steps`=10" in error.value.hint
    last = Checkpoint.read(tmp_path / "checkpoints" / "step_4.ckpt")
    assert last.global_step == 4
    assert all(torch.isfinite(weight).all() for weight in last.weights.values())
    assert not (tmp_path / "checkpoints" / "step_5.ckpt").exists()


def test_a_bad_gradient_shows_in_the_next_loss_and_is_never_saved(fit, tmp_path):
    with pytest.raises(UserError, match="at step 4: loss nan"):
        fit([NonFiniteGuard(), Poison("gradient", NAN, 3)])
    with pytest.raises(UserError, match="weight is not finite after step 3, so nothing was saved"):
        fit([NonFiniteGuard(), Poison("gradient", NAN, 3), StepCheckpoints(1, keep=-1)])
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {
        "step_1.ckpt",
        "step_2.ckpt",
    }


@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_bad_updates_are_skipped_counted_and_logged(fit, tmp_path, capsys, what, optimizer):
    guard, poison = NonFiniteGuard(), Poison(what, NAN, 3, 5)
    logger = CSVLogger(tmp_path, name="", version="run")
    fit(
        [guard, poison],
        {"gradient_clip_val": 1, "logger": logger},
        skip_bad_steps=2,
        optimizer=optimizer,
    )
    weights = poison.weights
    assert [torch.equal(weights[i], weights[i - 1]) for i in range(2, 7)] == [
        *(False, True, False, True, False),
    ]
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Skipped")]
    steps = [re.match(r"Skipped the update at step (\d): loss ", line)[1] for line in lines]
    assert steps == ["3", "5"]
    assert lines[1].endswith("(2 of 2 allowed)")
    assert guard.skipped == 2
    head, *rows = (tmp_path / "run" / "metrics.csv").read_text().splitlines()
    column = head.split(",").index("skipped_steps")
    assert [row.split(",")[column] for row in rows if row.split(",")[column]] == ["1.0", "2.0"]


def test_more_bad_updates_than_allowed_stop_the_run(fit):
    with pytest.raises(UserError, match=r"at step 4: loss nan.*, after 1 skipped updates"):
        fit([NonFiniteGuard(), Poison("loss", NAN, 2, 4)], skip_bad_steps=1)


def test_skipped_updates_are_counted_over_a_resume(fit, tmp_path):
    fit([NonFiniteGuard(), Poison("loss", NAN, 2), StepCheckpoints(1, keep=-1)], skip_bad_steps=1)
    last = tmp_path / "checkpoints" / "step_6.ckpt"
    assert Checkpoint.read(last).skipped_steps == 1
    with pytest.raises(UserError, match="at step 8: loss nan"):
        fit(
            [NonFiniteGuard(), Poison("loss", NAN, 8)],
            {"max_steps": 9},
            ckpt_path=last,
            skip_bad_steps=1,
        )


def test_the_guard_changes_nothing_where_all_is_finite(train):
    assert train().steps == train(**{"model.skip_bad_steps": 3}).steps


def test_a_learning_rate_far_too_high_and_skipping_in_the_command(train):
    result = train(**{"model.learning_rate": 1e30, "trainer.max_steps": 40})
    assert (result.status, len(result.err.splitlines())) == (2, 1), result.err
    assert "non-finite loss or gradient at step 2: loss nan" in result.err


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA card")
def test_on_cuda_a_step_is_checked_during_the_next():
    guard = NonFiniteGuard()
    model = LitGPT(vocab_size=8, d_model=8, num_heads=2, num_blocks=1).cuda()
    for weight in model.parameters():
        weight.grad = torch.ones_like(weight)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    def step(number: int, loss: float) -> None:
        model.train_loss = torch.tensor(loss, device="cuda")
        trainer = SimpleNamespace(global_step=number - 1, precision="32-true", world_size=1)
        guard.on_before_optimizer_step(trainer, model, optimizer)

    step(1, 1.0)
    step(2, NAN)
    with pytest.raises(UserError, match=r"at step 2: loss nan, gradient norm \d+.*, learning"):
        step(3, 1.0)
    step(4, NAN)
    with pytest.raises(UserError, match="at step 4"):
        guard.on_validation_start(None, model)
