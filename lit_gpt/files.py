"""Owns text files: which ones a path names, and their text, piece by piece and exactly.

What can't be read exactly is refused; what is changed (byte-order marks, line ends) is counted.
"""

from __future__ import annotations

import codecs
import hashlib
import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path

from lit_gpt.errors import UserError

CHUNK = 1 << 20  # bytes read at a time

# What Python takes off the start of a file by itself.
BOMS = {
    "utf-8-sig": (codecs.BOM_UTF8,),
    "utf-16": (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE),
    "utf-32": (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE),
}


def find_files(path: str) -> list[Path]:
    """The file itself, or all files of a folder and its subfolders, in the order of their names.

    Hidden files and folders are left out. Links are followed, each real file and folder is read
    once, at the first of its names, so links may run in a ring. Nothing else is left out: what
    can't be read as text (a broken link, a pipe, a folder without permission) is an error.

    Raises:
        UserError: nothing there, or something in there that can't be read.
    """
    try:
        root = Path(path).expanduser()
        os.stat(root if path else "")
    except PermissionError:
        pass  # said below
    except (OSError, RuntimeError, ValueError) as error:  # ~ of nobody; a NUL character
        raise UserError(f"no such file or folder: {path!r} (--data.path)") from error
    files = list(_walk(root))
    if not files:
        raise UserError(f"no files in the folder {path!r}: give --data.path a text file or folder")
    return files


def _walk(root: Path) -> Iterator[Path]:
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
                yield place
            else:
                raise UserError(
                    f"{place} is a pipe, a socket or a device: give --data.path text files"
                )
        except OSError as error:
            lost = isinstance(error, FileNotFoundError) and place.is_symlink()
            reason = "it is a link to nothing" if lost else error.strerror
            raise UserError(f"cannot read {place}: {reason}") from error


def hash_files(files: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        for _ in _read_bytes(path, digest):
            pass
    return digest.hexdigest()


def _read_bytes(path: Path, digest) -> Iterator[bytes]:
    """Chunks of the file, the last b"", every byte and the file's end in the digest."""
    try:
        with path.open("rb") as file:
            while chunk := file.read(CHUNK):
                digest.update(chunk)
                yield chunk
            digest.update(f"end {file.tell()}".encode())
            yield b""
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error


class Reader:
    """Text of the files, chunk by chunk; at the end it must have been that of `fingerprint`.

    Raises:
        UserError: an unknown encoding; while reading: no text, text of another encoding, NUL
            bytes, files that can't be read or were changed.
    """

    def __init__(self, files: list[Path], encoding: str, fingerprint: str) -> None:
        self.files, self.encoding, self.fingerprint = files, encoding, fingerprint
        self.removed_boms = self.added_line_ends = 0
        try:
            self.codec = codecs.lookup(encoding)
            # Not base64 or rot13; nor those of host names, which can't be read in parts.
            if not self.codec._is_text_encoding or self.codec.name in ("idna", "punycode"):
                raise LookupError
        except (LookupError, ValueError) as error:  # the latter: a name with a NUL character
            raise UserError(
                f"unknown --data.encoding {encoding!r}: try utf-8 or gb18030"
            ) from error

    def __iter__(self) -> Iterator[str]:
        last, digest = "", hashlib.sha256()
        for path in self.files:
            begun = False
            for text in self._read(path, digest):
                if not begun and last not in ("", "\n"):
                    self.added_line_ends += 1
                    text = "\n" + text  # two files never run into one line
                begun, last = True, text[-1]
                yield text
        if last and digest.hexdigest() == self.fingerprint:
            return
        where = os.path.commonpath(self.files)  # the file itself, or the folder
        if digest.hexdigest() != self.fingerprint:
            raise UserError(f"{where} was changed while it was read: start again")
        raise UserError(f"no text in {where}: give --data.path a file that has some")

    def _read(self, path: Path, digest) -> Iterator[str]:
        """The text of one file, in parts that are not empty, without its byte-order mark."""
        decoder, offset, begun = self.codec.incrementaldecoder(), 0, False
        for chunk in _read_bytes(path, digest):
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
