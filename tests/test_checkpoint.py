"""Checkpoint files: enough by themselves, written whole or not at all, never run as code."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
import torch

from lit_gpt.checkpoint import (
    load_checkpoint,
    newest_checkpoint,
    read_checkpoint,
    save_atomically,
)
from lit_gpt.errors import UserError


@pytest.fixture
def checkpoint(train) -> Path:
    result = train(**{"model.style": "modern", "model.num_kv_heads": 1})
    return Path(result.cli.trainer.log_dir) / "checkpoints" / "last.ckpt"


def test_one_file_is_enough(checkpoint, train, text_file, tmp_path):
    """Model and tokenizer come back exactly, without the corpus, its cache or the configuration."""
    result = train("--ckpt_path=last", **{"model.style": "modern", "model.num_kv_heads": 1,
                                          "trainer.max_steps": 8})  # fmt: skip
    gpt, tokenizer = result.cli.model.gpt, result.cli.datamodule.tokenizer
    alone = tmp_path / "alone.ckpt"
    checkpoint.rename(alone)
    text_file.unlink()
    model, loaded = load_checkpoint(alone)
    assert loaded == tokenizer
    assert model.config == gpt.config
    assert not model.training
    weights = gpt.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())


def test_it_holds_only_plain_data(checkpoint):
    content = torch.load(checkpoint, weights_only=True)  # fails on anything else
    assert {"gpt", "tokenizer", "corpus", "state_dict", "optimizer_states"} <= set(content)
    assert content["global_step"] == 6
    assert content["gpt"]["style"] == "modern"
    assert set(content["tokenizer"]) == {"name", "pattern", "vocabulary"}
    assert content["hyper_parameters"]["learning_rate"] == 1e-3
    assert content["datamodule_hyper_parameters"]["batch_size"] == 2


def test_code_in_a_checkpoint_is_never_run(tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "sprung"),)

    path = tmp_path / "trap.ckpt"
    torch.save({"state_dict": Trap()}, path)
    with pytest.raises(UserError, match="can be loaded"):
        read_checkpoint(path)
    (tmp_path / "plain.ckpt").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(UserError, match="can be loaded"):
        read_checkpoint(tmp_path / "plain.ckpt")
    assert not (tmp_path / "sprung").exists()


def test_the_environment_cannot_switch_the_check_off(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    test_code_in_a_checkpoint_is_never_run(tmp_path)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_a_truncated_file_is_refused(checkpoint, tmp_path, share):
    whole = checkpoint.read_bytes()
    path = tmp_path / "cut.ckpt"
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(UserError, match=r"cut\.ckpt is no checkpoint that can be loaded"):
        read_checkpoint(path)


def test_parts_that_do_not_fit_together_are_refused(checkpoint, tmp_path):
    for change in (
        {"gpt": {"vocab_size": 5, "sorcery": 1}},
        {"gpt": {"vocab_size": 5}},
        {"tokenizer": {"name": "x", "pattern": "(", "vocabulary": ""}},
        {"state_dict": {}},
    ):
        path = tmp_path / "mixed.ckpt"
        torch.save(read_checkpoint(checkpoint) | change, path)
        with pytest.raises(UserError, match=r"mixed\.ckpt"):
            load_checkpoint(path)


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


def test_newest_checkpoint_is_the_one_written_last(tmp_path):
    for age, run in enumerate(["b", "c", "a"]):
        path = tmp_path / run / "checkpoints" / "best.ckpt"
        path.parent.mkdir(parents=True)
        path.touch()
        os.utime(path, (1000 + age, 1000 + age))
    assert newest_checkpoint(tmp_path, "best").parts[-3] == "a"
    assert newest_checkpoint(tmp_path, "last") is None
