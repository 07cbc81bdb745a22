"""Early stopping: when it ends a run, what is said, and that resuming is exact."""

from __future__ import annotations

import json
import re
import shlex
import signal

import pytest
from lightning.pytorch.callbacks import Callback

from lit_gpt.callbacks.stopping import GracefulStop
from tests.conftest import Result

# Steps of this size go up and down, which makes evaluations without an improvement.
NOISY = {"model.learning_rate": 0.03, "trainer.val_check_interval": 5, "trainer.max_steps": 400}

EVALUATIONS: list[tuple[int, float]] = []  # see `whole`


def losses(result: Result) -> list[tuple[int, float]]:
    """The validation losses after step 0, as history.json has them."""
    history = json.loads((result.run.folder / "history.json").read_text(encoding="utf-8"))
    return [(step, loss) for step, loss in history["curves"]["val/loss"] if step > 0]


def stop_of(evaluations: list[tuple[int, float]], patience: int, min_delta: float = 0.0) -> tuple:
    """At which step a run must end, and at which it was best, by a loop of our own."""
    best = (0, float("inf"))
    waited = 0
    for step, loss in evaluations:
        waited += 1
        if loss < best[1] - min_delta:
            best = (step, loss)
            waited = 0
        if waited == patience:
            return step, best
    raise AssertionError("it never stops")


@pytest.fixture
def whole(train) -> list[tuple[int, float]]:
    """All evaluations of a run that doesn't stop early, done once: all tests have one text."""
    if not EVALUATIONS:
        EVALUATIONS.extend(losses(train(**NOISY)))
    return EVALUATIONS


@pytest.mark.parametrize(("patience", "min_delta"), [(1, 0.0), (3, 0.0), (2, 0.05)])
def test_it_stops_after_so_many_evaluations_without_improvement(train, whole, patience, min_delta):
    options = {"early_stopping.patience": patience, "early_stopping.min_delta": min_delta}
    result = train(**NOISY, **options)
    assert result.status == 0, result.err
    step, (best_step, best_loss) = stop_of(whole, patience, min_delta)
    assert 5 < step < 400
    assert result.evaluated[-1] == step
    assert losses(result) == [entry for entry in whole if entry[0] <= step]
    line = (
        f"Stopped early after step {step}: no lower validation loss in {patience} evaluations, "
        f"the lowest was {best_loss:.3f} at step {best_step}"
    )
    assert line in result.out.splitlines()
    assert "Final validation loss: " in result.out


def test_the_printed_command_goes_on_as_if_it_had_waited_longer(train, whole):
    first = train(**NOISY, **{"early_stopping.patience": 1})
    command = next(x for x in first.out.splitlines() if x.startswith("Continue:")).split(":", 1)[1]
    assert command.endswith(" --early_stopping.patience=2")
    second = train(*shlex.split(command)[2:], defaults={})
    assert second.status == 0, second.err
    step, _ = stop_of(whole, 2)
    assert second.evaluated[-1] == step > first.evaluated[-1]
    assert losses(second) == [entry for entry in whole if entry[0] <= step]
    assert "Resumed with different options" not in second.out


def test_a_run_that_stopped_early_is_not_continued_without_a_change(train):
    options = NOISY | {"early_stopping.patience": 1}
    train(**options)
    refused = train(ckpt_path="last", **options)
    assert (refused.status, len(refused.err.splitlines())) == (2, 1)
    assert refused.err.startswith("error: --early_stopping.patience 1: must be above 1: ")
    assert "raise it, or set it to 0 to train until --trainer.max_steps" in refused.err
    assert train(ckpt_path="last", **NOISY | {"trainer.max_steps": 60}).evaluated[-1] == 60


@pytest.mark.parametrize("every", [1, 5], ids=["between evaluations", "instead of evaluations"])
def test_a_run_in_pieces_stops_where_one_in_a_piece_does(train, whole, every):
    """A stop leaves the evaluation that is due then to the next piece."""
    options = NOISY | {"early_stopping.patience": 3}
    step, _ = stop_of(whole, 3)

    class Signal(Callback):
        def on_train_batch_start(self, trainer, *_) -> None:
            if (trainer.global_step + 1) % every == 0 and trainer.global_step > self.since + 3:
                self.stop.signal = signal.SIGTERM

        def on_train_start(self, trainer, *_) -> None:
            self.since = trainer.global_step
            (self.stop,) = (c for c in trainer.callbacks if isinstance(c, GracefulStop))

    result = train(**options, callbacks=[Signal()])
    for _ in range(200):
        if result.status != 143:
            break
        result = train(ckpt_path="last", **options, callbacks=[Signal()])
    assert result.status == 0, result.err
    assert f"Stopped early after step {step}: " in result.out
    assert losses(result) == [entry for entry in whole if entry[0] <= step]


def test_it_waits_for_min_steps(train, whole):
    step, _ = stop_of(whole, 1)
    options = NOISY | {"early_stopping.patience": 1, "trainer.min_steps": step + 1}
    result = train(**options)
    bad = [
        s for (s, loss), lowest in zip(whole, lowest_before(whole), strict=True) if loss >= lowest
    ]
    assert step == bad[0]
    assert result.evaluated[-1] == next(s for s in bad if s > step)


def lowest_before(evaluations: list[tuple[int, float]]) -> list[float]:
    lowest = [float("inf")]
    for _, loss in evaluations:
        lowest.append(min(lowest[-1], loss))
    return lowest[:-1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"early_stopping.patience": -1}, "--early_stopping.patience -1: must be at least 0"),
        ({"early_stopping.min_delta": -1}, "--early_stopping.min_delta -1.0: must be at least 0"),
    ],
)
def test_values_out_of_range(train, options, message):
    result = train(**options)
    assert result.status == 2
    assert message in result.err


def test_lightnings_own_is_explained_and_can_be_continued(train, whole):
    settings = {"class_path": "lightning.pytorch.callbacks.EarlyStopping"}
    settings["init_args"] = {"monitor": "val/loss", "patience": 1}
    first = train(f"--trainer.callbacks={json.dumps([settings])}", **NOISY)
    step, _ = stop_of(whole, 1)
    reason = (
        r"Monitored metric val/loss did not improve in the last 1 records\. Best score: \d\.\d+\."
    )
    assert re.search(rf"^Stopped early after step {step}: {reason}$", first.out, re.MULTILINE)
    command = next(x for x in first.out.splitlines() if x.startswith("Continue:")).split(":", 1)[1]
    second = train(*shlex.split(command)[2:], "--trainer.max_steps=100", defaults={})
    assert second.status == 0, second.err
    assert second.evaluated[-1] == 100
