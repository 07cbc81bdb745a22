"""Folders of a sharded checkpoint: whole or not at all, and nothing in them is run."""

from __future__ import annotations

import os
import pickle
import signal
from pathlib import Path

import pytest
import torch

from lit_gpt.__main__ import main
from lit_gpt.callbacks import checkpoints
from lit_gpt.distributed import sharded_files
from lit_gpt.errors import UserError
from tests.distributed.ranks import together

KEY = "weights/x"


def save(path: Path, number: float, dies: bool) -> int:
    import torch.distributed as dist

    dist.init_process_group("gloo")

    def write_rest(folder: Path) -> None:
        (folder / "rest.ckpt").write_text("")
        if dies:
            os.kill(os.getpid(), signal.SIGKILL)

    is_first = dist.get_rank() == 0
    sharded_files.save({KEY: torch.full((3,), number)}, write_rest, path, is_first)
    return 0


def number_in(path: Path) -> float:
    tensors = sharded_files.empty_tensors(path)
    sharded_files.load(tensors, path)
    assert tensors.keys() == {KEY}
    return tensors[KEY].tolist()[2]


def test_a_killed_save_leaves_the_folder_before_it(tmp_path):
    path = tmp_path / "last.ckpt"
    path.write_text("an ordinary one")
    assert together(save, 2, tmp_path / "1", path, 1.0, False) == [0, 0]
    assert together(save, 2, tmp_path / "2", path, 2.0, True)[0] == -signal.SIGKILL
    assert number_in(path) == 1.0
    assert together(save, 2, tmp_path / "3", path, 3.0, False) == [0, 0]
    assert number_in(path) == 3.0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "2", "3", "last.ckpt"]
    run = tmp_path / "version_0" / "checkpoints"
    run.mkdir(parents=True)
    path.rename(sharded_files.replaced(run / "last.ckpt"))  # killed between the two renames
    sharded_files.restore_all(tmp_path)
    assert number_in(run / "last.ckpt") == 3.0


def fill(path: Path) -> int:
    import torch.distributed as dist

    dist.init_process_group("gloo")
    try:
        sharded_files.save({KEY: torch.zeros(10**6)}, print, path, dist.get_rank() == 0)
    except UserError as error:
        print(error)
        return 2
    return 0


def test_a_full_disk_is_one_line_in_all_processes(tmp_path, small_disk):
    path = small_disk(100) / "last.ckpt"
    assert together(fill, 2, tmp_path / "out", path) == [2, 2]
    out = (tmp_path / "out" / "out0.txt").read_text()
    assert f"cannot write the checkpoint {path} (" in out
    assert "earlier checkpoints are unharmed" in out
    assert not path.exists()


class Bomb:
    def __reduce__(self):
        return (os.system, ("touch bomb",))


@pytest.mark.parametrize("damage", ["bomb", "size", "cut", "gone"])
def test_a_damaged_or_hostile_folder_is_one_line(damage, tmp_path, monkeypatch, trained, capsys):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "x.ckpt"
    assert together(save, 2, tmp_path / "1", path, 1.0, False) == [0, 0]
    (path / "rest.ckpt").write_bytes((trained / "checkpoints" / "last.ckpt").read_bytes())
    metadata = path / ".metadata"
    content = pickle.loads(metadata.read_bytes())
    if damage == "bomb":
        content.planner_data = Bomb()
    elif damage == "size":
        content.state_dict_metadata[KEY].size = torch.Size([1 << 40])
    metadata.write_bytes(pickle.dumps(content))
    if damage == "cut":
        part = next(path.glob("*.distcp"))
        part.write_bytes(part.read_bytes()[:-100])
    elif damage == "gone":
        metadata.unlink()
    assert main(["consolidate", str(path)]) == 2
    error = capsys.readouterr().err
    assert f"error: {path} can't be read" in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "bomb").exists()


def test_the_room_for_folders_counts_the_files_in_them(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "file_bytes", lambda *_: 10_000)
    monkeypatch.setattr(checkpoints, "base_bytes", lambda _: 0)
    monkeypatch.setattr(checkpoints, "free_bytes", lambda _: 0)
    (tmp_path / "last.ckpt").mkdir()
    part = tmp_path / "last.ckpt" / "__0_0.distcp"
    part.write_bytes(bytes(10_000))
    with pytest.raises(UserError, match="has 0 MB free"):
        checkpoints.check_space(tmp_path, None, None, 2)
    part.write_bytes(bytes(30_000))
    checkpoints.check_space(tmp_path, None, None, 2)
