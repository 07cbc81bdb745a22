"""--trainer.strategy=fsdp2: two processes with a share of the weights each give one's numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lit_gpt.__main__ import main
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
MUON |= {"model.spelling_rows": 50, "model.output_spelling_rows": 40, "model.softmax_cutoff": 0.5}


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
    curves["final"] = {9: history.final.loss, 10: history.final.num_tokens}
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


def test_sharded_checkpoints_resume_and_become_one_file(options, text, tmp_path, sharded, capsys):
    shards = options | SHARDED | {"checkpoints.sharded": True}
    run = train_on(2, tmp_path / "logs", text, **shards | {"checkpoints.keep": 1})
    assert curves_of(run) == curves_of(sharded)
    kept = sorted(path.name for path in run.checkpoints.iterdir())
    assert kept == ["best.ckpt", "last.ckpt", "step_6.ckpt"]
    (line,) = [line for line in run.out[0].splitlines() if line.startswith("Make one file:")]
    assert line.endswith(f"{run.checkpoints}/best.ckpt")
    assert f"{run.checkpoints}/best-whole.ckpt" in run.out[0]
    first = train_on(2, tmp_path / "first", text, **shards | {"trainer.max_steps": 3})
    folder = first.checkpoints / "step_3.ckpt"
    again = train_on(2, tmp_path / "logs", text, **shards, ckpt_path=folder)
    if "model.schedule" not in options:  # else it was planned for three steps
        assert curves_of(again, 4) == curves_of(sharded, 4)
    assert set(again.statuses) == {0}, again.out

    part = next(folder.glob("*.distcp"))
    content = part.read_bytes()
    part.write_bytes(content[:-100])
    damaged = train_on(2, tmp_path / "damaged", text, **shards, ckpt_path=folder)
    assert set(damaged.statuses) == {2}
    assert f"error: {folder} can't be continued" in damaged.out[0]
    assert "Traceback" not in "".join(damaged.out)
    part.write_bytes(content)

    assert main(["consolidate", str(run.checkpoints / "step_6.ckpt")]) == 0
    whole = run.checkpoints / "step_6-whole.ckpt"
    assert f"Wrote {whole}\n" in capsys.readouterr().out
    found, expected = Checkpoint.read(whole), Checkpoint.read(sharded.checkpoints / "step_6.ckpt")
    for ours, theirs in (
        (found.weights, expected.weights),
        (found.optimizer_state["state"], expected.optimizer_state["state"]),
    ):
        torch.testing.assert_close(dict(ours), dict(theirs), rtol=0, atol=0)
    assert found.optimizer_state["param_groups"] == expected.optimizer_state["param_groups"]
    load_checkpoint(whole)

    for words, problem in {
        (
            "generate",
            "--ckpt_path",
            str(folder),
        ): f"is a sharded checkpoint; make one file of it: lit-gpt consolidate {folder}",
        ("consolidate", str(whole)): "is not a sharded checkpoint",
        ("train", f"--data.path={text}", f"--ckpt_path={folder}"): "which only fsdp2 continues",
    }.items():
        assert main([*words]) == 2
        error = capsys.readouterr().err
        assert problem in error
        assert len(error.splitlines()) == 1


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
def test_three_processes_begin_from_a_checkpoint(options, text, tmp_path, whole):
    start = {"model.init_from": whole.checkpoints / "last.ckpt", "trainer.max_steps": 2}
    three = train_on(3, tmp_path / "3", text, **options | SHARDED | start)
    one = train_on(1, tmp_path / "1", text, **options | {"data.batch_size": 12} | start)
    assert_close(three, one, 1e-4 if options is MUON else 1e-5)


@pytest.mark.slow
def test_a_sharded_run_from_a_checkpoint_resumes(options, text, tmp_path, whole):
    start = options | SHARDED | {"model.init_from": whole.checkpoints / "last.ckpt"}
    run = train_on(2, tmp_path / "logs", text, **start, **{"checkpoints.sharded": True})
    more = {"ckpt_path": "last", "trainer.max_steps": 8, "checkpoints.sharded": True}
    again = train_on(2, tmp_path / "logs", text, **start | more)
    assert set(run.statuses) == {0}, run.out
    assert set(again.statuses) == {0}, again.out
    assert "Step: 8, " in again.out[0]


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


def test_only_fsdp2_has_shards_to_save(train):
    result = train(**{"checkpoints.sharded": True})
    assert result.err == "error: --checkpoints.sharded: only fsdp2 has shards; use " + (
        "--trainer.strategy fsdp2\n"
    )
