"""Input files: which ones a path names, and their text, piece by piece, exactly or not at all."""

from __future__ import annotations

import codecs
import glob
import hashlib
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

from lit_gpt.errors import UserError
from lit_gpt.text.compression import unpack
from lit_gpt.text.documents import Format, format_of, read_rows
from lit_gpt.text.fields import text_of
from lit_gpt.text.parquet_rows import read_parquet
from lit_gpt.text.windows import Store

SAMPLE = "data/订单商品名称.csv"  # the text to train on unless another is named
CHUNK = 1 << 20  # bytes read at a time
COUNTED = (
    "removed_boms",
    "added_line_ends",
    "num_documents",
    "empty_documents",
    "blank_lines",
    "row_like_fields",
)
BOMS = {  # removed from the start of a file by Python's own decoders
    "utf-8-sig": (codecs.BOM_UTF8,),
    "utf-16": (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE),
    "utf-32": (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE),
}


def find_files(paths: str | list[str]) -> list[Path]:
    """The files that the paths name, in that order: files, folders, globs ("texts/**/*.txt").

    A folder stands for all files in it and its subfolders, and a glob for what it matches, both in
    the order of their names; the name of an existing file or folder is never a glob. Hidden files
    and folders are skipped. Links are followed, and each real file and folder is read once, at the
    first of its names, so links may form a ring.

    Raises:
        UserError: there are no files, or among them is one that can't be read: a broken link, a
            pipe, a folder without permission.
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
        problem = "no such file or folder"
        if isinstance(error, FileNotFoundError | NotADirectoryError):
            if path == SAMPLE and (sample := _installed_sample()):
                return [sample]
            if glob.has_magic(str(root)) and not root.is_symlink():
                problem = "matches no files"
                if matches := sorted(map(Path, glob.glob(str(root), recursive=True))):
                    return matches
        raise UserError(problem, field="path", value=path) from error
    return [root]


def _installed_sample() -> Path | None:
    """The sample text in the repository around this package, or where the wheel put it."""
    places = [Path(__file__).parents[2] / SAMPLE]
    with suppress(metadata.PackageNotFoundError):
        files = metadata.files("lit_gpt") or []
        places += [Path(file.locate()) for file in files if file.name == places[0].name]
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
        files: as `find_files` returns them; hashed at once, so that later changes are noticed.
        encoding: of the files, as a Python codec name.
        text_field: the field or column that holds the documents, or several, see `text_of`.
        tsv_quotes: whether fields of .tsv files may be in double quotes.

    Attributes:
        fingerprint: sha256 of the files' bytes and lengths, and of formats other than plain text.
        counts: of COUNTED, by the last iteration; see `CorpusInfo`.

    Raises:
        UserError: an unknown encoding, or no file with fields; while reading: no text, text in
            another encoding, NUL bytes, files that can't be read or have changed.
    """

    def __init__(
        self,
        files: list[Path],
        encoding: str,
        text_field: str | list[str] | None = None,
        tsv_quotes: bool = False,
    ) -> None:
        if text_field == []:
            raise UserError("names no field", field="text_field", value=text_field)
        self.files = [(path, format_of(path, text_field, tsv_quotes)) for path in files]
        self.encoding = encoding
        self.has_documents = any(form.kind != "text" for _, form in self.files)
        if text_field is not None and not self.has_documents:
            raise UserError(
                f"is for .json(l), .csv, .tsv and .parquet files, and {self._place()} has none",
                field="text_field",
                value=text_field,
                hint="leave it out, or check what `path` names",
            )
        self.codec = _text_codec(encoding)
        self._begin()
        for path, form in self.files:
            for _ in self._read_bytes(path, form):
                pass
        self.fingerprint = self._digest.hexdigest()

    def _begin(self) -> None:
        self._digest = hashlib.sha256()
        self.counts = dict.fromkeys(COUNTED, 0)

    def __iter__(self) -> Iterator[str | None]:
        self._begin()
        is_empty = True
        for part in self._parts():
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
        with suppress(ValueError):  # relative and absolute names
            return os.path.commonpath([path for path, _ in self.files]) or "`path`"
        return "`path`"

    def _parts(self) -> Iterator[str | None]:
        """Text, with None after each document; two plain files never share a line."""
        last = ""  # character of the plain text so far
        for path, form in self.files:
            if form.kind != "text":
                yield from self._documents(path, form)
                continue
            is_empty = True
            for text in self._read(path, form):
                if is_empty and last not in ("", "\n"):
                    self.counts["added_line_ends"] += 1
                    text = "\n" + text
                is_empty = False
                last = "" if self.has_documents else text[-1]
                yield text
            if self.has_documents and not is_empty:
                self.counts["num_documents"] += 1
                yield None

    def _documents(self, path: Path, form: Format) -> Iterator[str | None]:
        if form.kind == "parquet":
            rows = self._read_parquet(path, form)
        else:
            rows = read_rows(path, form, self._read(path, form), self.counts)
        for where, row, store in rows:
            is_empty = True
            for piece in text_of(row, form.fields, where, store):
                is_empty = False
                yield piece
            self.counts["empty_documents" if is_empty else "num_documents"] += 1
            if not is_empty:
                yield None

    def _read_parquet(self, path: Path, form: Format) -> Iterator[tuple[str, Any, Store]]:
        """Arrow reads the end first: a packed file is unpacked to disk, any other hashed later."""
        if not form.packed:
            yield from read_parquet(path, form.fields, path)
            for _ in self._read_bytes(path, form):
                pass
            return
        with tempfile.TemporaryFile() as file:
            try:
                file.writelines(self._unpacked(path, form))
                file.seek(0)
            except OSError as error:
                where = f"{path} in {tempfile.gettempdir()}"
                raise UserError(f"cannot unpack {where}: {error.strerror}") from error
            yield from read_parquet(path, form.fields, file)

    def _read(self, path: Path, form: Format) -> Iterator[str]:
        """The text of one file, in non-empty parts, without its byte-order mark."""
        decoder = self.codec.incrementaldecoder()
        offset = 0
        is_start = True
        for chunk in self._unpacked(path, form):
            text = self._decode(decoder, chunk, path, offset)
            if offset == 0 and chunk.startswith(BOMS.get(self.codec.name, ())):
                self.counts["removed_boms"] += 1  # by the decoder
                is_start = False
            offset += len(chunk)
            if is_start and text.startswith("\ufeff"):
                self.counts["removed_boms"] += 1
                text = text[1:]
                is_start = False
            if text:
                is_start = False
                yield text

    def _decode(self, decoder: codecs.IncrementalDecoder, chunk: bytes, path: Path, at: int) -> str:
        """The text of a chunk that begins `at` so many bytes; b"" ends the file."""
        pending = len(decoder.getstate()[0])  # bytes of a character that the last chunk began
        is_wide = self.codec.name.startswith(("utf-16", "utf-32"))  # has NUL bytes
        nul = -1 if is_wide else chunk.find(b"\0")
        try:
            text = decoder.decode(chunk, final=not chunk)
            text.encode()  # fails on a lone surrogate, as utf-7 can write it
            if "\0" not in text:
                return text
        except UnicodeDecodeError as error:
            guess = "gb18030" if self.codec.name == "utf-8" else "utf-8"
            if chunk.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                guess = "utf-16"
            if nul < 0 or guess == "utf-16":
                raise UserError(
                    f"{path} is not {self.encoding} text (byte 0x{error.object[error.start]:02x} "
                    f"at offset {at - pending + error.start:,})",
                    hint=f"name its encoding with `encoding` (perhaps {guess}), or convert it",
                ) from error
        except UnicodeError as error:
            raise UserError(f"{path} is not {self.encoding} text: {error}") from error
        where = "" if nul < 0 else f" at offset {at + nul:,}"
        raise UserError(
            f"{path} looks like a binary file (NUL byte{where})",
            hint="`path` takes text files; set `encoding` to utf-16 for UTF-16 ones",
        )

    def _unpacked(self, path: Path, form: Format) -> Iterator[bytes]:
        """Chunks of what is in the file, the last b""."""
        chunks = self._read_bytes(path, form)
        return unpack(path, form.packed, chunks) if form.packed else chunks

    def _read_bytes(self, path: Path, form: Format) -> Iterator[bytes]:
        """Chunks of the file, the last b""; format, bytes and length go into the digest."""
        self._digest.update(form.label.encode())
        try:
            with path.open("rb") as file:
                while chunk := file.read(CHUNK):
                    self._digest.update(chunk)
                    yield chunk
                self._digest.update(f"end {file.tell()}".encode())
                yield b""
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from error


def _text_codec(encoding: str) -> codecs.CodecInfo:
    with suppress(LookupError, ValueError):  # ValueError: a NUL in the name
        codec = codecs.lookup(encoding)
        # Neither base64 nor rot13, nor the codecs of host names, which can't be read in parts.
        if codec._is_text_encoding and codec.name not in ("idna", "punycode"):
            return codec
    raise UserError(
        "unknown encoding", field="encoding", value=encoding, hint="try utf-8 or gb18030"
    )
