"""Input files: which ones a path names, and their text, exactly and piece by piece.

Text that can't be read exactly is refused; what changes (byte-order marks, line ends) is counted.
"""

from __future__ import annotations

import codecs
import glob
import hashlib
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import IO

from lit_gpt.errors import UserError
from lit_gpt.text.documents import Format, format_of, read_documents, read_parquet, unpack

SAMPLE = "data/订单商品名称.csv"  # the text to train on unless another is named
CHUNK = 1 << 20  # bytes read at a time
COUNTED = ("removed_boms", "added_line_ends", "num_documents", "empty_documents")
BOMS = {  # removed from the start of a file by Python's own decoders
    "utf-8-sig": (codecs.BOM_UTF8,),
    "utf-16": (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE),
    "utf-32": (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE),
}


def find_files(paths: str | list[str]) -> list[Path]:
    """The files that the paths name, in that order: files, folders, globs ("texts/**/*.txt").

    A folder stands for all files in it and its subfolders, in the order of their names, and a glob
    for what it matches, also in that order; the name of an existing file or folder is never a glob.
    Hidden files and folders are skipped. Links are followed, and each real file and folder is read
    once, at the first of its names, so links may form a ring. Nothing else is skipped: what can't
    be read as text (a broken link, a pipe, a folder without permission) is an error.

    Raises:
        UserError: there are no files, or something among them can't be read.
    """
    found: dict[str, Path] = {}  # by real name
    for path in paths if isinstance(paths, list) else [paths]:
        files = [pair for root in _roots(path) for pair in _walk(root)]
        if not files:
            raise UserError(
                "no files in this folder", field="path", value=path, hint="name one with text files"
            )
        for place, real in files:
            found.setdefault(real, place)
    if not found:
        raise UserError("names no files", field="path", value=paths, hint="name a file or folder")
    return list(found.values())


def _roots(path: str) -> list[Path]:
    """The file or folder of this name, or what it matches as a glob."""
    try:
        root = Path(path).expanduser()
        os.stat(root if path else "")
    except PermissionError:
        pass  # _walk reports it
    except (OSError, RuntimeError, ValueError) as error:  # also an unknown user's ~, a NUL
        is_missing = isinstance(error, FileNotFoundError | NotADirectoryError)
        if is_missing and path == SAMPLE and (sample := _installed_sample()):
            return [sample]
        if not is_missing or not glob.has_magic(str(root)) or root.is_symlink():
            raise UserError("no such file or folder", field="path", value=path) from error
        if matches := sorted(map(Path, glob.glob(str(root), recursive=True))):
            return matches
        raise UserError("matches no files", field="path", value=path) from error
    return [root]


def _installed_sample() -> Path | None:
    """The sample text in the repository around this package, or where the wheel put it."""
    repository = Path(__file__).parents[2] / SAMPLE
    if repository.exists():
        return repository
    try:
        files = metadata.files("lit_gpt") or []
    except metadata.PackageNotFoundError:
        return None
    places = (Path(file.locate()) for file in files if file.name == Path(SAMPLE).name)
    return next(filter(Path.exists, places), None)


def _walk(root: Path) -> Iterator[tuple[Path, str]]:
    """Files, each with its real name."""
    seen: set[str] = set()
    todo = [(root, os.path.realpath(root))]
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
                    f"{place} is a pipe, a socket or a device", field="path", hint="name text files"
                )
        except OSError as error:
            is_broken = isinstance(error, FileNotFoundError) and place.is_symlink()
            reason = "the link is broken" if is_broken else error.strerror
            raise UserError(f"cannot read {place}: {reason}") from error


