"""Epochs as steps, batches that come round, and both over an interruption."""

from __future__ import annotations

import math
import signal
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import yaml

from lit_gpt.data import TextDataModule, TrainBatches
from lit_gpt.training.epochs import Epoch


class Recorder(pl.Callback):
    """The windows and losses of each batch, and the evaluations; SIGINT during batch `stop`."""

    def __init__(self, stop: int | None = None) -> None:
        self.stop = stop
        self.windows: list[list[list[int]]] = []
        self.losses: list[float] = []
        self.evaluations: dict[int, tuple[float, float]] = {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self.windows.append(batch[0].tolist())
        if len(self.windows) == self.stop:
            signal.raise_signal(signal.SIGINT)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.losses.append(outputs["loss"].item())

    def on_validation_end(self, trainer, pl_module) -> None:
        if not trainer.sanity_checking:
            metrics = trainer.callback_metrics
            losses = (metrics["train/eval_loss"].item(), metrics["val/loss"].item())
            self.evaluations[trainer.global_step] = losses


@pytest.fixture
def record(train):
    """Trains with a Recorder; gives it and the Result."""

    def run(*args: str, stop: int | None = None, **options):
        recorder = Recorder(stop)
        result = train(*args, callbacks=[recorder], **{"samples.num_tokens": 0, **options})
        assert result.status == (130 if stop else 0), result.err
        return recorder, result

    return run


@pytest.fixture
def data(text_file: Path, tmp_path: Path) -> TextDataModule:
    return TextDataModule(str(text_file), context_length=16, cache=str(tmp_path / "cache"))


def last(result) -> Path:
    return Path(result.run.trainer.log_dir) / "checkpoints" / "last.ckpt"


# Batches that come round


@pytest.mark.parametrize("order", ["random", "shuffled"])
@pytest.mark.parametrize("option", ["limit_train_batches", "overfit_batches"])
@pytest.mark.parametrize("accumulate", [1, 2, 3])
def test_a_limit_of_batches_makes_them_come_round_again(record, order, option, accumulate):
    """Batch i is batch i mod 5: also after a stop inside a pass, and inside a step."""
    options = {"trainer.max_steps": 7, f"trainer.{option}": 5, "data.order": order}
    options |= {"trainer.accumulate_grad_batches": accumulate, "model.dropout": 0.2}
    whole, result = record(**options)
    count = 7 * accumulate
    data = result.run.data
    first = TrainBatches(data.train_tokens, data.order, 2, 16)
    assert whole.windows == [first[i % 5][0].tolist() for i in range(count)]
    before, result = record(stop=3 * accumulate, **options)
    after, _ = record(f"--ckpt_path={last(result)}", **options)
    assert before.windows + after.windows == whole.windows
    assert before.losses + after.losses == whole.losses
    both = before.evaluations | after.evaluations
    assert {step: both[step] for step in whole.evaluations} == whole.evaluations


def test_without_a_limit_no_batch_comes_again(record):
    windows = record(**{"trainer.limit_train_batches": 1.0, "trainer.max_steps": 40})[0].windows
    assert windows == record(**{"trainer.max_steps": 40})[0].windows
    assert len({str(window) for window in windows}) == 40


def test_overfitting_is_measured_on_the_batches_that_it_trains_on(record):
    """Without dropout, the training loss at step 0 is the mean of the first two batches' losses."""
    options = {"trainer.overfit_batches": 2, "trainer.max_steps": 80, "model.dropout": 0}
    options |= {"trainer.val_check_interval": 40, "model.learning_rate": 1e-20}
    recorder, result = record(**options)
    assert recorder.evaluations[0][0] == pytest.approx(np.mean(recorder.losses[:2]), abs=1e-5)
    assert len({str(window) for window in recorder.windows}) == 2
    assert result.run.trainer.num_val_batches == [2, 2]
    recorder, _ = record(**options | {"model.learning_rate": 0.03})
    train, val = recorder.evaluations[80]
    assert train < 1 < 3 < val  # it knows these windows by heart, and nothing else


def test_a_share_of_batches_is_one_of_the_windows_without_overlap(record, data):
    """A tenth of an epoch, in batches of two windows."""
    batches = (len(data.train_tokens) - 16) // 16 // 10 // 2
    for option in ("limit_train_batches", "overfit_batches"):
        options = {f"trainer.{option}": 0.1, "trainer.max_steps": 3 * batches}
        windows = record(**options, **{"trainer.val_check_interval": 100})[0].windows
        assert [windows.index(window) for window in windows] == [*range(batches)] * 3


# Epochs


def epoch_steps(data: TextDataModule, epochs: float, step_windows: int = 2) -> int:
    """By another way: steps are counted until all windows of so many epochs have been read."""
    windows = 0  # those that fit without overlap, starting as late as they ever do
    while 15 + (windows + 1) * 16 + 1 <= len(data.train_tokens):
        windows += 1
    steps = 0
    while steps * step_windows < epochs * windows - 1e-9:
        steps += 1
    return steps


@pytest.mark.parametrize("order", ["random", "shuffled"])
def test_epochs_become_steps(record, data, order):
    steps = epoch_steps(data, 2, step_windows=24)
    options = {"trainer.max_epochs": 2, "data.order": order, "data.batch_size": 8}
    options |= {"trainer.accumulate_grad_batches": 3, "trainer.val_check_interval": 0.5}
    recorder, result = record("--trainer.max_steps=-1", **options)
    assert result.run.trainer.global_step == steps == len(recorder.windows) / 3
    half = epoch_steps(data, 0.5, step_windows=24)
    assert list(recorder.evaluations) == [*range(0, steps, half), steps]
    number = 24 * steps / ((len(data.train_tokens) - 16) // 16)
    expected = f"Steps: {steps} of 384 tokens, {number:.1f} epochs, evaluated every {half} steps"
    assert expected in result.out.splitlines()


def test_every_window_is_read_in_each_shuffled_epoch(record, data):
    """Of one epoch's windows none is missing, and none comes twice."""
    options = {"trainer.max_epochs": 1, "data.order": "shuffled", "trainer.max_steps": 1000}
    recorder, _ = record(**options | {"trainer.val_check_interval": 1000})
    windows = (len(data.train_tokens) - 16) // 16
    tokens = data.train_tokens.tolist()
    read = [window for batch in recorder.windows for window in batch][:windows]
    wanted = [  # whichever token the first window starts at
        sorted(tokens[i : i + 16] for i in range(offset, offset + 16 * windows, 16))
        for offset in range(16)
    ]
    assert sorted(read) in wanted


def test_two_intervals_between_evaluations_are_refused(train):
    result = train(**{"trainer.check_val_every_n_epoch": 1, "trainer.limit_train_batches": 4})
    assert result.status == 2
    assert result.err == (
        "error: --trainer.check_val_every_n_epoch: there are two intervals; set only one of "
        "--trainer.val_check_interval (steps) and --trainer.check_val_every_n_epoch\n"
    )


def test_a_run_without_end_says_how_many_steps_make_an_epoch(record, data):
    options = {"trainer.max_steps": -1, "early_stopping.patience": 1, "model.learning_rate": 0.3}
    out = record(**options)[1].out
    assert f"Steps: until stopped, of 32 tokens, {epoch_steps(data, 1)} to an epoch\n" in out
    assert "Stopped early after step " in out


@pytest.mark.parametrize(("epochs", "evaluated"), [(1, [0, 3, 6, 8]), (2, [0, 6, 8])])
def test_evaluations_are_so_many_epochs_apart(record, epochs, evaluated):
    options = {"trainer.limit_train_batches": 3, "trainer.max_steps": 8}
    options |= {"trainer.check_val_every_n_epoch": epochs}
    assert record("--trainer.val_check_interval=null", **options)[1].evaluated == evaluated


def test_the_first_limit_reached_ends_the_run(record):
    options = {"trainer.limit_train_batches": 3}
    assert record(**options | {"trainer.max_epochs": 1})[1].evaluated == [0, 2, 3]
    assert (
        record(**options | {"trainer.max_epochs": 9, "trainer.max_steps": 4})[1].evaluated[-1] == 4
    )


def test_epochs_replace_the_default_steps_alone(train, places):
    """In config.yaml too, so that it means the same when it is used again."""
    defaults = places | {"model.d_model": 16, "model.num_blocks": 1, "model.num_heads": 2}
    defaults |= {"trainer.accelerator": "cpu", "samples.num_tokens": 0, "data.context_length": 16}
    epochs = {"trainer.max_epochs": 2, "trainer.check_val_every_n_epoch": 1}
    result = train(defaults=defaults, **epochs, **{"trainer.limit_train_batches": 4})
    assert result.evaluated == [0, 4, 8]
    config = Path(result.run.trainer.log_dir) / "config.yaml"
    saved = yaml.safe_load(config.read_text(encoding="utf-8"))["trainer"]
    assert (saved["max_steps"], saved["max_epochs"]) == (-1, 2)
    more = train(f"--config={config}", "--ckpt_path=last", "--trainer.max_epochs=3", defaults={})
    assert (more.status, more.evaluated) == (0, [12]), more.err
    done = train(f"--config={config}", "--ckpt_path=last", defaults={})
    assert done.status == 2
    assert done.err.startswith("error: --trainer.max_epochs 3: ends at step 12, and ")
    assert "is at step 12; raise it" in done.err


@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_run_of_epochs_resumes_exactly(record, accumulate):
    options = {"trainer.max_epochs": 2, "trainer.limit_train_batches": 7, "model.dropout": 0.2}
    options |= {"trainer.accumulate_grad_batches": accumulate, "model.schedule": "cosine"}
    whole, result = record(**options, **{"trainer.max_steps": 100})
    assert result.run.trainer.global_step == math.ceil(14 / accumulate)
    rate = result.run.trainer.optimizers[0].param_groups[0]["lr"]
    assert rate == pytest.approx(0, abs=1e-9)  # the schedule ends with the last epoch
    before, result = record(stop=2 * accumulate, **options, **{"trainer.max_steps": 100})
    after, _ = record(f"--ckpt_path={last(result)}", **options, **{"trainer.max_steps": 100})
    assert before.losses + after.losses == whole.losses


def test_the_plan_of_a_run_of_epochs(places, capsys, monkeypatch):
    from lit_gpt.planning.plan import main

    monkeypatch.setattr("sys.argv", ["plan.py"])
    options = places | {"model.d_model": 16, "model.num_blocks": 1, "model.num_heads": 2}
    options |= {"data.context_length": 16, "trainer.max_epochs": 3, "samples.num_tokens": 0}
    options |= {"trainer.limit_train_batches": 50, "trainer.check_val_every_n_epoch": 1}
    assert main([f"--{name}={value}" for name, value in options.items()]) == 0
    out = capsys.readouterr().out
    assert "Epochs: 3.00 (150 steps of 32 tokens)" in out
    assert "4 evaluations" in out  # at 0, 50, 100, 150


@pytest.mark.parametrize(
    ("epochs", "steps"), [(1, 13), (2, 25), (0.5, 7), (0.1, 2), (0.01, 1), (3, 38), (0.2, 3)]
)
def test_an_epoch_counts_in_exact_fractions(epochs, steps):
    assert Epoch(windows=100, step_windows=8, context_length=4).steps(epochs) == steps


# The lowest number of steps


def test_a_run_with_a_lowest_number_of_steps_is_evaluated_at_its_end(train):
    assert train(**{"trainer.min_steps": 2, "trainer.max_steps": 5}).evaluated == [0, 2, 4, 5]
    assert train(**{"trainer.min_steps": 5, "trainer.max_steps": 5}).evaluated == [0, 2, 4, 5]


@pytest.mark.parametrize("lowest", [{"min_steps": 8}, {"min_epochs": 2}])
def test_no_run_ends_early_before_its_lowest_number_of_steps(train, lowest):
    options = {f"trainer.{name}": value for name, value in lowest.items()}
    options |= {"trainer.limit_train_batches": 4, "trainer.max_steps": 20}
    callback = "{class_path: EarlyStopping, init_args: {monitor: step, patience: 1}}"
    result = train(f"--trainer.callbacks={callback}", **options)
    assert result.status == 0, result.err
    assert result.evaluated[-1] in (8, 10)
    assert train(f"--trainer.callbacks={callback}").evaluated[-1] == 4
