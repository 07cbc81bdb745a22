"""Owns input files: which ones a path names, and their text, piece by piece and exactly.

What can't be read exactly is refused; what is changed (byte-order marks, line ends) is counted.
"""

from __future__ import annotations

import codecs
import glob
import hashlib
import os
import stat
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from lit_gpt.errors import UserError
from lit_gpt.text.documents import Format, format_of, read_documents, read_parquet, unpack

CHUNK = 1 << 20  # bytes read at a time

# What Python takes off the start of a file by itself.
BOMS = {
    "utf-8-sig": (codecs.BOM_UTF8,),
    "utf-16": (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE),
    "utf-32": (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE),
}


def find_files(paths: str | list[str]) -> list[Path]:
    """The files that the paths name, in that order: files, folders, globs ("texts/**/*.txt").

    A folder stands for all files in it and its subfolders, in the order of their names, and a glob
    for what it matches, in that order too; the name of a file or folder that is there is no glob.
    Hidden files and folders are left out. Links are followed, each real file and folder is read
    once, at the first of its names, so links may run in a ring. Nothing else is left out: what
    can't be read as text (a broken link, a pipe, a folder without permission) is an error.

    Raises:
        UserError: nothing there, or something in there that can't be read.
    """
    found: dict[str, Path] = {}  # by their real names
    for path in paths if isinstance(paths, list) else [paths]:
        roots = list(_roots(path))
        files = [pair for root in roots for pair in _walk(root)]
        if not files:
            raise UserError(
                f"no files in the folder {path!r}: give --data.path a text file or folder"
            )
        for place, real in files:
            found.setdefault(real, place)
    if not found:
        raise UserError("--data.path is an empty list: give it a text file or folder")
    return list(found.values())


def _roots(path: str) -> list[Path]:
    """The file or folder of that name, or what it matches as a glob."""
    try:
        root = Path(path).expanduser()
        os.stat(root if path else "")
    except PermissionError:
        pass  # _walk will say so
    except (OSError, RuntimeError, ValueError) as error:  # ~ of nobody; a NUL character
        missing = isinstance(error, FileNotFoundError | NotADirectoryError)
        if not missing or not glob.has_magic(str(root)) or root.is_symlink():
            raise UserError(f"no such file or folder: {path!r} (--data.path)") from error
        if matches := sorted(map(Path, glob.glob(str(root), recursive=True))):
            return matches
        raise UserError(f"no files match {path!r} (--data.path)") from error
    return [root]


def _walk(root: Path) -> Iterator[tuple[Path, str]]:
    """Files, and their real names."""
    seen, todo = set(), [(root, os.path.realpath(root))]  # the name that leads there, the real one
    while todo:
        place, real = todo.pop()
        try:
            if place.is_symlink():
                real = os.path.realpath(place)
            if real in seen:
                continue
            seen.add(real)
            mode = place.stat().st_mode
            if stat.S_ISDIR(mode):
                names = sorted(os.listdir(place), reverse=True)  # the last is popped first
                todo += [(place / x, os.path.join(real, x)) for x in names if x[0] != "."]
            elif stat.S_ISREG(mode):
                yield place, real
            else:
                raise UserError(
                    f"{place} is a pipe, a socket or a device: give --data.path text files"
                )
        except OSError as error:
            lost = isinstance(error, FileNotFoundError) and place.is_symlink()
            reason = "it is a link to nothing" if lost else error.strerror
            raise UserError(f"cannot read {place}: {reason}") from error


def hash_files(files: Iterable[Path], text_field: str | None = None) -> str:
    """Of their bytes and ends and, but for plain text, of the way they are read."""
    digest = hashlib.sha256()
    for path in files:
        digest.update(format_of(path, text_field).label.encode())
        for _ in _read_bytes(path, digest):
            pass
    return digest.hexdigest()


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    try:
        with path.open("rb") as file:
            yield file
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error


def _read_bytes(path: Path, digest) -> Iterator[bytes]:
    """Chunks of the file, the last b"", every byte and the file's end in the digest."""
    with _opened(path) as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            yield chunk
        digest.update(f"end {file.tell()}".encode())
        yield b""


def _common(files: list[Path]) -> str:
    """The name of the file itself, or of the folder that all are in."""
    try:
        return os.path.commonpath(files) or "--data.path"
    except ValueError:  # names from here and from the root
        return "--data.path"


