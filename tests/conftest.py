"""Shared fixtures: a small text, and the training command in this process or as one of its own."""

from __future__ import annotations

import contextlib
import io
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from lit_gpt.command import run as run_command

if TYPE_CHECKING:
    from lit_gpt.training.train import Run

# A shell that starts pytest in the background makes it, and all it starts, ignore Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)
# Small models are faster on one thread, and several suites can run side by side.
os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).parents[1]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)
# YAML in which each list repeats the one before ten times.
ALIASES = "".join(
    f"x{i}: &x{i} [{', '.join(10 * [f'*x{i - 1}' if i else 'x'])}]\n" for i in range(9)
)
SMALL = {  # a step takes a hundredth of a second
    "model.d_model": 16,
    "model.num_blocks": 2,
    "model.num_heads": 2,
    "data.context_length": 16,
    "trainer.accelerator": "cpu",
    "trainer.max_steps": 6,
    "trainer.val_check_interval": 2,
    "trainer.limit_val_batches": 2,
    "trainer.log_every_n_steps": 1,
}
WORDS = "the cat sat on a mat and 一只 猫 坐在 垫子 上 while it rained"


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """The whole suite runs in parallel; files and folders named on the command line do not."""
    is_whole = config.args_source == pytest.Config.ArgsSource.TESTPATHS
    return min(os.cpu_count() or 1, 4) if is_whole else 0


def command_line(options: dict[str, Any]) -> list[str]:
    """`{"model.d_model": 16}` as `["--model.d_model=16"]`."""
    return [f"--{name}={value}" for name, value in options.items()]


def write_text(path: Path) -> Path:
    """Writes a text of about 6,000 characters that has something to learn in it."""
    rng = random.Random(0)
    lines = (" ".join(rng.choices(WORDS.split(), k=8)) + "." for _ in range(200))
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def train_apart(folder: Path, steps: int) -> Path:
    """Trains in a process of its own; returns its last.ckpt."""
    options = SMALL | {"trainer.max_steps": steps, "trainer.default_root_dir": folder / "logs"}
    options |= {"data.path": write_text(folder / "text.txt"), "data.cache": folder / "cache"}
    command = [sys.executable, str(ROOT / "scripts" / "train.py"), *command_line(options)]
    subprocess.run(command, check=True, capture_output=True)
    return folder / "logs" / "version_0" / "checkpoints" / "last.ckpt"


@contextlib.contextmanager
def limited_memory(more: int) -> Iterator[None]:
    """Lets this process take this many bytes more, used or not; unlimited but on Linux."""
    if sys.platform != "linux":
        yield
        return
    import resource

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    old = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + more, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, old)


@dataclass
class Result:
    """What a training command printed and made."""

    status: int
    out: str
    err: str
    run: Run | None

    @property
    def steps(self) -> list[str]:
        """Its lines of the evaluations."""
        return [line for line in self.out.splitlines() if line.startswith("Step: ")]

    @property
    def evaluated(self) -> list[int]:
        """The steps after which it evaluated."""
        return [int(line.split()[1].rstrip(",")) for line in self.steps]


@pytest.fixture
def four_cores(monkeypatch) -> Iterator[Callable[[int], None]]:
    """`four_cores(2)`: PyTorch computes on two threads, on a machine of four cores."""
    import torch

    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    before = torch.get_num_threads()

    def use(threads: int) -> None:
        monkeypatch.setenv("OMP_NUM_THREADS", str(threads))  # so that it is set back
        torch.set_num_threads(threads)

    yield use
    torch.set_num_threads(before)


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    return write_text(tmp_path / "text.txt")


@pytest.fixture
def places(text_file: Path, tmp_path: Path) -> dict[str, Path]:
    """Options of the training command that keep it to this test's text and folder."""
    return {
        "data.path": text_file,
        "data.cache": tmp_path / "cache",
        "trainer.default_root_dir": tmp_path / "logs",
    }


