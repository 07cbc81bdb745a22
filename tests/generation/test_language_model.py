"""Which checkpoint is the newest one below a folder."""

from __future__ import annotations

import os

import pytest

from lit_gpt.errors import UserError
from lit_gpt.generation.language_model import find_newest, newest_checkpoint


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
