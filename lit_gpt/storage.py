"""Owns files on disk: written whole or not at all, locks, and what killed processes left."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from filelock import FileLock, Timeout

from lit_gpt.errors import UserError

UNFINISHED = ".unfinished"  # ends the name of a file that is being written
ABANDONED = 60.0  # seconds: what nobody works on for that long may be removed
NO_LOCK = (OSError, NotImplementedError)  # what filelock raises where a file system has no locks


def unfinished(path: str | Path) -> Path:
    """What is written before it becomes `path`."""
    return Path(path).with_name(f".{Path(path).name}{UNFINISHED}")


def write_whole(path: Path, text: str) -> None:
    """Writes a temporary file beside `path` and renames it: a reader never sees half of it."""
    temporary = unfinished(path)
    try:
        temporary.write_bytes(text.encode("utf-8", errors="replace"))
        temporary.replace(path)
    except OSError as error:
        error.filename = error.filename or str(path)  # a full disk doesn't say of which file
        raise
    finally:
        temporary.unlink(missing_ok=True)


def cache_folder(cache: str) -> Path:
    """The folder of that name, there or not.

    Raises:
        UserError: it can't be one.
    """
    try:
        folder = Path(cache).expanduser()
        with suppress(OSError):
            folder.stat()
    except (RuntimeError, ValueError) as error:  # ~ of nobody; no name of a folder
        raise UserError(f"--data.cache {cache!r} can't be the name of a folder") from error
    return folder


@contextmanager
def locked(work: Path) -> Iterator[None]:
    """Shows other processes that somebody works there; the lock goes when the process does."""
    lock = FileLock(work / "lock")
    with suppress(*NO_LOCK):
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
        (work / "lock").unlink(missing_ok=True)


def remove_abandoned(cache: Path) -> None:
    """Removes what killed processes left: old, and nobody holds its lock."""

    def is_old(work: Path) -> bool:
        return time.time() - work.stat().st_mtime > ABANDONED

    for work in cache.glob("unfinished-*"):
        with suppress(Timeout, *NO_LOCK):
            if is_old(work):  # the lock is not even touched where somebody has just begun
                with FileLock(work / "lock", timeout=0):
                    if is_old(work):  # not renamed, nor finished, since
                        shutil.rmtree(work)


def flush(file: IO) -> None:
    """To the disk itself: a power cut after the rename finds whole files."""
    file.flush()
    os.fsync(file.fileno())
