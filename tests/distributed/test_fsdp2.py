"""--trainer.strategy=fsdp2: two processes with a share of the weights each give one's numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lit_gpt.checkpoint import Checkpoint, load_checkpoint
from lit_gpt.reports.history import read_history
from tests.conftest import write_text
from tests.distributed.ranks import Ranks, train_on

SHARDED = {"trainer.strategy": "fsdp2", "data.batch_size": 4}
WHOLE = {"data.batch_size": 8}
# With odd sizes, so that shards differ; an odd number of batches in each evaluation.
MODERN = {"model.style": "modern", "model.d_model": 18, "model.num_heads": 1, "model.num_blocks": 3}
ADAMW = {"trainer.accumulate_grad_batches": 2, "trainer.gradient_clip_val": 0.5}
ADAMW |= {"trainer.limit_val_batches": 3, "checkpoints.every_n_steps": 3}
MUON = MODERN | {"model.optimizer": "muon", "model.schedule": "cosine", "model.table_rate": 2.0}
MUON |= {"checkpoints.every_n_steps": 3, "model.activation_checkpointing": True}


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="module", params=[ADAMW, MUON], ids=["adamw", "muon"])
def options(request) -> dict[str, Any]:
    return request.param


@pytest.fixture(scope="module")
def whole(options, text, tmp_path_factory) -> Ranks:
    return train_on(1, tmp_path_factory.mktemp("whole"), text, **options | WHOLE)


@pytest.fixture(scope="module")
def sharded(options, text, tmp_path_factory) -> Ranks:
    return train_on(2, tmp_path_factory.mktemp("sharded"), text, **options | SHARDED)


def curves_of(run: Ranks, first: int = 0) -> dict[str, dict[int, float]]:
    assert set(run.statuses) == {0}, run.out
    history = read_history(run.folder)
    names = ("train/loss", "val/loss", "train/eval_loss", "gradient_norm")
    curves = {name: dict(history.curves[name]) for name in names}
    curves["final"] = {6: history.final.loss, 0: history.final.num_tokens}
    return {name: {s: v for s, v in curve.items() if s >= first} for name, curve in curves.items()}


def assert_close(found: Ranks, expected: Ranks, within: float, first: int = 0) -> None:
    theirs = curves_of(expected, first)
    for name, curve in curves_of(found, first).items():
        assert curve == pytest.approx(theirs[name], abs=2 * within, rel=within), name


def test_two_processes_give_the_losses_of_one(options, sharded, whole):
    assert_close(sharded, whole, 1e-4 if options is MUON else 1e-5)
    assert sharded.out[1] == ""
    for line in ("Sample: ", "Final validation loss: ", "Best checkpoint: "):
        assert line in sharded.out[0]
    samples = [[s for s in run.out[0].splitlines() if "Sample" in s] for run in (sharded, whole)]
    assert samples[0] == samples[1]


def test_one_file_holds_what_that_of_one_device_does(sharded, whole):
    ours, theirs = (Checkpoint.read(run.checkpoints / "last.ckpt") for run in (sharded, whole))
    assert ours.contents.keys() == theirs.contents.keys()
    assert list(ours.weights) == list(theirs.weights)
    assert ours.optimizer_state["param_groups"] == theirs.optimizer_state["param_groups"]
    moments, others = ours.optimizer_state["state"], theirs.optimizer_state["state"]
    assert moments.keys() == others.keys()
    for name, values in moments.items():
        for kind, value in values.items():
            torch.testing.assert_close(value, others[name][kind], atol=1e-5, rtol=1e-3)
    model, _ = load_checkpoint(sharded.checkpoints / "best.ckpt")
    tied = model.config.tie_embeddings
    tables = {ours.weights[f"{name}.weight"].data_ptr() for name in ("embedding", "head")}
    assert len(tables) == 2 - tied  # once in the file


def test_it_resumes_exactly_and_goes_back_and_forth(options, text, tmp_path, sharded, whole):
    def resumed(size: int, run: Ranks, more: dict[str, Any]) -> Ranks:
        path = run.checkpoints / "step_3.ckpt"
        return train_on(size, tmp_path / "logs", text, **options | more, ckpt_path=path)

    again = resumed(2, sharded, SHARDED)
    assert curves_of(again, 4) == curves_of(sharded, 4)  # bit for bit
    within = 1e-4 if options is MUON else 1e-5
    assert_close(resumed(1, sharded, WHOLE), whole, within, 4)
    assert_close(resumed(2, whole, SHARDED), whole, within, 4)
    ddp = {"trainer.strategy": "ddp", "data.batch_size": 4}
    assert_close(resumed(2, sharded, ddp), whole, within, 4)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_in_half_precision(precision, text, tmp_path):
    options = MODERN | {"trainer.precision": precision, "trainer.gradient_clip_val": 0.5}
    runs = [
        train_on(size, tmp_path / str(size), text, **options | more)
        for size, more in ((2, SHARDED), (1, WHOLE))
    ]
    assert_close(*runs, 1e-3)


@pytest.mark.slow
def test_three_processes_begin_from_a_checkpoint(text, tmp_path, whole):
    start = {"model.init_from": whole.checkpoints / "last.ckpt", "trainer.max_steps": 2}
    three = train_on(3, tmp_path / "3", text, **SHARDED | start)
    one = train_on(1, tmp_path / "1", text, **{"data.batch_size": 12} | start)
    assert_close(three, one, 1e-5)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("--trainer.precision=16-mixed", "can't be used with fsdp2; use bf16-mixed"),
        ("--trainer.precision=64-true", "can't be used with fsdp2; use bf16-mixed"),
        ("--find_lr", "--find_lr: can't be used with fsdp2"),
        ("--trainer.callbacks=EMAWeightAveraging", "averages whole weights"),
        ("--trainer.strategy=fsdp", "fsdp2 the one for models that one can't hold"),
        ("--trainer.strategy=FSDPStrategy", "fsdp2 the one for models that one can't hold"),
        (
            "--trainer.strategy=ModelParallelStrategy",
            "fsdp2 the one for models that one can't hold",
        ),
    ],
)
def test_what_cannot_be_sharded_is_one_line(train, word, message):
    result = train(word, **{"trainer.strategy": "fsdp2"})
    assert result.status == 2
    assert message in result.err
    assert len(result.err.splitlines()) == 1


def test_one_process_can_use_it_too(train):
    plain = train(**{"model.dropout": 0.0})
    alone = train(**{"model.dropout": 0.0, "trainer.strategy": "fsdp2"})
    assert alone.status == 0, alone.err
    assert alone.steps == plain.steps
