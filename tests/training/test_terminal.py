"""The training command on a real terminal with its progress bar: nothing is lost or garbled."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import shutil
import struct
import sys
import termios
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lit_gpt.__main__ import STARTING
from tests.conftest import ROOT, SMALL, command_line

COLUMNS = 120
OVERFITS = {"model.learning_rate": 0.02, "trainer.max_steps": 180, "trainer.val_check_interval": 20}


def drain(master: int, chunks: list[bytes]) -> None:
    with contextlib.suppress(OSError):  # the other end was closed
        while chunk := os.read(master, 1 << 16):
            chunks.append(chunk)


@contextlib.contextmanager
def terminal() -> Iterator[list[bytes]]:
    """Makes sys.stdout a terminal; fills the list with the bytes it received."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, COLUMNS, 0, 0))
    chunks: list[bytes] = []
    reader = threading.Thread(target=drain, args=(master, chunks))
    reader.start()
    with os.fdopen(slave, "w", encoding="utf-8") as screen, contextlib.redirect_stdout(screen):
        yield chunks
    reader.join(10)
    os.close(master)


def frames(output: bytes) -> list[str]:
    """What was written between two movements of the cursor."""
    text = re.sub("\x1b\\[[0-9;]*[A-Za-z]", "", output.decode(errors="replace"))
    return re.split("[\r\n]", text)


def rendered(output: bytes) -> list[str]:
    """The lines that are left on the screen: a carriage return writes over what was there."""
    lines = []
    for line in output.decode().replace("\r\n", "\n").split("\n"):
        cells: list[str] = []
        for part in re.sub("\x1b\\[[0-9;]*[A-Za-z]", "", line).split("\r"):
            cells[: len(part)] = part
        lines.append("".join(cells).rstrip())
    return [line for line in lines if line]


@pytest.fixture
def compare(train, places) -> Callable:
    """Runs the command without a terminal and on one; gives both, and the lines of each."""

    def run(*args: str, prepare: Callable[[Path], None] | None = None, **options):
        root = Path(places["trainer.default_root_dir"])

        def clean() -> None:
            shutil.rmtree(root, ignore_errors=True)
            if prepare:
                prepare(root)

        clean()
        plain = train(*args, **options)
        clean()
        with terminal() as chunks:
            shown = train(*args, **options)
        assert shown.status == plain.status
        output = b"".join(chunks)
        return plain, shown, [line.rstrip() for line in plain.out.splitlines() if line], output

    return run


def test_evaluations_and_samples_with_the_bar(compare):
    plain, _, lines, output = compare(**{"trainer.max_steps": 40})
    assert plain.status == 0, plain.err
    assert sum(line.startswith("Step: ") for line in lines) == 21
    assert rendered(output) == lines
    bars = [frame for frame in frames(output) if frame.startswith("Training:")]
    assert bars, "the bar was never shown"
    assert all(len(bar) <= COLUMNS for bar in bars)


def test_the_overfitting_notice_with_the_bar(compare, text_file):
    text_file.write_text("\n".join(text_file.read_text().splitlines()[:20]))
    plain, _, lines, output = compare("--overfit.patience=1", **OVERFITS)
    assert any(line.startswith("The model is overfitting") for line in lines), plain.out + plain.err
    assert rendered(output) == lines


def test_skipped_updates_with_the_bar(compare):
    options = {"model.learning_rate": 1e20, "model.skip_bad_steps": 3, "trainer.max_steps": 20}
    options["trainer.val_check_interval"] = 20
    plain, shown, lines, output = compare(**options)
    assert plain.status == 2
    assert shown.err == plain.err
    skipped = [line for line in lines if line.startswith("Skipped the update at step ")]
    assert [line.partition(" (")[2] for line in skipped] == [
        *("1 of 3 allowed)", "2 of 3 allowed)", "3 of 3 allowed)"),
    ]
    assert rendered(output) == lines


