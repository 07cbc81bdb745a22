"""Owns how a command runs: its options, Ctrl-C, one-line errors and exit status."""

from __future__ import annotations

import argparse
import errno
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from lit_gpt.errors import UserError


class Parser(argparse.ArgumentParser):
    """Options of a script; wrong ones are a UserError."""

    def error(self, message: str) -> None:
        raise UserError(f"{message} (--help lists all options)")


def shortage(error: Exception) -> str | None:
    """What a disk or a device had too little of, and what to do; None where it is another error."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = f" for {error.filename}" if error.filename else ""
        return f"no space left on the disk{where}: make room, or name other folders"
    # The words of torch on CUDA, MPS and the CPU, and of numpy.
    asked = re.search(r"(?i)(?:tried|unable) to allocate ([\d.,]+ ?\w+)", str(error))
    too_large = "Storage size calculation overflowed" in str(error)  # no number for so many bytes
    if asked or too_large or isinstance(error, MemoryError):
        amount = f" (asked for {asked[1]})" if asked else ""
        return (
            f"out of memory{amount}: lower --data.batch_size (--trainer.accumulate_grad_batches "
            "makes up for it), --data.context_length, --model.d_model or --model.num_blocks, or "
            "compute in less with --trainer.precision=bf16-mixed"
        )
    return None


def of_thread(error: threading.ExceptHookArgs) -> None:
    """TensorBoard writes in a thread of its own; what it runs short of, `run` will say."""
    if shortage(error.exc_value) is None:
        threading.__excepthook__(error)


def at_least_one(text: str) -> int:
    """The `type` of a script's option that counts something."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {number}")
    return number


@contextmanager
def stop_at_once() -> Iterator[None]:
    """Ctrl-C and SIGTERM end the block where it stands, with the exit status that says which."""

    def stop(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    old = {n: signal.signal(n, stop) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def run(main: Callable[[], int | None]) -> int:
    """Runs a script's `main`; a UserError or shortage is one `error: ...` line, exit status 2."""
    # Like Ctrl-C an exception, until training handles it, so that no temporary file stays behind.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    sys.stdout.reconfigure(errors="replace")  # a terminal that can't show a character shows "?"
    threading.excepthook = of_thread
    try:
        return main() or 0
    except KeyboardInterrupt:  # before training handles it, or while generating
        return 130
    except BrokenPipeError:  # the reader left, as in `generate.py | head`: nobody to tell
        sys.stderr.close()
        return 141
    except Exception as error:
        message = str(error) if isinstance(error, UserError) else shortage(error)
        if message is None:
            raise
        print(f"error: {' '.join(message.split())}", file=sys.stderr)
        return 2
