"""The files in .zip and .tar archives, one after the other: nothing is written to disk."""

from __future__ import annotations

import tarfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from lit_gpt.errors import UserError

KINDS = ("zip", "tar")
CHUNK = 1 << 20  # bytes of a file, read at a time
MAX_HEADER = 1 << 24  # bytes of a header of a .tar file, such as a name
BLOCK = 512  # bytes of a .tar file; two empty ones end it

Member = tuple[str, Iterator[bytes]]  # the name of a file, and its chunks, the last b""


def read_members(path: Path, kind: str, chunks: Iterable[bytes]) -> Iterator[Member]:
    """The files in an archive, except hidden ones and links.

    Those of a .zip are in the order of a folder, those of a .tar as they come: it is read once.

    Args:
        kind: one of KINDS.
        chunks: of the archive, unpacked, the last b""; a .zip is opened by its path instead.

    Raises:
        UserError: it is damaged or encrypted, or a file in it is compressed in an unusual way.
    """
    members = _read_zip(path) if kind == "zip" else _read_tar(path, chunks)
    for name, content in members:
        parts = [part for part in name.replace("\\", "/").split("/") if part not in ("", ".")]
        if not any(part.startswith(".") and part != ".." for part in parts):
            yield "".join(c if c.isprintable() else "?" for c in "/".join(parts)), content


@contextmanager
def _one_line(path: Path, kind: str) -> Iterator[None]:
    """What a damaged archive raises, as a UserError."""
    try:
        yield
    except (
        *(zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError, NotImplementedError),
        *(ValueError, OSError),  # an invalid number in a header; bzip2: "Invalid data stream"
    ) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"{path} is not a valid .{kind} file ({reason}): it is damaged or in another format"
        ) from error


def _read_zip(path: Path) -> Iterator[Member]:
    with _one_line(path, "zip"), zipfile.ZipFile(path) as archive:
        files = [info for info in archive.infolist() if not info.is_dir()]
        for info in sorted(files, key=lambda info: info.filename.split("/")):
            yield info.filename, _read_zipped(path, archive, info)


def _read_zipped(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Iterator[bytes]:
    if info.flag_bits & 1:
        raise UserError(f"{path} is encrypted", hint="unpack it with its password")
    # zipfile unpacks others without a limit.
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise UserError(
            f"{path} is compressed in an unusual way ({info.filename!r} by method "
            f"{info.compress_type})",
            hint="unpack it",
        )
    with _one_line(path, "zip"), archive.open(info) as file:
        while chunk := file.read(CHUNK):
            yield chunk
    yield b""


class _Stream:
    """Chunks as a file that is read forwards; remembers the last block."""

    def __init__(self, chunks: Iterable[bytes]) -> None:
        self.chunks = iter(chunks)
        self.buffer = b""
        self.at = 0
        self.block = b""

    def tell(self) -> int:
        return self.at

    def seek(self, at: int) -> None:
        while self.at < at and self.read(min(at - self.at, CHUNK)):
            pass

    def read(self, size: int) -> bytes:
        if not 0 <= size <= MAX_HEADER:
            raise tarfile.ReadError(f"a header of {size:,} bytes")
        parts = []
        missing = size
        while missing and (self.buffer or self._fill()):
            parts.append(self.buffer[:missing])
            self.buffer = self.buffer[missing:]
            missing -= len(parts[-1])
        content = b"".join(parts)
        self.at += len(content)
        self.block = content
        return content

    def _fill(self) -> bytes:
        self.buffer = next(self.chunks, b"")
        return self.buffer


def _read_tar(path: Path, chunks: Iterable[bytes]) -> Iterator[Member]:
    stream: Any = _Stream(chunks)
    with _one_line(path, "tar"):
        archive: Any = tarfile.TarFile(fileobj=stream)
    while True:
        with _one_line(path, "tar"):
            info = archive.next()
            archive.members = []  # or all would be kept
        if info is None:
            break
        if info.isreg():
            with _one_line(path, "tar"):
                file = archive.extractfile(info)
            yield info.name, _read_file(path, file)
    # tarfile takes a damaged header for the end.
    is_end = stream.block.strip(b"\0") == b"" and len(stream.block) in (0, BLOCK)
    while rest := stream.read(CHUNK):
        is_end = is_end and not rest.strip(b"\0")
    if not is_end:
        raise UserError(f"{path} is damaged or truncated", hint="get the file again")


def _read_file(path: Path, file: IO[bytes]) -> Iterator[bytes]:
    with _one_line(path, "tar"):
        while chunk := file.read(CHUNK):
            yield chunk
    yield b""
