"""Runs of earlier releases load and continue, with the numbers that those releases gave."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from lit_gpt.checkpoint import Checkpoint, load_checkpoint
from lit_gpt.reports.history import read_history
from tests.conftest import ROOT

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