class Reader:
    """Text of the files, piece by piece; at the end it must have been that of `fingerprint`.

    Where a file is of a format with documents, each document is followed by None, and each plain
    text among them is a document too. Elsewhere there is but text, a line end between two files.

    Args:
        text_field: the field or column that holds the documents; see `format_of`.

    Raises:
        UserError: an unknown encoding, no file with fields; while reading: no text, text of
            another encoding, NUL bytes, files that can't be read or were changed.
    """

    def __init__(
        self, files: list[Path], encoding: str, fingerprint: str, text_field: str | None = None
    ) -> None:
        self.files, self.encoding, self.fingerprint = files, encoding, fingerprint
        self.removed_boms = self.added_line_ends = self.num_documents = self.empty_documents = 0
        self.formats = [format_of(path, text_field) for path in files]
        self.has_documents = any(form.field is not None for form in self.formats)
        if text_field is not None and not self.has_documents:
            raise UserError(
                f"--data.text_field {text_field!r} is for .jsonl, .csv, .tsv and .parquet files, "
                f"and {_common(files)} has none: leave it out, or see what --data.path leads to"
            )
        try:
            self.codec = codecs.lookup(encoding)
            # Not base64 or rot13; nor those of host names, which can't be read in parts.
            if not self.codec._is_text_encoding or self.codec.name in ("idna", "punycode"):
                raise LookupError
        except (LookupError, ValueError) as error:  # the latter: a name with a NUL character
            raise UserError(
                f"unknown --data.encoding {encoding!r}: try utf-8 or gb18030"
            ) from error

    def __iter__(self) -> Iterator[str | None]:
        found, digest = False, hashlib.sha256()
        for part in self._documents(digest) if self.has_documents else self._lines(digest):
            found = True
            yield part
        same = digest.hexdigest() == self.fingerprint
        if found and same:
            return
        where = _common(self.files)
        if not same:
            raise UserError(f"{where} was changed while it was read: start again")
        raise UserError(f"no text in {where}: give --data.path a file that has some")

    def _lines(self, digest) -> Iterator[str]:
        """Plain text: two files never run into one line."""
        last = ""
        for path, form in zip(self.files, self.formats, strict=True):
            begun = False
            for text in self._read(path, form, digest):
                if not begun and last not in ("", "\n"):
                    self.added_line_ends += 1
                    text = "\n" + text
                begun, last = True, text[-1]
                yield text

    def _documents(self, digest) -> Iterator[str | None]:
        for path, form in zip(self.files, self.formats, strict=True):
            if form.kind == "text":
                begun = False
                for text in self._read(path, form, digest):
                    begun = True
                    yield text
                documents: Iterable[str] = ()
                if begun:
                    self.num_documents += 1
                    yield None
            elif form.kind == "parquet":
                documents = self._read_parquet(path, form, digest)
            else:
                documents = read_documents(path, form, self._read(path, form, digest))
            for document in documents:
                if document:
                    self.num_documents += 1
                    yield document
                    yield None
                else:
                    self.empty_documents += 1

    def _read_parquet(self, path: Path, form: Format, digest) -> Iterator[str]:
        """Its end is read first, so it must be whole: unpacked to a file, hashed apart."""
        if form.packed:
            with tempfile.TemporaryFile() as file:
                try:
                    for chunk in self._unpacked(path, form, digest):
                        file.write(chunk)
                    file.seek(0)
                except OSError as error:
                    where = f"{path} in {tempfile.gettempdir()}"
                    raise UserError(f"cannot unpack {where}: {error.strerror}") from error
                yield from read_parquet(path, form.field, file)
            return
        with _opened(path) as file:
            yield from read_parquet(path, form.field, file)
        digest.update(form.label.encode())
        for _ in _read_bytes(path, digest):  # after it: what was read is what is hashed
            pass

    def _unpacked(self, path: Path, form: Format, digest) -> Iterator[bytes]:
        digest.update(form.label.encode())
        chunks = _read_bytes(path, digest)
        return unpack(path, form.packed, chunks) if form.packed else chunks

    def _read(self, path: Path, form: Format, digest) -> Iterator[str]:
        """The text of one file, in parts that are not empty, without its byte-order mark."""
        decoder, offset, begun = self.codec.incrementaldecoder(), 0, False
        for chunk in self._unpacked(path, form, digest):
            if offset == 0 and chunk.startswith(BOMS.get(self.codec.name, ())) and chunk:
                self.removed_boms += 1  # by the decoder
                begun = True
            text = self._decode(decoder, chunk, path, offset)
            offset += len(chunk)
            if text and not begun:
                begun = True
                if text[0] == "\ufeff":
                    self.removed_boms += 1
                    text = text[1:]
            if text:
                yield text

    def _decode(self, decoder: codecs.IncrementalDecoder, chunk: bytes, path: Path, at: int) -> str:
        pending = len(decoder.getstate()[0])  # bytes of a character that the last chunk cut
        try:
            text = decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            where = at - pending + error.start
            guess = "gb18030" if self.codec.name == "utf-8" else "utf-8"
            if chunk.startswith((b"\xff\xfe", b"\xfe\xff")):
                guess = "utf-16"
            elif b"\0" in chunk and not self.codec.name.startswith(("utf-16", "utf-32")):
                raise _looks_binary(path, at + chunk.find(b"\0")) from error
            raise UserError(
                f"{path} is not {self.encoding} text (byte 0x{error.object[error.start]:02x} at "
                f"offset {where:,}): name its encoding with --data.encoding (perhaps {guess}), "
                "or convert it"
            ) from error
        except UnicodeError as error:
            raise UserError(f"{path} is not {self.encoding} text: {error}") from error
        if "\0" in text:
            alike = text.count("\0") == chunk.count(b"\0")  # not so in UTF-16
            raise _looks_binary(path, at + chunk.find(b"\0") if alike else None)
        try:
            text.encode()
        except UnicodeEncodeError as error:  # a lone surrogate, as utf-7 can write it
            raise UserError(f"{path} is not valid Unicode text: {error}") from error
        return text


def _looks_binary(path: Path, offset: int | None) -> UserError:
    where = "" if offset is None else f" at offset {offset:,}"
    return UserError(
        f"{path} looks like a binary file (NUL byte{where}): "
        "--data.path takes text files; UTF-16 ones need --data.encoding=utf-16"
    )
