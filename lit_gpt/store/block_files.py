"""Blocks of a store on this machine's disk, shared by its processes and bounded."""

from __future__ import annotations

import os
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
from filelock import FileLock

from lit_gpt.errors import UserError
from lit_gpt.storage import ABANDONED, UNFINISHED

LOCKS = 64  # files, each for many blocks
CRC = 4  # bytes at the end of a file


class BlockFiles:
    """Files with the ids of a block and their CRC-32, in a folder for one store.

    A process that needs a block waits where another one is fetching it. The block that was used
    least recently is removed once there are more than `most`; a process that reads it keeps it.

    Args:
        dtype: of the ids.
        most: files kept.

    Raises:
        UserError: the folder can't be made.
    """

    def __init__(self, folder: Path, dtype: np.dtype, most: int) -> None:
        self.folder = folder
        self.dtype = dtype
        self.most = most
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)  # a text may be private
        except OSError as error:
            raise self._refused(error) from error

    def load(self, span: tuple[int, int], fetch: Callable[[], np.ndarray]) -> np.ndarray:
        """Tokens of a span, from the file or, if it is missing or damaged, from `fetch`."""
        path = self.folder / f"{span[0]}-{span[1]}.block"
        with self._locked(span[0]):
            ids = self._open(path, span[1] - span[0])
            if ids is None:
                ids = fetch()
                try:
                    self._write(path, ids)
                except OSError as error:
                    raise self._refused(error) from error
                self._remove_oldest()
                found = self._open(path, len(ids))
                ids = ids if found is None else found  # another process may have removed it
        return ids

    def _open(self, path: Path, num_tokens: int) -> np.ndarray | None:
        """None if there is no such file, or it is not what was written."""
        with suppress(OSError, ValueError):
            content = np.memmap(path, np.uint8, mode="r")
            ids = content[:-CRC]
            is_whole = len(ids) == num_tokens * self.dtype.itemsize
            if is_whole and zlib.crc32(ids.data) == int.from_bytes(content[-CRC:], "little"):
                os.utime(path)
                return np.asarray(ids).view(self.dtype)
        return None

    def _write(self, path: Path, ids: np.ndarray) -> None:
        content = np.ascontiguousarray(ids, self.dtype).tobytes()
        new = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}{UNFINISHED}")
        try:
            with new.open("wb") as file:
                file.write(content + zlib.crc32(content).to_bytes(CRC, "little"))
            new.replace(path)
        finally:
            new.unlink(missing_ok=True)

    def _remove_oldest(self) -> None:
        found = []
        for path in self.folder.iterdir():
            with suppress(OSError):  # another process is faster
                changed = path.stat().st_mtime
                if path.suffix == ".block":
                    found.append((changed, path))
                elif path.suffix == UNFINISHED and changed < time.time() - ABANDONED:
                    path.unlink()  # of a killed process
        for _, path in sorted(found)[: -self.most]:
            with suppress(OSError):  # Windows keeps a file that is in use
                path.unlink()

    @contextmanager
    def _locked(self, number: int) -> Iterator[None]:
        """Waits for other processes and threads; does not where the file system has no locks."""
        lock = FileLock(self.folder / f"lock-{number % LOCKS}", thread_local=False)
        with suppress(OSError, NotImplementedError):
            lock.acquire()
        try:
            yield
        finally:
            lock.release()

    def _refused(self, error: OSError) -> UserError:
        return UserError(
            f"cannot keep blocks in {self.folder}: {error.strerror}",
            field="cache",
            hint="name another folder",
        )
