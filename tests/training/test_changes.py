"""What a resumed run says of options that differ from those of the run it continues."""

from __future__ import annotations

import re

import pytest
import torch

from lit_gpt.checkpoint import read_checkpoint
from lit_gpt.training.changes import config_of
from tests.conftest import ALIASES, Result

LAST = {"ckpt_path": "last", "trainer.max_steps": 8}


def changes(result: Result) -> list[str]:
    assert result.status == 0, result.err
    lines = [x for x in result.out.splitlines() if x.startswith("Resumed with different options")]
    assert len(lines) <= 1
    return re.split(r", (?=[a-z_.]+ [^,]* -> )", lines[0].partition(": ")[2]) if lines else []


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"seed_everything": 3}, "seed_everything 1337 -> 3"),
        ({"trainer.limit_val_batches": 3}, "limit_val_batches 2 -> 3"),
        ({"trainer.limit_train_batches": 7}, "limit_train_batches None -> 7"),
        ({"trainer.overfit_batches": 1}, "overfit_batches 0.0 -> 1"),
        ({"trainer.val_check_interval": 4}, "val_check_interval 2 -> 4"),
        ({"trainer.accumulate_grad_batches": 2}, "accumulate_grad_batches 1 -> 2"),
        ({"trainer.gradient_clip_val": 0.5}, "gradient_clip_val None -> 0.5"),
        ({"trainer.precision": "bf16-mixed"}, "precision 32-true -> bf16-mixed"),
        ({"trainer.deterministic": True}, "deterministic None -> True"),
        ({"trainer.callbacks": '[{"class_path": "LearningRateMonitor"}]'},
         "callbacks None -> [LearningRateMonitor]"),
        ({"model.dropout": 0.2}, "dropout 0.1 -> 0.2"),
        ({"model.skip_bad_steps": 1}, "skip_bad_steps 0 -> 1"),
        ({"data.batch_size": 3}, "batch_size 2 -> 3"),
        ({"data.order": "shuffled"}, "order random -> shuffled"),
    ],
    ids=str,
)  # fmt: skip
def test_each_change_is_said_once(train, options, expected):
    train()
    assert changes(train(**LAST | options)) == [expected]


def test_what_changes_no_result_is_not_said(train, tmp_path):
    train()
    options = LAST | {
        "data.cache": tmp_path / "other",
        "samples.num_tokens": 3,
        "overfit.patience": 1,
        "early_stopping.patience": 50,
        "checkpoints.every_n_steps": 4,
        "trainer.logger": "CSVLogger",
        "trainer.logger.save_dir": tmp_path / "csv",
        "trainer.log_every_n_steps": 2,
        "trainer.enable_progress_bar": False,
        "trainer.precision": "32",
        "trainer.devices": "1",
        "model.style": "classic",
        "model.head_size": 8,
    }
    assert changes(train(**options)) == []


def test_the_algorithm_of_clipping(train):
    clip = {"trainer.gradient_clip_val": 1.0}
    train(**clip)
    options = LAST | clip | {"trainer.gradient_clip_algorithm": "value"}
    assert changes(train(**options)) == ["gradient_clip_algorithm None -> value"]


@pytest.mark.parametrize("is_config_kept", [True, False])
def test_a_checkpoint_of_an_earlier_release(train, is_config_kept):
    """Its options are in config.yaml; without it, in part, in the checkpoint."""
    folder = train().run.folder
    path = folder / "checkpoints" / "last.ckpt"
    contents = dict(read_checkpoint(path))
    del contents["options"]
    for name in ("max_steps", "world_size"):
        del contents["trainer"][name]
    torch.save(contents, path)
    if not is_config_kept:
        (folder / "config.yaml").unlink()
    options = {"seed_everything": 3, "trainer.limit_val_batches": 3, "model.dropout": 0.2}
    expected = {"seed_everything 1337 -> 3", "limit_val_batches 2 -> 3", "dropout 0.1 -> 0.2"}
    if not is_config_kept:
        expected.remove("limit_val_batches 2 -> 3")
    assert set(changes(train(**LAST | options))) == expected