@pytest.fixture
def train(places: dict, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
    """`train("--find_lr", **{"model.d_model": 32})`: train.py on the small text, in this process.

    `defaults={}` leaves out what is otherwise set: the small model and the places. `callbacks`
    are further ones for the run.
    """
    from lit_gpt.training import train as train_command

    monkeypatch.setattr("sys.argv", ["train.py"])  # LightningCLI warns if options come twice
    seen: list[Run] = []
    further: list[Any] = []
    build_run = train_command.build_run

    def remember(*args: Any, **kwargs: Any) -> Run:
        seen.append(build_run(*args, **{"callbacks": further} | kwargs))
        return seen[-1]

    monkeypatch.setattr(train_command, "build_run", remember)

    def run(
        *args: str,
        defaults: dict[str, Any] = places | SMALL,
        callbacks: Sequence[Any] = (),
        **options: Any,
    ) -> Result:
        argv = [*command_line({**defaults, **options}), *args]
        seen.clear()
        further[:] = callbacks
        capfd.readouterr()
        try:
            status = run_command(lambda: train_command.main(argv), train_command.option_name)
        except SystemExit as stop:  # --help, --print_config
            status = stop.code or 0
        return Result(status, *capfd.readouterr(), seen[-1] if seen else None)

    before = {*os.environ}
    yield run
    from torch import distributed

    if distributed.is_available() and distributed.is_initialized():  # by a strategy for several
        distributed.destroy_process_group()
    for name in {*os.environ} - before:  # or processes that are started later take them over
        del os.environ[name]


class Running:
    """train.py as a process and a session of its own."""

    def __init__(self, argv: list[str], env: dict[str, str]) -> None:
        self.out: list[str] = []
        self.process = subprocess.Popen(
            [sys.executable, "-u", str(ROOT / "scripts" / "train.py"), *argv],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            start_new_session=True,
            env={**os.environ, **env},
        )

    def until(self, beginning: str) -> None:
        """Reads until a line begins with this."""
        for line in self.process.stdout:
            self.out.append(line.rstrip("\n"))
            if line.startswith(beginning):
                return
        raise AssertionError(f"{beginning!r} never came: {self.out} {self.process.stderr.read()}")

    def send(self, *signals: int) -> None:
        for number in signals:
            os.kill(self.process.pid, number)

    def end(self) -> tuple[int, list[str], str]:
        """Exit status, all lines of stdout, stderr."""
        out, err = self.process.communicate(timeout=120)
        return self.process.returncode, self.out + out.splitlines(), err


@pytest.fixture
def start(places: dict) -> Iterator[Callable[..., Running]]:
    """`start(env={...}, **{"trainer.max_steps": 9})`: train.py on the small text, as a process."""
    started: list[Running] = []

    def begin(*args: str, env: dict[str, str] | None = None, **options: Any) -> Running:
        started.append(Running([*command_line(places | SMALL | options), *args], env or {}))
        return started[-1]

    yield begin
    for running in started:
        running.process.kill()


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of a small modern model; a test that changes it copies it."""
    from lit_gpt.__main__ import main

    folder = tmp_path_factory.mktemp("trained")
    options = SMALL | {"model.style": "modern", "model.num_kv_heads": 1}
    options |= {"data.path": write_text(folder / "text.txt"), "data.cache": folder / "cache"}
    options |= {"trainer.default_root_dir": folder / "logs"}
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
        patch.setattr("sys.argv", ["train.py"])  # LightningCLI warns if options come twice
        assert main(["train", *command_line(options)]) == 0
    return folder / "logs" / "version_0"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """`small_disk(100)`: a file system of its own with room for 100 KB."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(kilobytes: int) -> Path:
        command = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)]
        if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("mounting a small file system needs root")
        return folder

    yield mount
    if shutil.which("umount"):
        subprocess.run(["umount", "--lazy", str(folder)], capture_output=True)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium; of a module, as its event loop would be in the way of other modules' own."""
    playwright = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("needs Chromium")
    with playwright.sync_playwright() as running:
        yield running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
