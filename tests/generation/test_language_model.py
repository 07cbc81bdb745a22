"""Which checkpoint is the newest one below a folder."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from lit_gpt.errors import UserError
from lit_gpt.generation.language_model import find_newest, named_checkpoint, newest_checkpoint


def test_newest_checkpoint_is_the_one_written_last(tmp_path, capsys):
    with pytest.raises(UserError, match="no checkpoint below"):
        find_newest(str(tmp_path))
    for age, run in enumerate(["b", "c", "a"]):
        path = tmp_path / run / "checkpoints" / "best.ckpt"
        path.parent.mkdir(parents=True)
        path.touch()
        os.utime(path, (1000 + age, 1000 + age))
    assert newest_checkpoint(tmp_path, "best").parts[-3] == "a"
    assert newest_checkpoint(tmp_path, "last") is None
    assert find_newest(str(tmp_path)) == tmp_path / "a" / "checkpoints" / "best.ckpt"
    assert capsys.readouterr().err.startswith("Using ")


@pytest.fixture
def logs(tmp_path):
    """Two runs; the older has a last and a best checkpoint, the newer only a last one."""
    for age, name in ((9, "version_0/checkpoints/last"), (8, "version_0/checkpoints/best"),
                      (1, "version_1/checkpoints/last")):  # fmt: skip
        path = tmp_path / "logs" / f"{name}.ckpt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
        os.utime(path, (time.time() - age, time.time() - age))
    return tmp_path / "logs"


@pytest.mark.parametrize(
    ("given", "found", "of_training"),
    [
        ("last", "version_1/checkpoints/last.ckpt", "version_1/checkpoints/last.ckpt"),
        ("best", "version_0/checkpoints/best.ckpt", "version_0/checkpoints/best.ckpt"),
        ("logs", "version_0/checkpoints/best.ckpt", "version_1/checkpoints/last.ckpt"),
        ("logs/version_0", "version_0/checkpoints/best.ckpt", "version_0/checkpoints/last.ckpt"),
        ("logs/version_1", "version_1/checkpoints/last.ckpt", "version_1/checkpoints/last.ckpt"),
    ],
)
def test_what_a_checkpoint_may_be_called(logs, monkeypatch, given, found, of_training):
    monkeypatch.chdir(logs.parent)
    assert named_checkpoint(given, "logs") == Path("logs", found)
    assert named_checkpoint(given, "logs", ("last",)) == Path("logs", of_training)
    assert named_checkpoint("logs/other.ckpt", "nowhere") == Path("logs/other.ckpt")


def test_there_is_no_such_checkpoint(logs, tmp_path):
    (tmp_path / "empty").mkdir()
    for name, root in (("last", tmp_path / "empty"), (str(tmp_path / "empty"), logs)):
        with pytest.raises(UserError, match=r"no run below .*empty' has a .*last\.ckpt"):
            named_checkpoint(name, str(root))


@pytest.mark.parametrize("command", ["generate", "export", "serve", "evaluate"])
def test_every_command_takes_last(command, logs, capsys):
    """Each finds the newest run's; that it is no checkpoint is the next thing it says."""
    from lit_gpt.__main__ import main

    argv = {"export": [f"--out={logs / 'out'}"], "evaluate": ["--data.path=x.txt"]}.get(command, [])
    assert main([command, "--ckpt_path=last", f"--logs={logs}", *argv]) == 2
    err = capsys.readouterr().err
    path = logs / "version_1" / "checkpoints" / "last.ckpt"
    assert f"error: {path} is not a checkpoint that can be loaded" in err.replace("'", "")
