"""Files on disk: written whole or not at all, locks, and what killed processes left behind."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import platformdirs
from filelock import FileLock, Timeout

from lit_gpt.errors import UserError

UNFINISHED = ".unfinished"  # ends the name of a file that is being written
TEMPORARY = "unfinished-"  # begins the name of a folder for unfinished work
ABANDONED = 60.0  # seconds: an unlocked temporary folder that has not changed for longer may go


def unfinished(path: str | Path) -> Path:
    """What this process writes before it becomes `path`."""
    path = Path(path)
    if not path.name:  # `.` or `/`
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    return path.with_name(f".{path.name}.{os.getpid()}{UNFINISHED}")


@contextmanager
def atomic_open(path: Path) -> Iterator[IO[bytes]]:
    """Opens a temporary file beside `path`, flushes it to disk after the block and renames it.

    So `path` always names a complete file: the earlier one until the new one is safe. An OSError
    always has a file name, which a full disk doesn't give by itself.
    """
    temporary = unfinished(path)
    try:
        temporary.unlink(missing_ok=True)  # in a stranger's folder it may link to another file
        with temporary.open("xb") as file:
            yield file
            flush(file)
        temporary.replace(path)
        _flush_folder(path.parent)
    except OSError as error:
        error.filename = error.filename or str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def atomic_write_text(path: Path, text: str) -> None:
    """Writes UTF-8 with `atomic_open`; what can't be encoded becomes a question mark."""
    with atomic_open(path) as file:
        file.write(text.encode("utf-8", errors="replace"))


def write_json(path: Path, value: Any) -> None:
    """Writes plain data and its checksum with `atomic_open`, for `read_json`."""
    atomic_write_text(path, dump_json(value))


def read_json(path: Path) -> Any:
    """What `write_json` wrote; an OSError if it can't be read, a ValueError if it was changed."""
    return parse_json(path.read_text(encoding="utf-8"), str(path))


def dump_json(value: Any) -> str:
    """Plain data and its checksum, for `parse_json`."""
    return json.dumps({"sha256": _digest(value), "value": value})


def parse_json(text: str, name: str) -> Any:
    """What `dump_json` was given; a ValueError, about `name`, if it was changed."""
    try:
        content = json.loads(text)
    except RecursionError as error:
        raise ValueError(f"{name} is nested too deeply") from error
    if not isinstance(content, dict) or content.get("sha256") != _digest(content.get("value")):
        raise ValueError(f"{name} does not match its checksum")
    return content["value"]


def read_limited(path: Path, max_bytes: int) -> bytes:
    """The content of a file, which may be a stranger's.

    Raises:
        OSError: there is no such file, or it can't be read.
        ValueError: it isn't a regular file, or it is too large.
    """
    if not stat.S_ISREG(path.stat().st_mode):  # a pipe or a device has no end
        raise ValueError(f"{path.name} is not a regular file")
    with path.open("rb") as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise ValueError(f"{path.name} is larger than {max_bytes / 1e6:,.0f} MB")
    return content


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def flush(file: IO[bytes]) -> None:
    """Writes to the disk itself: a renamed file is whole even after a power cut."""
    file.flush()
    os.fsync(file.fileno())


def _flush_folder(folder: Path) -> None:
    """Makes a new name survive a power cut, too; only POSIX can and must do this."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def remove_unfinished(folder: Path) -> None:
    """Removes files in `folder` that killed processes left half-written; its lock must be held."""
    for path in folder.glob(f".*{UNFINISHED}"):
        path.unlink(missing_ok=True)


@contextmanager
def locked(folder: Path, hint: str | None = None) -> Iterator[bool]:
    """Holds `folder` for this process; yields False where the file system has no locks.

    The lock goes with the process, however that ends. Raises a UserError, with `hint`, if another
    process holds it.
    """
    lock = FileLock(folder / "lock")
    try:
        lock.acquire(blocking=False)
    except Timeout as error:
        raise UserError(f"another process is using {folder}", hint=hint) from error
    except (OSError, NotImplementedError):
        pass  # no locks here
    try:
        yield lock.is_locked
    finally:
        lock.release()


@contextmanager
def held(path: Path, message: str | None = None, wait: bool = True) -> Iterator[bool]:
    """Holds the lock file `path`; yields False where there are no locks.

    Args:
        message: printed if another process holds it.
        wait: whether to wait for that one's end, however it ends; if not, False is yielded.
    """
    lock: FileLock | None = None
    with suppress(OSError, NotImplementedError, Timeout):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = FileLock(path)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            if not wait:
                raise
            if message:
                print(message, file=sys.stderr, flush=True)
            lock.acquire()
    try:
        yield lock is not None and lock.is_locked
    finally:
        if lock is not None:
            lock.release()


@contextmanager
def temporary_folder(parent: Path) -> Iterator[Path]:
    """A locked folder for unfinished work; whatever is still in it at the end is removed."""
    work = Path(tempfile.mkdtemp(prefix=TEMPORARY, dir=parent))
    try:
        with locked(work):
            yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def remove_abandoned(parent: Path) -> None:
    """Removes temporary folders of killed processes: old, and nobody holds their lock."""
    long_ago = time.time() - ABANDONED
    for work in parent.glob(f"{TEMPORARY}*"):
        with suppress(OSError, UserError):
            if work.stat().st_mtime < long_ago:  # one that has just been made isn't locked yet
                with locked(work) as is_held:
                    is_abandoned = is_held and work.stat().st_mtime < long_ago  # still unchanged
                if is_abandoned:
                    shutil.rmtree(work)


def cache_folder(cache: str | None) -> Path:
    """The folder for encoded texts, which need not exist; a UserError for an impossible name."""
    if cache is None:  # the platform's cache folder
        return platformdirs.user_cache_path("lit_gpt", appauthor=False)
    try:
        folder = Path(cache).expanduser()
        with suppress(OSError):
            folder.stat()
    except (RuntimeError, ValueError) as error:  # the home of an unknown user; a NUL character
        raise UserError("not a valid folder name", field="cache", value=cache) from error
    return folder
