"""Runs of earlier releases load and continue, with the numbers that those releases gave."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from lit_gpt.checkpoint import Checkpoint, load_checkpoint
from lit_gpt.reports.history import read_history
from lit_gpt.text import corpus
from lit_gpt.training import options as options_of_train
from lit_gpt.training.init_from import build_data
from tests.conftest import ROOT, WORDS

RUNS = ROOT / "tests" / "data" / "0.1.0"


@pytest.fixture(params=["adamw", "muon"])
def old_run(request, tmp_path) -> Path:
    """A copy of a run of 0.1.0, stopped at step 10 of 20; expected.json has the other 10."""
    run = tmp_path / "logs" / "version_0"
    shutil.copytree(RUNS / request.param, run)
    return run


def checkpoint_in(run: Path) -> Path:
    (path,) = (run / "checkpoints").glob("*.ckpt")
    return path


def test_an_old_checkpoint_loads_and_says_what_it_is(old_run):
    model, tokenizer = load_checkpoint(checkpoint_in(old_run))
    assert tokenizer.vocab_size == model.config.vocab_size == 306
    assert tokenizer.decode(tokenizer.encode("一只 cat 🦆")) == "一只 cat 🦆"
    assert (model.config.smear, model.config.bigram_rows, model.pairs) == (False, 0, None)
    checkpoint = Checkpoint.read(checkpoint_in(old_run))
    assert (checkpoint.global_step, checkpoint.skipped_steps) == (10, 0)
    assert checkpoint.hyperparameters["learning_rate"] == 1e-3
    assert checkpoint.data_hyperparameters["path"] == "text.txt"
    assert checkpoint.trainer_settings["precision"] == "32-true"
    assert checkpoint.corpus_info["num_tokens"] == 1756
    assert checkpoint.best_evaluation["val"] == pytest.approx(5.66, abs=0.03)


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:300"])
def test_an_old_run_on_a_folder_continues_with_line_ends_between_files(
    tokenizer, train, tmp_path, monkeypatch
):
    """Its tokens stay those that it began with, and its vocabulary has no end of text."""
    (tmp_path / "texts").mkdir()
    for i in range(3):
        (tmp_path / "texts" / f"{i}.txt").write_text(WORDS * 20 + str(i))
    options = {"data.path": tmp_path / "texts", "data.tokenizer": tokenizer}
    options |= {"model.dropout": 0.0}

    def as_before(data_class, resumed, **given):
        data = build_data(data_class, **given)
        data.ends_files = False
        return data

    with monkeypatch.context() as patch:
        patch.setattr(options_of_train, "build_data", as_before)
        whole = train(**options | {"trainer.max_steps": 8})
        train(**options | {"trainer.default_root_dir": tmp_path / "other", "trainer.max_steps": 4})
    (last,) = tmp_path.glob("other/*/checkpoints/last.ckpt")
    for steps in (6, 8):  # what is resumed once can be resumed again
        resumed = train(**options | {"ckpt_path": last, "trainer.max_steps": steps})
        assert resumed.status == 0, resumed.err
        last = Path(resumed.run.last.dirpath) / "last.ckpt"
    assert resumed.steps[-1] == whole.steps[-1]
    data = resumed.run.data
    assert data.tokenizer.end_of_text is None
    assert data.corpus.info.added_line_ends == 2
    assert "Line breaks added between files: 2\n" in resumed.out
    fresh = train(**options | {"trainer.max_steps": 2})
    assert fresh.run.data.tokenizer.learnt_end == fresh.run.data.vocab_size - 1
    assert "End-of-text tokens between files: 2\n" in fresh.out


def test_an_old_run_continues_with_the_vocabulary_of_both_splits(train, tmp_path, monkeypatch):
    """Its validation text stays in whole tokens; a new run spells what only that has."""
    text = tmp_path / "text.txt"
    text.write_text(WORDS * 30 + " telescope underneath" * 35)
    options = {"data.path": text, "data.tokenizer": "cl100k_base", "model.dropout": 0.0}
    encode = corpus.encode
    with monkeypatch.context() as patch:
        patch.setattr(corpus, "encode", lambda *args: encode(*args[:3], 1.0))
        whole = train(**options | {"trainer.max_steps": 8, "data.cache": tmp_path / "before"})
        options |= {"trainer.default_root_dir": tmp_path / "other"}
        train(**options | {"trainer.max_steps": 4, "data.cache": tmp_path / "before"})
    assert b" underneath" in whole.run.data.tokenizer.tokens
    (last,) = tmp_path.glob("other/*/checkpoints/last.ckpt")
    for steps in (6, 8):
        resumed = train(**options | {"ckpt_path": last, "trainer.max_steps": steps})
        assert resumed.status == 0, resumed.err
        last = Path(resumed.run.last.dirpath) / "last.ckpt"
    assert resumed.steps[-1] == whole.steps[-1]
    fresh = train(**options | {"trainer.max_steps": 2})
    assert fresh.run.data.vocab_size < whole.run.data.vocab_size
    options |= {"ckpt_path": last, "trainer.max_steps": 10}
    other = train(**options | {"data.tokenizer": "bytes"})
    assert "tokenizer was cl100k_base and is now bytes" in other.err


def test_an_old_run_continues_with_the_same_numbers(old_run, train, tmp_path):
    text = tmp_path / "text.txt"
    shutil.copy(RUNS / "text.txt", text)
    options = {"data.path": text, "data.cache": tmp_path / "cache", "trainer.max_steps": 20}
    options |= {"trainer.default_root_dir": tmp_path / "logs", "trainer.enable_progress_bar": False}
    options |= {"ckpt_path": checkpoint_in(old_run)}
    refused = train(defaults={"config": old_run / "config.yaml"}, **options | {"model.smear": True})
    assert "smear was False and is now True" in refused.err
    result = train(defaults={"config": old_run / "config.yaml"}, **options)
    assert result.status == 0, result.err
    assert "different options" not in result.out
    history = read_history(Path(result.run.trainer.log_dir))
    expected = json.loads((old_run / "expected.json").read_text(encoding="utf-8"))
    for name, points in expected["curves"].items():
        steps = [step for step, _ in points]
        found = {step: value for step, value in history.curves[name] if step > 10}
        assert list(found) == steps, name
        assert list(found.values()) == pytest.approx([v for _, v in points], abs=1e-4), name
    final = expected["final"]
    assert history.final.loss == pytest.approx(final["loss"], abs=1e-4)
    assert history.final.bits_per_byte == pytest.approx(final["bits_per_byte"], abs=1e-4)
    assert history.final.num_tokens == final["num_tokens"]
    best = Checkpoint.read(Path(result.run.trainer.log_dir) / "checkpoints" / "best.ckpt")
    assert best.global_step == 20  # the score of the old run's best is known, and is beaten
