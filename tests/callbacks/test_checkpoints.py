"""Which checkpoints are kept, a disk that is full, and the room that a run will need."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from lit_gpt.callbacks.checkpoints import checkpoint_bytes, save_atomically
from lit_gpt.checkpoint import read_checkpoint
from lit_gpt.errors import UserError
from lit_gpt.storage import UNFINISHED
from tests.conftest import ROOT, SMALL


def checkpoints_of(result) -> Path:
    return Path(result.run.trainer.log_dir) / "checkpoints"


@pytest.mark.parametrize(
    ("keep", "names"),
    [
        (2, {"step_4.ckpt", "step_6.ckpt"}),
        (-1, {"step_2.ckpt", "step_4.ckpt", "step_6.ckpt"}),
    ],
)
def test_every_n_steps_the_newest_are_kept(train, keep, names):
    options = {"checkpoints.every_n_steps": 2, "checkpoints.keep": keep}
    options |= {"trainer.val_check_interval": 3, "trainer.accumulate_grad_batches": 2}
    folder = checkpoints_of(train(**options))
    assert {path.name for path in folder.iterdir()} == names | {"best.ckpt", "last.ckpt"}
    for name in names:
        step = int(name.removeprefix("step_").removesuffix(".ckpt"))
        assert read_checkpoint(folder / name)["global_step"] == step


def test_without_the_option_there_are_none(train):
    names = {path.name for path in checkpoints_of(train()).iterdir()}
    assert names == {"best.ckpt", "last.ckpt"}


def test_a_continued_run_keeps_as_many(train):
    options = {"checkpoints.every_n_steps": 1, "checkpoints.keep": 2}
    folder = checkpoints_of(train(**options, **{"trainer.max_steps": 3}))
    train("--ckpt_path=last", **options)
    names = {path.name for path in folder.iterdir()}
    assert names == {"step_5.ckpt", "step_6.ckpt", "best.ckpt", "last.ckpt"}


def test_a_run_goes_on_from_any_step(train):
    whole = train(**{"checkpoints.every_n_steps": 3, "trainer.max_steps": 8})
    second = train(ckpt_path=checkpoints_of(whole) / "step_3.ckpt", **{"trainer.max_steps": 8})
    assert second.steps == whole.steps[2:]
    weights = [read_checkpoint(checkpoints_of(r) / "last.ckpt")["state_dict"] for r in
               (whole, second)]  # fmt: skip
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_size_of_a_checkpoint_is_known_beforehand(train, optimizer):
    options = {"model.optimizer": optimizer, "model.d_model": 128, "trainer.max_steps": 1}
    result = train(**options)
    size = (checkpoints_of(result) / "last.ckpt").stat().st_size
    assert checkpoint_bytes(result.run.model) == pytest.approx(size, rel=0.05)


def test_a_run_that_the_disk_has_no_room_for_is_refused(train, small_disk):
    disk = small_disk(900)
    place = {"trainer.default_root_dir": disk / "logs"}
    fits = train(**place)
    assert fits.status == 0, fits.err
    result = train(**place, **{"checkpoints.every_n_steps": 1, "checkpoints.keep": 5})
    assert (result.status, len(result.err.splitlines())) == (2, 1), result.err
    assert "this run's 7 checkpoints of 0 MB each need 2 MB; make room" in result.err
    assert list((disk / "logs" / "version_1").rglob("*.ckpt")) == []


def test_a_full_disk_ends_the_run_in_one_line_and_earlier_checkpoints_load(
    text_file, tmp_path, small_disk
):
    """Filled by something else, after the room was checked."""
    disk = small_disk(1200)
    options = SMALL | {"data.path": text_file, "data.cache": tmp_path / "cache"}
    options |= {"trainer.default_root_dir": disk, "trainer.max_steps": 100_000}
    words = [sys.executable, "-u", str(ROOT / "scripts" / "train.py")]
    words += [f"--{name}={value}" for name, value in options.items()]
    process = subprocess.Popen(words, stdout=-1, stderr=-1, text=True)
    for line in process.stdout:
        if line.startswith("Step: 4,"):
            fill(disk / "something else")
            break
    _, err = process.communicate()
    assert (process.returncode, len(err.splitlines())) == (2, 1), err
    assert err.startswith("error: ")
    assert re.search("make room|free some", err)
    folder = disk / "version_0" / "checkpoints"
    step = read_checkpoint(folder / "last.ckpt")["global_step"]
    assert step >= 2
    read_checkpoint(folder / "best.ckpt")
    assert {path.name for path in folder.iterdir()} == {"best.ckpt", "last.ckpt"}
    (disk / "something else").unlink()
    more = [*words, "--ckpt_path=last", f"--trainer.max_steps={step + 2}"]
    again = subprocess.run(more, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr


def fill(path: Path) -> None:
    with path.open("wb", 0) as file, suppress(OSError):
        while True:
            file.write(bytes(1024))


@pytest.mark.parametrize("spare", [0, 1, 100, 5_000, 60_000])
def test_a_file_that_does_not_fit_leaves_the_earlier_one(small_disk, spare):
    disk = small_disk(256)
    save_atomically({"weights": torch.zeros(10_000)}, disk / "last.ckpt")
    free = 256 * 1024 - sum(-(-p.stat().st_size // 4096) * 4096 for p in disk.iterdir())
    (disk / "something else").write_bytes(bytes(free - spare))
    with pytest.raises(UserError, match=r"cannot write the checkpoint .*: earlier checkpoints are"):
        save_atomically({"weights": torch.ones(20_000)}, disk / "last.ckpt")
    assert {p.name for p in disk.iterdir()} == {"last.ckpt", "something else"}
    loaded = read_checkpoint(disk / "last.ckpt", {})
    assert torch.equal(loaded["weights"], torch.zeros(10_000))


def test_what_a_killed_process_left_half_written_is_cleared(train):
    folder = checkpoints_of(train())
    left = [folder / f".{name}.ckpt{UNFINISHED}" for name in ("last", "best")]
    for path in left:
        path.write_bytes(b"half")
    assert train("--ckpt_path=last", **{"trainer.max_steps": 7}).status == 0
    assert not any(path.exists() for path in left)


def test_a_failed_write_leaves_the_earlier_file(tmp_path, monkeypatch):
    path = tmp_path / "last.ckpt"
    save_atomically({"step": 1}, path)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"No space left on device.*earlier checkpoints are"):
        save_atomically({"step": 2}, path)
    assert torch.load(path, weights_only=True) == {"step": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]


@pytest.mark.parametrize(("before", "steps"), [(5, 3), (3, 4)])
def test_a_continued_run_may_keep_fewer(train, before, steps):
    """Those that were kept before stay, and only the newest two are counted."""
    options = {"checkpoints.every_n_steps": 1, "trainer.max_steps": steps}
    folder = checkpoints_of(train(**options | {"checkpoints.keep": before}))
    result = train("--ckpt_path=last", **options | {"checkpoints.keep": 2, "trainer.max_steps": 6})
    assert result.status == 0, result.err
    names = {path.name for path in folder.glob("step_*")}
    assert {"step_5.ckpt", "step_6.ckpt"} <= names
    assert f"step_{steps}.ckpt" not in names
    assert len(names) <= before
