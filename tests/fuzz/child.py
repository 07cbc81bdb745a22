"""Runs a command in a process of its own, on a terminal, with limits on memory and time."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import signal
import struct
import sys
import tempfile
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT

fcntl, resource, termios = map(pytest.importorskip, ("fcntl", "resource", "termios"))  # Unix
MEMORY = 8 << 30  # bytes
SECONDS = 120
# A server that has imported the slow packages forks each child: clean, in a tenth of a second.
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["lit_gpt.training.train", "tests.fuzz.child"])


@dataclass(frozen=True)
class Ended:
    """A command that has ended."""

    status: int  # minus the number of the signal that ended it
    out: str  # on the terminal
    err: str

    def check(self) -> None:
        """It was done or stopped by Ctrl-C, or refused in one line; it neither crashed nor hung."""
        said = f"status {self.status}\n{self.out}\n{self.err}"
        assert self.status in (0, 2, 130), said
        assert "Traceback" not in self.out + self.err, said
        if self.status == 2:
            assert self.err.startswith("error: "), said
            assert len(self.err.splitlines()) == 1, said


def run(*argv: str, signal_at: tuple[int, int] | None = None, ends: float | None = None) -> Ended:
    """Runs `lit-gpt ARGV`.

    Args:
        signal_at: a signal's number, and the training step after which the process gets it.
        ends: seconds after which a server is stopped with Ctrl-C.
    """
    master, slave = os.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    with tempfile.TemporaryDirectory() as folder:
        err = Path(folder, "err")
        err.touch()
        arguments = (argv, os.ttyname(slave), str(err), signal_at, ends)
        process = context.Process(target=_main, args=arguments)
        process.start()
        out = _read(master, slave, process)
        process.join()
        text = err.read_text(encoding="utf-8", errors="replace")
    return Ended(process.exitcode or 0, out.decode(errors="replace"), text)


def _read(master: int, slave: int, process: Any) -> bytes:
    """All that the process writes to the terminal."""
    os.set_blocking(master, False)
    parts: list[bytes] = []
    while True:
        process.join(0.02)
        has_ended = not process.is_alive()  # before the last read, so that nothing is missed
        try:
            while part := os.read(master, 1 << 16):
                parts.append(part)
        except BlockingIOError:
            pass
        if has_ended:
            os.close(slave)
            os.close(master)
            return b"".join(parts)


def _main(
    argv: tuple[str, ...],
    terminal: str,
    err: str,
    signal_at: tuple[int, int] | None,
    ends: float | None,
) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    os.chdir(Path(err).parent)  # for what has a relative path
    for number, name in enumerate((terminal, terminal, err)):
        file = os.open(name, os.O_RDWR)
        os.dup2(file, number)
        os.close(file)
    sys.stdout, sys.stderr = (os.fdopen(n, "w", 1, "utf-8", closefd=False) for n in (1, 2))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    faulthandler.dump_traceback_later(SECONDS, exit=True)
    sys.argv = [str(ROOT / "scripts" / f"{argv[0]}.py"), *argv[1:]]
    if ends:
        signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGINT))
        signal.setitimer(signal.ITIMER_REAL, ends)
    if signal_at:
        _send(*signal_at)
    status = 1
    try:
        from lit_gpt.__main__ import main

        status = main(list(argv))
    except SystemExit as stop:  # --help
        status = stop.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)  # threads that a library left behind don't matter


def _send(number: int, step: int) -> None:
    """Makes the run send itself a signal after that step."""
    from lightning.pytorch.callbacks import LambdaCallback

    from lit_gpt.training import train

    build_run = train.build_run

    def send(trainer: Any, *_: Any) -> None:
        if trainer.global_step == step:
            callback.on_train_batch_end = lambda *_: None
            os.kill(os.getpid(), number)

    callback = LambdaCallback(on_train_batch_end=send)
    train.build_run = lambda *args, **kwargs: build_run(*args, **kwargs, callbacks=[callback])
