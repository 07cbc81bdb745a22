"""--find_lr: the range test, what it suggests, what it leaves behind."""

from __future__ import annotations

import copy
import json
import math
import re
import shlex
import signal
import subprocess
import sys
import time
from html import unescape

import pytest
import torch
import yaml

from lit_gpt.training.lr_finder import SKIPPED, range_test, suggestion
from lit_gpt.training.train import build_run
from tests.conftest import ROOT, SMALL, command_line


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"model.style": "modern", "model.optimizer": "muon", "model.schedule": "linear"},
        {"trainer.accumulate_grad_batches": 2, "model.warmup_steps": 3},
    ],
    ids=["classic", "muon", "accumulation"],
)
def test_a_suggestion_that_can_be_pasted(train, tmp_path, options):
    result = train("--find_lr", **options)
    assert (result.status, result.err) == (0, "")
    tried, plot, suggested = result.out.splitlines()
    assert re.fullmatch(r"Learning rates tried: 1e-06 to [\d.]+, in (1[5-9]\d|200) steps", tried)
    folder = tmp_path / "logs" / "version_0"
    assert plot == f"Plot: {folder / 'lr_find.html'}"
    assert sorted(p.name for p in folder.iterdir()) == ["config.yaml", "lr_find.html"]
    assert [p.name for p in (tmp_path / "logs").iterdir()] == ["version_0"]
    page = (folder / "lr_find.html").read_text(encoding="utf-8")
    spec = json.loads(unescape(re.search(r'data-chart="([^"]+)"', page)[1]))
    assert spec["x"] == "learning rate"
    assert spec["log"]
    assert spec["series"][0]["note"] == f"suggestion: {suggested.rpartition('=')[2]}"
    assert yaml.safe_load((folder / "config.yaml").read_text())["find_lr"] is False
    words = shlex.split(suggested.removeprefix("Suggestion: "))
    assert words[:2] == ["python", "scripts/train.py"]
    rate = float(words[-1].removeprefix("--model.learning_rate="))
    assert 1e-4 < rate < 0.1
    again = train(*words[2:], defaults={})
    assert again.status == 0, again.err
    assert again.run.model.hparams.learning_rate == rate
    assert again.evaluated == [0, 2, 4, 6]


def test_the_test_is_repeatable_and_restores_the_weights(places, tmp_path):
    found = []
    for _ in range(2):
        run = build_run(command_line(SMALL | places), scratch=tmp_path)
        before = copy.deepcopy(run.model.gpt.state_dict())
        found.append(range_test(run))
        torch.testing.assert_close(run.model.gpt.state_dict(), before, rtol=0, atol=0)
    assert found[0] == found[1]


def test_the_suggestion_is_where_the_loss_falls_fastest():
    rates = [10 ** (-6 + n / 20) for n in range(100)]
    losses = [7 - 3 / (1 + math.exp(-(n - 60) / 4)) for n in range(100)]  # steepest at 60
    assert suggestion(rates, losses) == rates[60]
    assert suggestion(rates, losses[:80] + [math.nan] * 20) == rates[60]
    assert suggestion(rates, [7 + 0.01 * n for n in range(100)]) is None
    assert suggestion(rates, losses[:SKIPPED]) is None
    assert suggestion(rates, [math.nan] * 100) is None


def test_a_loss_that_explodes_does_not_end_the_test_as_an_error(places, tmp_path):
    """At rates far beyond 1 the weights overflow; a run's guard would stop it."""
    run = build_run(command_line(SMALL | places), scratch=tmp_path)
    rates, losses = range_test(run, 1e-4, 1e30)
    assert suggestion(rates, losses) < max(rates)


def test_what_it_cannot_do_is_one_line(train, tmp_path):
    train()
    for options, words in (
        ({"ckpt_path": "last"}, "--find_lr: only works for a new run; leave out --ckpt_path"),
        ({"trainer.fast_dev_run": 1}, "--find_lr: needs more than one step"),
        ({"data.path": "nowhere.txt"}, "'nowhere.txt': no such file or folder"),
        ({"trainer.accelerator": "abacus"}, "--trainer.accelerator 'abacus': must be one of auto"),
    ):
        result = train("--find_lr", **{"trainer.max_steps": 8} | options)
        assert (result.status, len(result.err.splitlines())) == (2, 1), result.err
        assert words in result.err
    assert [p.name for p in (tmp_path / "logs").iterdir()] == ["version_0"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_stopped_it_leaves_nothing(number, text_file, tmp_path):
    options = SMALL | {"data.path": text_file, "data.cache": tmp_path / "cache"}
    options |= {"trainer.default_root_dir": tmp_path / "logs", "data.batch_size": 500}
    code = (
        "import sys\n"
        "from lightning.pytorch.tuner.tuning import Tuner\n"
        "from lit_gpt.__main__ import main\n"
        "test = Tuner.lr_find\n"
        "def tell(*args, **kwargs):\n    print('testing', flush=True)\n    test(*args, **kwargs)\n"
        "Tuner.lr_find = tell\nsys.exit(main(['train', *sys.argv[1:]]))"
    )
    argv = [sys.executable, "-c", code, "--find_lr", *command_line(options)]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, cwd=ROOT)
    assert process.stdout.readline() == b"testing\n"
    time.sleep(0.5)  # some steps of the 200
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == (-9 if number == signal.SIGKILL else 128 + number)
    assert not (tmp_path / "logs").exists()


def test_nothing_of_it_is_loaded_unless_asked_for():
    code = (
        "import sys, lit_gpt.training.train\n"
        "names = {'optuna', 'sqlalchemy', 'lit_gpt.training.lr_finder', "
        "'jinja2', 'lit_gpt.tuning.sweep'}\n"
        "print(sorted(names & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.stdout == "[]\n", result.stderr
