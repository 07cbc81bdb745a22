"""Whether the files of a text are those that were read before, without reading them again.

As git does with its index, what is compared is each file's size, times and inode. A file that was
changed just before it was read is not trusted: a change within the same tick of the clock would
leave its times as they are (git's documentation calls this the racy problem).
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from lit_gpt import storage

VERSION = 1  # part of the name of each manifest: raise it when what is stored changes
SETTLED = 2_000_000_000  # ns: no clock of a file system is coarser than FAT's two seconds
LARGE = 1 << 24  # bytes: less is read in a hundredth of a second
MANY = 1000  # files
FOLDER = "texts"  # in the cache: manifests and locks


class Known(NamedTuple):
    """What is otherwise found by reading a text.

    Args:
        fingerprint: see `Reader`.
        has_documents: see `Reader`.
        excluded: files in archives that were left out, by glob.
        is_chat: see `Reader`; None of what earlier releases found.
    """

    fingerprint: str
    has_documents: bool
    excluded: dict[str, int]
    is_chat: bool | None = None


class Stamps:
    """Size, times and inode of each file of a text.

    Attributes:
        num_files: how many there are.
        size: of all together, in bytes.
        is_settled: whether a later change of any would show in its times.
    """

    def __init__(self) -> None:
        self._digest = hashlib.sha256()
        self.num_files = 0
        self.size = 0
        self.is_settled = True

    @classmethod
    def of(cls, paths: Iterable[Path]) -> Stamps:
        """Those of the files now; an OSError names the one that can't be looked at."""
        stamps = cls()
        for path in paths:
            stamps.add(path.name, os.stat(path))
        return stamps

    def add(self, name: str, stat: os.stat_result) -> None:
        """Adds the next file; before it is read, or `is_settled` would promise too much."""
        # Inodes and the time of the last change of these, which nobody can set back, tell a file
        # that took the place of another of its size and age.
        stamp = (name, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino)
        self._digest.update(repr(stamp).encode("utf-8", "surrogatepass"))
        self.num_files += 1
        self.size += stat.st_size
        self.is_settled = self.is_settled and is_settled(stat)

    @property
    def digest(self) -> str:
        return self._digest.hexdigest()

    @property
    def is_large(self) -> bool:
        """Whether reading the files takes so long that it is worth remembering."""
        return self.size >= LARGE or self.num_files >= MANY


def is_settled(stat: os.stat_result) -> bool:
    """Whether a file was last changed so long ago that another change would show."""
    now = time.time_ns()
    changed = stat.st_ctime_ns
    if stat.st_mtime_ns <= now:  # a time in the future was set by hand
        changed = max(changed, stat.st_mtime_ns)
    return changed + SETTLED <= now


class Manifest:
    """What was found when the text of some settings was last read; in a file of the cache.

    Args:
        cache: the folder for encoded texts.
        settings: plain data: which files are read, and how.
    """

    def __init__(self, cache: Path, settings: object) -> None:
        name = hashlib.sha256(json.dumps([VERSION, settings]).encode()).hexdigest()[:24]
        self._path = cache / FOLDER / f"{name}.json"
        self._saved = ""  # digest of the stamps in the file

    def known(self, stamps: Stamps) -> Known | None:
        """What was found in these very files; None if any is new, gone or changed."""
        if not stamps.is_large:
            return None
        with suppress(OSError, ValueError, LookupError, TypeError):
            value = storage.read_json(self._path)
            if value["files"] == stamps.digest:
                self._saved = stamps.digest
                return Known(**value["known"])
        return None

    def save(self, stamps: Stamps, known: Known) -> None:
        """Keeps what was found in files that had these stamps, if they are settled."""
        if not (stamps.is_large and stamps.is_settled) or stamps.digest == self._saved:
            return
        with suppress(OSError):  # as in a cache that may only be read
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            storage.write_json(self._path, {"files": stamps.digest, "known": known._asdict()})
            self._saved = stamps.digest

    def forget(self) -> None:
        """After the files turned out to be others."""
        with suppress(OSError):
            self._path.unlink(missing_ok=True)