@pytest.mark.parametrize(
    ("schedule", "rate"), [("linear", 0.001 * (1 - 6 / 12)), ("cosine", 0.001 * 0.5)]
)
def test_a_schedule_that_ends_later(train, schedule, rate):
    """At half its length, either schedule is at half its rate; at its end it was at 0."""
    first = train(**{"model.schedule": schedule})
    jump = f"the learning rate jumps from 0 to {rate:.3g} at step 6"
    lines = first.out.splitlines()
    command = next(x for x in lines if x.startswith("Continue:"))
    assert command.endswith(" --trainer.max_steps=12")
    assert f"(its {schedule} schedule would end later: {jump})" in lines
    result = train(ckpt_path="last", **{"model.schedule": schedule, "trainer.max_steps": 12})
    assert changes(result) == [f"max_steps 6 -> 12, so {jump}"]
    assert not any("schedule would end later" in line for line in train().out.splitlines())


OTHER = "Resumed on another number of devices "
BATCH = "Resumed with different options, so results may differ: batch_size x devices "


@pytest.mark.parametrize(
    ("saved", "options", "expected"),
    [
        # Two devices x 2 windows, then one device.
        ((2, 2), {}, [f"{BATCH}2 x 2 -> 2 x 1"]),
        ((2, 2), {"data.batch_size": 4}, []),  # the same run
        (
            *((2, 2), {"data.batch_size": 4, "model.dropout": 0.1}),
            [f"{OTHER}(2 -> 1): the same windows come next, but dropout masks differ from here on"],
        ),
        ((1, 2), {}, []),
        ((1, 3), {}, ["Resumed with different options, so results may differ: batch_size 3 -> 2"]),
    ],
    ids=str,
)
@pytest.mark.parametrize("order", ["random", "shuffled"])
def test_another_number_of_devices(train, order, saved, options, expected):
    """Only what differs is said: the windows of all devices together, and dropout."""
    same = {"data.order": order, "model.dropout": 0} | options
    path = train(**same | {"data.batch_size": 2}).run.folder / "checkpoints" / "last.ckpt"
    contents = dict(read_checkpoint(path))
    assert contents["trainer"]["world_size"] == 1
    world_size, batch_size = saved
    contents["trainer"]["world_size"] = world_size
    contents["datamodule_hyper_parameters"]["batch_size"] = batch_size
    contents["options"]["data"]["batch_size"] = batch_size
    torch.save(contents, path)
    result = train(**LAST | same)
    assert result.status == 0, result.err
    assert [x for x in result.out.splitlines() if x.startswith("Resumed")] == expected


def test_a_random_run_of_0_1_0_on_another_number_of_devices(train):
    """Its windows are drawn by rank, as they were."""
    path = train(**{"model.dropout": 0}).run.folder / "checkpoints" / "last.ckpt"
    contents = dict(read_checkpoint(path))
    del contents["TextDataModule"]
    contents["trainer"]["world_size"] = 2
    torch.save(contents, path)
    result = train(**LAST, **{"model.dropout": 0, "data.batch_size": 4})
    assert result.status == 0, result.err
    assert f"{OTHER}(2 -> 1): other windows are drawn from here on" in result.out.splitlines()
    assert "TextDataModule" not in read_checkpoint(path)


@pytest.mark.parametrize(("world_size", "batch_size"), [(2, 2), (1, 3), (1, 2)])
def test_a_shuffled_run_of_0_1_0_continues_at_its_next_window(train, world_size, batch_size):
    """After six steps of its own batches, whatever they are now."""
    path = train(**{"data.order": "shuffled"}).run.folder / "checkpoints" / "last.ckpt"
    contents = dict(read_checkpoint(path))
    del contents["TextDataModule"]
    contents["trainer"]["world_size"] = world_size
    contents["datamodule_hyper_parameters"]["batch_size"] = batch_size
    torch.save(contents, path)
    result = train(**LAST, **{"data.order": "shuffled"})
    assert result.status == 0, result.err
    seen = 6 * world_size * batch_size + 2 * 2
    assert read_checkpoint(path)["TextDataModule"] == {"windows_seen": seen}


def test_a_strangers_config_that_repeats_itself_without_end_is_left_out(tmp_path):
    (tmp_path / "config.yaml").write_text(f"{ALIASES}model: *x8", encoding="utf-8")
    assert config_of(tmp_path / "checkpoints" / "best.ckpt") == {}
