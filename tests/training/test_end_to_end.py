"""The commands of the README, as processes, on the sample corpus."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from lit_gpt.__main__ import main
from tests.conftest import ROOT


def script(name: str, *args: object, status: int = 0, **options: object):
    """Runs scripts/NAME; gives what it printed."""
    words = [sys.executable, str(ROOT / "scripts" / name), *map(str, args)]
    words += [f"--{key}={value}" for key, value in options.items()]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == status, done.stderr
    return done


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("end_to_end")
    return {"trainer.default_root_dir": base / "logs", "data.cache": base / "cache"}


@pytest.fixture(scope="module")
def run(places):
    """The default job, but for 150 steps instead of 500."""
    options = {**places, "trainer.max_steps": 150, "trainer.accelerator": "cpu"}
    return script("train.py", **options)


def test_the_default_job_learns_the_sample_corpus(run):
    lines = run.stdout.splitlines()
    assert "Text length: 324,017 characters" in lines
    shared = "Validation lines also in the training text: 0 of 1,705 (0.0%, 0.0% of the bytes)"
    assert shared in lines
    steps = [line for line in lines if line.startswith("Step: ")]
    assert [int(line.split()[1].rstrip(",")) for line in steps] == [0, 50, 100, 150]
    first, last = (float(line.rpartition(" ")[2]) for line in (steps[0], steps[-1]))
    assert 7.0 < first < 7.3
    assert last < first - 2
    assert run.stderr == ""


def test_it_writes_from_the_checkpoint(run, places):
    logs = places["trainer.default_root_dir"]
    done = script("generate.py", "--prompt", "农夫山泉 ", logs=logs, max_new_tokens=40)
    assert done.stdout.startswith("农夫山泉 ")
    assert len(done.stdout) > len("农夫山泉 ") + 10
    assert "\ufffd" not in done.stdout
    best = logs / "version_0" / "checkpoints" / "best.ckpt"
    assert done.stderr == f"Using {best}\n"
    named = script("generate.py", "--prompt", "农夫山泉 ", ckpt_path=best, max_new_tokens=40)
    assert (named.stdout, named.stderr) == (done.stdout, "")


@pytest.fixture
def write(run, places, capsys):
    """`write(top_k=1)`: what the generate command prints, in this process."""

    def call(**options: object) -> str:
        options = {"logs": places["trainer.default_root_dir"], **options}
        argv = [
            f"--{name}" if value is None else f"--{name}={value}" for name, value in options.items()
        ]
        assert main(["generate", *argv]) == 0
        return capsys.readouterr().out

    return call


def test_each_option_changes_the_text(write):
    plain = {"prompt": "维达", "max_new_tokens": 30}
    texts = {write(**plain)}
    for number, options in enumerate(
        [
            {"temperature": 0},
            {"temperature": 2.0},
            {"top_k": 3},
            {"top_p": 0.3},
            {"repetition_penalty": 3.0},
            {"min_p": 0.5},
            {"stop": "\\n"},
            {"trace": None},
            {"json": None},
            {"seed": 5},
            {"max_new_tokens": 9},
            {"num_samples": 2},
            {"prompt": "🦆 zß"},
        ],
        start=2,
    ):
        text = write(**{**plain, **options})
        assert write(**{**plain, **options}) == text
        texts.add(text)
        assert len(texts) == number, options


def test_several_samples_are_numbered_and_differ(write):
    out = write(num_samples=2, max_new_tokens=30, prompt="蒙牛")
    first, second = re.fullmatch(
        "--- sample 1, seed 1337\n(蒙牛.*)--- sample 2, seed 1338\n(蒙牛.*)", out, re.DOTALL
    ).groups()
    assert first != second


def test_the_modern_config_ends_lower_than_the_default(run, places):
    config = ROOT / "configs" / "modern.yaml"
    options = {**places, "trainer.max_steps": 150, "trainer.accelerator": "cpu"}
    modern = script("train.py", config=config, **options)
    losses = [
        float(re.search(r"Final validation loss: ([\d.]+)", done.stdout)[1])
        for done in (run, modern)
    ]
    assert losses[1] < losses[0] - 0.5


def test_weights_and_biases_offline(places, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for folder in ("CACHE", "DATA", "CONFIG"):
        monkeypatch.setenv(f"WANDB_{folder}_DIR", str(tmp_path))
    options = {**places, "trainer.max_steps": 4, "trainer.val_check_interval": 2}
    options |= {"trainer.log_every_n_steps": 1}
    options |= {"trainer.accelerator": "cpu", "trainer.logger.init_args.save_dir": tmp_path}
    script("train.py", f"--config={ROOT / 'configs' / 'wandb.yaml'}", **options)
    (log,) = tmp_path.rglob("*.wandb")
    content = log.read_bytes()
    for name in (b"val/loss", b"val/bits_per_byte", b"tokens_per_second", b"samples", b"d_model"):
        assert name in content
