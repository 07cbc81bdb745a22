"""Runs on a token store in a folder: the training command, and what else meets one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lit_gpt.__main__ import main
from lit_gpt.checkpoint import Checkpoint
from tests.conftest import SMALL, command_line

STEPS = {"data.order": "shuffled", "trainer.max_steps": 8, "trainer.val_check_interval": 4}


def test_a_run_on_a_store_is_one_on_its_tokens(store, texts, ids, train):
    """The same windows in evaluation; the data card says what it has, and what it leaves out."""
    result = train(**{"data.path": store} | STEPS)
    assert (result.status, result.err) == (0, "")
    assert f"Token store: {store}, not checked for shared lines" in result.out
    size = sum(len(path.read_text(encoding="utf-8")) for path in texts.iterdir())
    assert f"Text length: {size:,} characters\n" in result.out
    assert "End-of-text tokens between files: 4\n" in result.out
    assert f"Total: {len(ids):,} tokens\n" in result.out
    assert "Vocabulary: 257 tokens (bytes)\n" in result.out
    assert "Validation lines" not in result.out
    assert "For comparison" not in result.out
    assert "Copied" not in result.out
    same = train(
        **{"data.path": texts, "data.tokenizer": "bytes", "data.compact_vocab": "false"} | STEPS
    )
    assert same.steps[0] == result.steps[0]  # before training has seen another order
    assert "over all" in result.out
    last = Path(result.run.last.dirpath) / "last.ckpt"
    info = Checkpoint.read(last).corpus_info
    assert info["fingerprint"] == result.run.data.corpus.info.fingerprint
    assert main(["generate", f"--ckpt_path={last}", "--max_new_tokens=4"]) == 0


def test_a_resumed_run_reads_the_windows_that_come_next(store, train, tmp_path):
    options = {"data.path": store} | STEPS
    whole = train(**options)
    root = {"trainer.default_root_dir": tmp_path / "other"}
    train(**options | root | {"trainer.max_steps": 4})
    resumed = train("--ckpt_path=last", **options | root)
    assert resumed.status == 0
    assert resumed.steps[-1] == whole.steps[-1]


def test_another_order_is_random(store, train):
    result = train(**{"data.path": store} | STEPS | {"data.order": "random"})
    shuffled = train(**{"data.path": store} | STEPS)
    assert result.status == 0
    assert result.steps[0] == shuffled.steps[0]
    assert result.steps[-1] != shuffled.steps[-1]


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"data.tokenizer": "chars"}, "--data.tokenizer 'chars': {store} was encoded by bytes;"),
        ({"data.exclude": "*.log"}, "--data.exclude '*.log': does not apply to a token store"),
        ({"data.encoding": "gbk"}, "--data.encoding 'gbk': does not apply to a token store"),
        ({"data.text_field": "text"}, "--data.text_field 'text': does not apply to a token store"),
        ({"data.context_length": 50_000}, "too short: its training split has"),
        ({"budget": "1m"}, "--data.path '{store}': is a token store, and --budget chooses for a"),
        ({"budget": "1m", "data.tokenizer": "bytes"}, "is a token store, and --budget chooses"),
    ],
)
def test_what_a_store_is_not_used_with(options, error, store, train):
    result = train(**{"data.path": store, "trainer.max_steps": 2} | options)
    assert result.status == 2
    (line,) = result.err.splitlines()
    assert error.format(store=store) in line


def test_another_store_is_another_text(store, texts, train, prepare, tmp_path):
    options = {"data.path": store} | STEPS
    train(**options | {"trainer.max_steps": 4})
    prepare(texts / "0.txt", tmp_path / "s")
    result = train("--ckpt_path=last", **options | {"data.path": tmp_path / "s"})
    assert result.status == 2
    assert "is not the one it was trained on" in result.err


def test_a_moved_store_is_the_same_text(texts, train, prepare, tmp_path):
    prepare(texts, tmp_path / "s")
    options = {"data.path": tmp_path / "s"} | STEPS
    train(**options | {"trainer.max_steps": 4})
    (tmp_path / "s").rename(tmp_path / "moved")
    result = train("--ckpt_path=last", **options | {"data.path": tmp_path / "moved"})
    assert (result.status, result.err) == (0, "")


def test_another_text_validates(store, text_file, train):
    """All of the store trains."""
    result = train(**{"data.path": store, "data.val_path": text_file} | STEPS)
    assert result.status == 0
    num_bytes = len(text_file.read_bytes())
    total = sum(len(p) for p in [np.asarray(result.run.data.train_tokens)])
    assert f"Training: {total:,} tokens, validation: {num_bytes:,}" in result.out
    same = train(**{"data.path": store, "data.val_path": store} | STEPS)
    assert f"Training: {total:,} tokens, validation: {total:,}" in same.out


def test_a_run_from_a_models_weights_needs_its_tokenizer(store, texts, train, prepare, tmp_path):
    first = train(**{"data.path": store} | STEPS)
    last = Path(first.run.last.dirpath) / "last.ckpt"
    again = train(**{"data.path": store, "model.init_from": last} | STEPS)
    assert (again.status, again.err) == (0, "")
    prepare(texts, tmp_path / "s", "--data.tokenizer=chars")
    other = train(**{"data.path": tmp_path / "s", "model.init_from": last} | STEPS)
    assert other.status == 2
    assert "was encoded by another tokenizer (chars) than the model's" in other.err


def test_a_store_is_planned(store, places, capfd):
    options = places | SMALL | {"data.path": store}
    assert main(["plan", *command_line(options)]) == 0
    out = capfd.readouterr().out
    assert "Token store: " in out
    assert "Disk space: " in out


def test_a_store_is_not_evaluated(store, trained, capfd):
    assert (
        main(["evaluate", f"--ckpt_path={trained}/checkpoints/last.ckpt", f"--data.path={store}"])
        == 2
    )
    error = capfd.readouterr().err
    assert "names no text files, but a token store" in error