class Reader:
    """The text of some files, piece by piece, as often as it is iterated over.

    If any file has a format with documents, None follows each document, and every plain text among
    them is a document too. Otherwise there is only text, with a line end between two files.

    Args:
        files: as `find_files` returns them; their bytes are hashed at once, so that a change before
            or while they are read is noticed.
        encoding: of the files, by Python's name for it.
        text_field: the field or column that holds the documents, see `format_of`.

    Attributes:
        fingerprint: sha256 of the files' bytes and lengths and, except for plain text, of the way
            they are read.
        counts: of COUNTED, by the last iteration; see `CorpusInfo`.

    Raises:
        UserError: an unknown encoding, or no file with fields; while reading: no text, text in
            another encoding, NUL bytes, files that can't be read or have changed.
    """

    def __init__(self, files: list[Path], encoding: str, text_field: str | None = None) -> None:
        self.files = files
        self.encoding = encoding
        self.formats = [format_of(path, text_field) for path in files]
        self.has_documents = any(form.field is not None for form in self.formats)
        if text_field is not None and not self.has_documents:
            raise UserError(
                f"is for .jsonl, .csv, .tsv and .parquet files, and {self._place()} has none",
                field="text_field",
                value=text_field,
                hint="leave it out, or check what `path` names",
            )
        self.codec = _text_codec(encoding)
        self._begin()
        for path, form in zip(self.files, self.formats, strict=True):
            self._digest.update(form.label.encode())
            for _ in self._read_bytes(path):
                pass
        self.fingerprint = self._digest.hexdigest()

    def _begin(self) -> None:
        self._digest = hashlib.sha256()
        self.counts = dict.fromkeys(COUNTED, 0)

    def __iter__(self) -> Iterator[str | None]:
        self._begin()
        is_empty = True
        for part in self._documents() if self.has_documents else self._plain_text():
            is_empty = False
            yield part
        if self._digest.hexdigest() != self.fingerprint:
            raise UserError(f"{self._place()} changed while it was being read", hint="start again")
        if is_empty:
            raise UserError(
                f"no text in {self._place()}", field="path", hint="name a file that has some"
            )

    def _place(self) -> str:
        """The file itself, or the folder that all are in."""
        try:
            return os.path.commonpath(self.files) or "`path`"
        except ValueError:  # relative and absolute names
            return "`path`"

    def _plain_text(self) -> Iterator[str]:
        """Two files never share a line."""
        last = ""
        for path, form in zip(self.files, self.formats, strict=True):
            is_start = True
            for text in self._read(path, form):
                if is_start and last not in ("", "\n"):
                    self.counts["added_line_ends"] += 1
                    text = "\n" + text
                is_start = False
                last = text[-1]
                yield text

    def _documents(self) -> Iterator[str | None]:
        for path, form in zip(self.files, self.formats, strict=True):
            if form.kind == "text":
                is_empty = True
                for text in self._read(path, form):
                    is_empty = False
                    yield text
                if not is_empty:
                    self.counts["num_documents"] += 1
                    yield None
                continue
            if form.kind == "parquet":
                documents = self._read_parquet(path, form)
            else:
                documents = read_documents(path, form, self._read(path, form))
            for document in documents:
                if document:
                    self.counts["num_documents"] += 1
                    yield document
                    yield None
                else:
                    self.counts["empty_documents"] += 1

    def _read_parquet(self, path: Path, form: Format) -> Iterator[str]:
        """Its end is read first: a packed file is unpacked to disk, any other hashed afterwards."""
        if form.packed:
            with tempfile.TemporaryFile() as file:
                try:
                    for chunk in self._unpacked(path, form):
                        file.write(chunk)
                    file.seek(0)
                except OSError as error:
                    where = f"{path} in {tempfile.gettempdir()}"
                    raise UserError(f"cannot unpack {where}: {error.strerror}") from error
                yield from read_parquet(path, form, file)
            return
        with _opened(path) as file:
            yield from read_parquet(path, form, file)
        for _ in self._unpacked(path, form):  # so the hash is of what has been read
            pass

    def _read(self, path: Path, form: Format) -> Iterator[str]:
        """The text of one file, in non-empty parts, without its byte-order mark."""
        decoder = self.codec.incrementaldecoder()
        offset = 0
        is_start = True
        for chunk in self._unpacked(path, form):
            if offset == 0 and chunk and chunk.startswith(BOMS.get(self.codec.name, ())):
                self.counts["removed_boms"] += 1  # by the decoder
                is_start = False
            text = self._decode(decoder, chunk, path, offset)
            offset += len(chunk)
            if text and is_start:
                is_start = False
                if text[0] == "\ufeff":
                    self.counts["removed_boms"] += 1
                    text = text[1:]
            if text:
                yield text

    def _decode(self, decoder: codecs.IncrementalDecoder, chunk: bytes, path: Path, at: int) -> str:
        """The text of a chunk that begins `at` so many bytes; b"" ends the file."""
        pending = len(decoder.getstate()[0])  # bytes of a character that the last chunk began
        try:
            text = decoder.decode(chunk, final=not chunk)
            text.encode()  # fails on a lone surrogate, as utf-7 can write it
        except UnicodeDecodeError as error:
            guess = "gb18030" if self.codec.name == "utf-8" else "utf-8"
            if chunk.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                guess = "utf-16"
            elif b"\0" in chunk and not self.codec.name.startswith(("utf-16", "utf-32")):
                raise _looks_binary(path, at + chunk.find(b"\0")) from error
            raise UserError(
                f"{path} is not {self.encoding} text (byte 0x{error.object[error.start]:02x} at "
                f"offset {at - pending + error.start:,})",
                hint=f"name its encoding with `encoding` (perhaps {guess}), or convert it",
            ) from error
        except UnicodeEncodeError as error:
            raise UserError(f"{path} is not valid Unicode text: {error}") from error
        except UnicodeError as error:
            raise UserError(f"{path} is not {self.encoding} text: {error}") from error
        if "\0" in text:
            is_one_byte = text.count("\0") == chunk.count(b"\0")  # not so in UTF-16
            raise _looks_binary(path, at + chunk.find(b"\0") if is_one_byte else None)
        return text

    def _unpacked(self, path: Path, form: Format) -> Iterator[bytes]:
        """Chunks of what is in the file, the last b""."""
        self._digest.update(form.label.encode())
        chunks = self._read_bytes(path)
        return unpack(path, form.packed, chunks) if form.packed else chunks

    def _read_bytes(self, path: Path) -> Iterator[bytes]:
        """Chunks of the file, the last b""; every byte and the length go into the digest."""
        with _opened(path) as file:
            while chunk := file.read(CHUNK):
                self._digest.update(chunk)
                yield chunk
            self._digest.update(f"end {file.tell()}".encode())
            yield b""


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    try:
        with path.open("rb") as file:
            yield file
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error


def _text_codec(encoding: str) -> codecs.CodecInfo:
    try:
        codec = codecs.lookup(encoding)
        # Neither base64 nor rot13, nor the codecs of host names, which can't be read in parts.
        if codec._is_text_encoding and codec.name not in ("idna", "punycode"):
            return codec
    except (LookupError, ValueError):  # ValueError: a NUL in the name
        pass
    raise UserError(
        "unknown encoding", field="encoding", value=encoding, hint="try utf-8 or gb18030"
    )


def _looks_binary(path: Path, offset: int | None) -> UserError:
    where = "" if offset is None else f" at offset {offset:,}"
    return UserError(
        f"{path} looks like a binary file (NUL byte{where})",
        hint="`path` takes text files; set `encoding` to utf-16 for UTF-16 ones",
    )
