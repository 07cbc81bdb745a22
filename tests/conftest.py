"""Shared fixtures: small texts, and the training command run in this process."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_gpt.command import run as run_command
from lit_gpt.training import train as train_command

# A shell that starts pytest in the background has it ignore Ctrl-C, and so all that it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(1)  # models as small as these are faster so, and suites can run side by side

ROOT = Path(__file__).parents[1]
SMALL = {  # a model and windows that take a hundredth of a second a step
    "model.d_model": 16,
    "model.num_blocks": 2,
    "model.num_heads": 2,
    "data.context_length": 16,
    "trainer.accelerator": "cpu",
    "trainer.enable_progress_bar": False,
    "trainer.max_steps": 6,
    "trainer.val_check_interval": 2,
    "trainer.limit_val_batches": 2,
    "trainer.log_every_n_steps": 1,
}


@dataclass
class Result:
    """What a command left behind."""

    status: int
    out: str
    err: str
    cli: train_command.TrainingCLI | None

    @property
    def steps(self) -> list[str]:
        return [line for line in self.out.splitlines() if line.startswith("Step: ")]

    @property
    def evaluated(self) -> list[int]:
        """The steps after which there was an evaluation."""
        return [int(line.split()[1].rstrip(",")) for line in self.steps]


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    """A text of about 6,000 characters with something to learn in it."""
    words = [
        "the",
        "cat",
        "sat",
        "on",
        "a",
        "mat",
        "and",
        "一只",
        "猫",
        "坐在",
        "垫子",
        "上",
        "while",
        "it",
        "rained",
    ]
    rng = random.Random(0)
    lines = (" ".join(rng.choices(words, k=8)) + "." for _ in range(200))
    path = tmp_path / "text.txt"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


@pytest.fixture
def train(text_file: Path, tmp_path: Path, capfd: pytest.CaptureFixture, monkeypatch: Any):
    """`train("--model.d_model=32", **{"data.path": ...})`: train.py on the small text, in here."""
    monkeypatch.setattr("sys.argv", ["train.py"])  # LightningCLI warns of arguments given twice
    seen: list[train_command.TrainingCLI] = []
    init = train_command.TrainingCLI.__init__

    def remember(self: train_command.TrainingCLI, args: list[str] | None = None) -> None:
        seen.append(self)
        init(self, args)

    monkeypatch.setattr(train_command.TrainingCLI, "__init__", remember)

    places = {"data.path": text_file, "data.cache": tmp_path / "cache"}
    places["trainer.default_root_dir"] = tmp_path / "logs"

    def run(*args: str, defaults: dict[str, Any] = places | SMALL, **options: Any) -> Result:
        options = {**defaults, **options}
        words = [f"--{name}={value}" for name, value in options.items()]
        capfd.readouterr()
        try:
            status = run_command(lambda: train_command.main([*words, *args]))
        except SystemExit as stop:  # --help, --print_config
            status = stop.code or 0
        return Result(status, *capfd.readouterr(), seen[-1] if seen else None)

    return run


class Running:
    """train.py as a process of its own, in a session of its own."""

    def __init__(self, words: list[str], env: dict[str, str]) -> None:
        self.out: list[str] = []
        script = [sys.executable, "-u", str(ROOT / "scripts" / "train.py")]
        self.process = subprocess.Popen(
            [*script, *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", **env},
        )

    def until(self, beginning: str) -> None:
        """Reads on to a line that begins so."""
        for line in self.process.stdout:
            self.out.append(line.rstrip("\n"))
            if line.startswith(beginning):
                return
        raise AssertionError(f"{beginning!r} never came: {self.out} {self.process.stderr.read()}")

    def send(self, *numbers: int) -> None:
        for number in numbers:
            os.kill(self.process.pid, number)

    def end(self) -> tuple[int, list[str], str]:
        """Exit status, all lines of stdout, stderr."""
        out, err = self.process.communicate(timeout=120)
        return self.process.returncode, self.out + out.splitlines(), err


@pytest.fixture
def start(text_file: Path, tmp_path: Path) -> Iterator[Any]:
    """`start(env={...}, **{"trainer.max_steps": 9})`: train.py on the small text, as a process."""
    started: list[Running] = []

    def begin(*args: str, env: dict[str, str] | None = None, **options: Any) -> Running:
        places = {"data.path": text_file, "data.cache": tmp_path / "cache"}
        places["trainer.default_root_dir"] = tmp_path / "logs"
        words = [f"--{name}={value}" for name, value in (places | SMALL | options).items()]
        started.append(Running([*words, *args], env or {}))
        return started[-1]

    yield begin
    for running in started:
        running.process.kill()


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Callable[[int], Path]]:
    """`small_disk(100)`: a file system of its own with room for 100 KB."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(kilobytes: int) -> Path:
        words = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)]
        if not shutil.which("mount") or subprocess.run(words, capture_output=True).returncode:
            pytest.skip("mounting a small file system needs root")
        return folder

    yield mount
    subprocess.run(["umount", str(folder)], capture_output=True)