def folder_of(root: Path, train) -> Path:
    assert train(**{"trainer.max_steps": 2}).status == 0
    return root / "version_0"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("history.json", '{"curves"', "is damaged and now called history.json.damaged: in the "),
        ("history.json", None, "is damaged and now called history.json.damaged: in the report"),
        ("report.html", None, "Could not write the report to "),
        ("config.yaml", None, "Could not write "),
        ("hparams.yaml", None, "can't log, training goes on: "),
    ],
)
def test_a_file_that_cant_be_written_is_one_line(compare, train, name, content, message):
    """None: a folder is in its place."""

    def damage(root: Path) -> None:
        path = folder_of(root, train) / name
        path.unlink()
        if content is None:
            path.mkdir()
            (path / "kept").write_text("mine")
        else:
            path.write_text(content)

    options = {"ckpt_path": "last", "trainer.max_steps": 8}
    plain, _, lines, output = compare(prepare=damage, **options)
    assert plain.status == 0, plain.err
    assert "can't be continued" not in plain.err
    assert plain.evaluated == [4, 6, 8]
    assert sum(message in line for line in lines) == 1
    assert rendered(output) == lines
    folder = Path(plain.run.folder)
    if content is None:
        kept = [*folder.glob(f"{name}*/kept")]
        assert [path.read_text() for path in kept] == ["mine"]
    else:
        assert (folder / "history.json.damaged").read_text() == content


def test_the_curves_of_a_damaged_history_come_from_tensorboard(train, places):
    folder = folder_of(Path(places["trainer.default_root_dir"]), train)
    (folder / "history.json").write_text("[")
    assert train(ckpt_path="last", **{"trainer.max_steps": 8}).status == 0
    from lit_gpt.reports.history import read_history

    history = read_history(folder)
    assert [step for step, _ in history.curves["val/loss"]] == [0, 2, 4, 6, 8]


class Session:
    """train.py as a process of its own on a terminal that is its own, too."""

    def __init__(self, argv: list[str], env: dict[str, str] | None = None) -> None:
        program = [sys.executable, str(ROOT / "scripts" / "train.py"), *argv]
        self.pid, self.master = pty.fork()
        if self.pid == 0:
            os.execvpe(program[0], program, os.environ | (env or {}))
        self.output = b""

    def until(self, text: str) -> None:
        try:
            while text.encode() not in self.output:
                self.output += os.read(self.master, 1 << 16)
        except OSError as error:  # it has ended
            raise AssertionError(self.output.decode()) from error

    def press_ctrl_c(self) -> None:
        os.write(self.master, b"\x03")

    def end(self) -> int:
        """The exit status; that of a signal that killed it is negative."""
        chunks: list[bytes] = []
        drain(self.master, chunks)
        self.output += b"".join(chunks)
        os.close(self.master)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def test_ctrl_c_on_a_terminal(places):
    session = Session(command_line(places | SMALL | {"trainer.max_steps": 100_000}))
    session.until("Step: 4,")
    session.press_ctrl_c()
    assert session.end() == 130
    lines = rendered(session.output.replace(b"^C", b""))
    assert b"Traceback" not in session.output
    assert sum(line.startswith("Stopped by SIGINT after step ") for line in lines) == 1
    assert lines[-1].startswith("Continue:        python ")
    steps = [line for line in lines if "Validation Loss" in line]
    whole = re.compile(r"Step: \d+, Training Loss: \d\.\d{3}, Validation Loss: \d\.\d{3}")
    assert all(whole.fullmatch(line) for line in steps)


IMPORTS = {  # a module that is imported on the way, and the marker that the test waits for
    "the command": "lit_gpt.command",
    "numpy": "numpy",
    "torch": "torch.nn",
    "lightning": "lightning.pytorch.trainer",
}
ANNOUNCE = """
import sys, time
class Announce:
    def find_spec(self, name, *_):
        if name == {name!r}:
            sys.meta_path.remove(self)
            print("importing", name, flush=True)
            try:
                time.sleep(5)
                return
            except KeyboardInterrupt:
                pass
            raise ImportError("what the C code of a package makes of it")
sys.meta_path.insert(0, Announce())
"""


@pytest.mark.parametrize("name", IMPORTS.values(), ids=IMPORTS)
def test_ctrl_c_during_imports(places, tmp_path, name):
    (tmp_path / "sitecustomize.py").write_text(ANNOUNCE.format(name=name))
    session = Session(command_line(places | SMALL), {"PYTHONPATH": str(tmp_path)})
    session.until(f"importing {name}")
    session.press_ctrl_c()
    assert session.end() == 130
    output = session.output.replace(b"^C", b"").replace(STARTING.encode(), b"")
    assert output.split() == [b"importing", name.encode()]
