"""A continued run is, bit for bit, the run that was never interrupted."""

from __future__ import annotations

import signal
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch

from lit_gpt.checkpoint import read_checkpoint


class Recorder(pl.Callback):
    """The exact losses of each batch and each evaluation; sends SIGINT during batch `stop`."""

    def __init__(self, stop: int | None = None) -> None:
        self.stop = stop
        self.batches: list[float] = []
        self.evaluations: dict[int, tuple[float, float]] = {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if len(self.batches) + 1 == self.stop:
            signal.raise_signal(signal.SIGINT)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.batches.append(outputs["loss"].item())

    def on_validation_end(self, trainer, pl_module) -> None:
        metrics = trainer.callback_metrics
        losses = (metrics["train/eval_loss"].item(), metrics["val/loss"].item())
        self.evaluations[trainer.global_step] = losses


@pytest.fixture
def record(train):
    """Runs `train` with a Recorder; gives it, the final weights and the folder of the run."""

    def run(stop: int | None = None, **options):
        recorder = Recorder(stop)
        result = train(callbacks=[recorder], **{"model.dropout": 0.2, **options})
        assert result.status == (130 if stop else 0), result.err
        return recorder, result.run.model.gpt.state_dict(), Path(result.run.trainer.log_dir)

    return run


def same(weights: dict, others: dict) -> bool:
    return all(torch.equal(weights[name], others[name]) for name in weights)


@pytest.mark.parametrize(("order", "optimizer"), [("random", "adamw"), ("shuffled", "muon")])
@pytest.mark.parametrize(
    ("accumulate", "stop"),  # stopped during this batch
    [(1, 3), (1, 4), (4, 9), (4, 12), (4, 16)],
    ids=["off the interval", "on it", "inside a step", "at its end", "at an evaluation"],
)
def test_a_stopped_run_goes_on_as_if_nothing_had_happened(
    record, accumulate, stop, order, optimizer
):
    options = {"trainer.accumulate_grad_batches": accumulate, "data.order": order}
    options |= {"model.optimizer": optimizer}
    options |= {"model.schedule": "cosine", "model.warmup_steps": 2, "trainer.gradient_clip_val": 1}
    whole, whole_weights, _ = record(**options)
    first, _, run = record(stop, **options)
    second, weights, same_run = record(**options, ckpt_path=run / "checkpoints" / "last.ckpt")
    assert first.batches + second.batches == whole.batches
    assert list(whole.evaluations) == [0, 2, 4, 6]
    both = first.evaluations | second.evaluations
    assert {step: both[step] for step in whole.evaluations} == whole.evaluations
    assert same(weights, whole_weights)
    assert same_run == run


@pytest.mark.parametrize("precision", ["64-true", "bf16-true", "bf16-mixed"])
def test_so_it_does_in_every_precision(record, precision):
    """float64 weights were once rounded to float32 on the way."""
    options = {"trainer.precision": precision}
    whole, whole_weights, _ = record(**options)
    first, _, run = record(3, **options)
    second, weights, _ = record(**options, ckpt_path=run / "checkpoints" / "last.ckpt")
    assert first.batches + second.batches == whole.batches
    assert same(weights, whole_weights)


@pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-true", "bf16-mixed"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_so_it_does_in_the_fast_style(record, precision, optimizer):
    options = {"model.style": "fast", "model.optimizer": optimizer, "model.schedule": "linear"}
    options |= {"model.table_rate": 3.0, "model.table_eps": 1e-3, "model.bigram_rows": 500}
    options |= {"model.spelling_rows": 300, "model.output_spelling_rows": 200}
    options |= {"model.softmax_cutoff": 0.5}
    options |= {"trainer.precision": precision, "trainer.deterministic": True}
    whole, whole_weights, _ = record(**options)
    first, _, run = record(3, **options)
    second, weights, _ = record(**options, ckpt_path=run / "checkpoints" / "last.ckpt")
    assert first.batches + second.batches == whole.batches
    assert same(weights, whole_weights)


def test_a_finished_run_can_be_made_longer(record):
    whole, whole_weights, _ = record(**{"trainer.max_steps": 9})
    _, _, run = record(**{"trainer.max_steps": 5})
    last = run / "checkpoints" / "last.ckpt"
    second, weights, _ = record(**{"trainer.max_steps": 9}, ckpt_path=last)
    assert second.batches == whole.batches[5:]
    assert {k: v for k, v in second.evaluations.items() if k in whole.evaluations} == {
        k: whole.evaluations[k] for k in (6, 8, 9)
    }
    assert same(weights, whole_weights)


def test_an_earlier_checkpoint_starts_a_run_of_its_own(record):
    """Nothing that was saved after it is overwritten."""
    _, whole_weights, run = record()
    checkpoints = run / "checkpoints"
    earlier = (checkpoints / "last.ckpt").rename(checkpoints / "earlier.ckpt")
    _, weights, other = record(ckpt_path=earlier, **{"trainer.max_steps": 8})
    assert other.name == "version_1"
    assert read_checkpoint(earlier)["global_step"] == 6
    assert not same(weights, whole_weights)


def test_the_best_score_is_kept_over_a_resume(record):
    """best.ckpt is the best of all evaluations, those before the interruption included."""
    options = {"model.learning_rate": 3.0}  # too high: the best model comes early
    first, _, run = record(5, **options)
    second, _, _ = record(**options, ckpt_path=run / "checkpoints" / "last.ckpt")
    scores = {step: val for step, (_, val) in (first.evaluations | second.evaluations).items()}
    best_step = min((step for step in scores if step > 0), key=scores.get)
    assert best_step <= 5
    best = read_checkpoint(run / "checkpoints" / "best.ckpt")
    assert best["global_step"] == best_step


def test_a_killed_process_continues_from_its_last_evaluation(train, start, tmp_path):
    """SIGKILL in the middle of training, then `--ckpt_path last`: the same lines and weights."""
    options = {"trainer.max_steps": 60, "trainer.val_check_interval": 10}
    whole = train(**options, **{"trainer.default_root_dir": tmp_path / "whole"})
    killed = start(**options)
    killed.until("Step: 30")
    killed.send(signal.SIGKILL)
    killed.end()
    resumed = train("--ckpt_path=last", **options)
    lines = [
        [line for line in result.out.splitlines() if line.startswith(("Step: ", "Final"))]
        for result in (whole, resumed)
    ]
    assert len(lines[1]) >= 4
    assert lines[1] == lines[0][-len(lines[1]) :]
    weights = [
        read_checkpoint(tmp_path / logs / "version_0" / "checkpoints" / "last.ckpt")["state_dict"]
        for logs in ("whole", "logs")
    ]
    assert same(*weights)
