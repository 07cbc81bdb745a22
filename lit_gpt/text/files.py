"""The text of input files, piece by piece, exactly or not at all."""

from __future__ import annotations

import codecs
import hashlib
import json
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

from lit_gpt.errors import UserError
from lit_gpt.text import archives, encodings
from lit_gpt.text.answers import LossOn
from lit_gpt.text.compression import unpack
from lit_gpt.text.conversations import (
    PLAIN_TEXT,
    WANTED,
    Conversation,
    has_conversation,
    read_conversation,
)
from lit_gpt.text.documents import Format, format_of, read_rows
from lit_gpt.text.fields import text_of
from lit_gpt.text.finding import find_files, is_member_excluded
from lit_gpt.text.manifest import Known, Manifest, Stamps
from lit_gpt.text.parquet_rows import read_parquet
from lit_gpt.text.progress import progress
from lit_gpt.text.windows import Store

Part = TypeVar("Part")
CHUNK = 1 << 17  # bytes read at a time; with more, freed memory stays with the process
COUNTED = {  # while a text is read: fields of CorpusInfo, and how people read them
    "num_documents": "Documents",
    "empty_documents": "Empty documents skipped",
    "blank_lines": "Blank lines skipped",
    "row_like_fields": "Quoted fields over lines that look like rows",
    "removed_boms": "Byte-order marks removed",
    "added_line_ends": "Line breaks added between files",
    "file_ends": "End-of-text tokens between files",
}
BOMS = {  # removed from the start of a file by Python's own decoders
    "utf-8-sig": (codecs.BOM_UTF8,),
    "utf-16": (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE),
    "utf-32": (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE),
}


@dataclass(frozen=True)
class TextFiles:
    """The text to read, and how.

    Args:
        path: text file, folder of them, glob, or list of such.
        exclude: files of folders, globs and archives to leave out, by glob.
        encoding: of the files.
        text_field: field or column that holds the documents, or a list of them.
        tsv_quotes: true if fields of .tsv files may be in double quotes.
        cache: folder for encoded text; default: the platform's cache folder.
        loss_on: which tokens of conversations count: answers or all; default: answers, where rows
            have `messages`, or `prompt` and `completion`, instead of a text.
    """

    path: str | list[str]
    exclude: str | list[str] | None = None
    encoding: str = "utf-8"
    text_field: str | list[str] | None = None
    tsv_quotes: bool = False
    cache: str | None = None
    loss_on: LossOn | None = None

    @property
    def settings(self) -> list[Any]:
        """Plain data that decides which files are read, and how."""
        paths = self.path if isinstance(self.path, list) else [self.path]
        places = [os.path.abspath(os.path.expanduser(path)) for path in paths]
        settings = [places, self.exclude, self.text_field, self.tsv_quotes]
        return settings if self.loss_on is None else [*settings, self.loss_on]


class Reader:
    """The text of some files, piece by piece, as often as it is iterated over.

    If any file has a format with documents, None follows each document, and every plain text among
    them is a document too. Otherwise there is only text, with None between two files.

    Args:
        text: its files are found and hashed at once, so that later changes are noticed.
        needs_fields: whether to refuse `text_field` if no file has fields.
        manifest: of earlier reading; files that it knows are not hashed until they are read.
        known: what another process found just now; then the files are not even looked for.
        ends_files: whether there is None between two files of plain text; if not, a line end.

    Attributes:
        fingerprint: sha256 of the files' bytes and lengths, and of formats other than plain text.
        counts: of COUNTED, by the last iteration; see `CorpusInfo`.
        excluded: files and folders that were left out, by glob.
        task: what reading the text is for, as the progress bar says it.

    Raises:
        UserError: no files, an unknown encoding, or no file with fields; while reading: no text,
            text in another encoding, NUL bytes, files that can't be read or have changed.
    """

    def __init__(
        self,
        text: TextFiles,
        needs_fields: bool = True,
        manifest: Manifest | None = None,
        known: Known | None = None,
        ends_files: bool = True,
    ) -> None:
        if text.text_field == []:
            raise UserError("names no field", field="text_field", value=[])
        self.excluded: Counter[str] = Counter()
        self.format_of = partial(format_of, text_field=text.text_field, tsv_quotes=text.tsv_quotes)
        self.encoding = text.encoding
        self.ends_files = ends_files
        self.task = "Reading the text"
        self._text = text
        self._manifest = manifest
        self._advance: Callable[[int], None] = lambda num_bytes: None
        self._stamps_read = Stamps()
        self._begin()
        self._is_told = known is not None
        if known is None:
            stamps = self.stamps  # finds the files
            known = manifest.known(stamps) if manifest is not None else None
        if known is not None:
            self.fingerprint, self.has_documents, _, is_chat = known
            if is_chat is not None:
                self.is_chat = is_chat
            self.excluded.update(known.excluded)
        if text.text_field is not None and needs_fields and not self.has_documents:
            raise no_fields(text.text_field, self._place())
        self.codec = _text_codec(text.encoding)
        if known is None:
            self._hash()

    @cached_property
    def paths(self) -> list[Path]:
        # What another process found is counted already.
        counted: Counter[str] = Counter() if self._is_told else self.excluded
        paths = find_files(self._text.path, self._text.exclude, counted)
        self._found_excluded = counted.copy()
        return paths

    @cached_property
    def files(self) -> list[tuple[Path, Format]]:
        return [(path, self.format_of(path)) for path in self.paths]

    @cached_property
    def stamps(self) -> Stamps:
        """Of the files, before any was read."""
        try:
            return Stamps.of(self.paths)
        except OSError as error:
            raise UserError(f"cannot read {error.filename}: {error.strerror}") from error

    def _hash(self) -> None:
        self._begin()
        with self._pass():
            for path, form in self.files:
                for _ in self._read_bytes(path, form):
                    pass
        self.fingerprint = self._digest.hexdigest()
        self._remember()

    @contextmanager
    def _pass(self) -> Iterator[None]:
        """Shows how much of the text has been read inside the block."""
        with progress(self.task, self.stamps.size) as self._advance:
            yield

    @property
    def known(self) -> Known:
        """What another process need not read the text for."""
        return Known(self.fingerprint, self.has_documents, dict(self.excluded), self.is_chat)

    def _remember(self) -> None:
        """Keeps what was found in the files as they were when they were last read."""
        if self._manifest is not None:
            stamps = self._stamps_read
            self._stamps_read = Stamps()  # of what is read to look for documents
            known = self.known
            in_archives = self.excluded.copy()
            in_archives.subtract(self._found_excluded)
            self._manifest.save(stamps, known._replace(excluded=dict(in_archives)))

    @cached_property
    def has_documents(self) -> bool:
        """Looked up before the text is read: a .tar shows its files only as it is read."""
        kinds = (form.kind for _, form, _ in self._sources(self.excluded))
        # Without globs, the first will do; with some, all that is left out is counted.
        return any(kind != "text" for kind in (list(kinds) if self.excluded else kinds))

    def _sources(self, excluded: Counter[str]) -> Iterator[tuple[Path, Format, Iterator[bytes]]]:
        """The files, those in archives among them, and their chunks as they are stored.

        Args:
            excluded: globs of files in archives to leave out, which are counted here.
        """
        for path, form in self.files:
            if form.kind not in archives.KINDS:
                yield path, form, self._read_bytes(path, form)
                continue
            content = self._unpacked(path, form, self._read_bytes(path, form))
            for name, chunks in archives.read_members(path, form.kind, content):
                inside = Path(f"{path}/{name}")
                if is_member_excluded(name, excluded):
                    continue
                if self.format_of(inside).kind in archives.KINDS:
                    problem = f"{inside} is an archive in an archive"
                    raise UserError(problem, hint=f"unpack {path}")
                yield inside, self.format_of(inside), chunks
            for _ in content:  # a .zip is read elsewhere, and now hashed
                pass

    def _begin(self) -> None:
        self._digest = hashlib.sha256()
        self._stamps_read = Stamps()
        self.counts = dict.fromkeys(COUNTED, 0)

    def __iter__(self) -> Iterator[str | None]:
        return self._checked(self._parts())

    def conversations(self) -> Iterator[Conversation]:
        """The rows of a text that `is_chat`."""
        return self._checked(self._conversations())

    def _checked(self, parts: Iterator[Part]) -> Iterator[Part]:
        """All of the text, which must be what it was."""
        is_empty = True
        with self._pass():
            for part in parts:
                is_empty = False
                yield part
        if self._digest.hexdigest() != self.fingerprint:
            if self._manifest is not None:
                self._manifest.forget()
            raise UserError(f"{self._place()} changed while it was being read", hint="start again")
        if is_empty:
            raise UserError(
                f"no text in {self._place()}", field="path", hint="name a file that has some"
            )
        self._remember()

    def beginning(self) -> Iterator[str | None]:
        """The text, of which not all need be read; a change meanwhile is not noticed."""
        return self._parts()

    def _place(self) -> str:
        """The file itself, or the folder that all are in."""
        with suppress(ValueError):  # relative and absolute names
            return os.path.commonpath(self.paths) or "`path`"
        return "`path`"

    def _parts(self) -> Iterator[str | None]:
        """Text, with None after each document; two plain files never share a line."""
        if self.is_chat:
            for conversation in self._conversations():
                yield conversation.text
                yield None
            return
        has_documents = self.has_documents
        self._begin()
        last = ""  # character of the plain text so far
        for path, form, chunks in self._sources(self.excluded.copy()):
            if form.kind != "text":
                yield from self._documents(path, form, chunks)
                continue
            is_empty = True
            for text in self._read(path, form, chunks):
                if is_empty and last and self.ends_files:
                    self.counts["file_ends"] += 1
                    yield None
                elif is_empty and last not in ("", "\n"):
                    self.counts["added_line_ends"] += 1
                    text = "\n" + text
                is_empty = False
                last = "" if has_documents else text[-1]
                yield text
            if has_documents and not is_empty:
                self.counts["num_documents"] += 1
                yield None

    def _documents(self, path: Path, form: Format, chunks: Iterator[bytes]) -> Iterator[str | None]:
        for where, row, store in self._rows(path, form, chunks):
            is_empty = True
            for piece in text_of(row, form.fields, where, store):
                is_empty = False
                yield piece
            self.counts["empty_documents" if is_empty else "num_documents"] += 1
            if not is_empty:
                yield None

    def _rows(
        self, path: Path, form: Format, chunks: Iterator[bytes]
    ) -> Iterator[tuple[str, Any, Store]]:
        if form.kind == "parquet":
            return self._read_parquet(path, form, chunks)
        return read_rows(path, form, self._read(path, form, chunks), self.counts)

    @cached_property
    def is_chat(self) -> bool:
        """Whether the rows are conversations, as the first one says; looked up like documents."""
        loss_on = self._text.loss_on
        is_chat = False
        if self.has_documents and (self._text.text_field is None or loss_on is not None):
            found = self._chat_rows(self.excluded.copy())
            rows = (row for row in found if row[1] is not PLAIN_TEXT)
            is_chat = next((has_conversation(*row, loss_on) for row in rows), False)
        if loss_on == "answers" and not is_chat:
            problem = "there are no conversations in the text"
            raise UserError(problem, field="loss_on", value=loss_on, hint=WANTED)
        return is_chat

    @property
    def loss_on(self) -> LossOn:
        """Which tokens of conversations count."""
        return self._text.loss_on or "answers"

    def _chat_rows(
        self, excluded: Counter[str]
    ) -> Iterator[tuple[str, Any, tuple[str, ...], Store]]:
        """Where each row is, the row, the fields that hold its conversation, and its strings."""
        is_named = self._text.text_field is not None
        for path, form, chunks in self._sources(excluded):
            if form.kind == "text":
                yield str(path), PLAIN_TEXT, (), Store(path)
                continue
            form = form if is_named else replace(form, fields=())
            for where, row, store in self._rows(path, form, chunks):
                yield where, row, form.fields, store

    def _conversations(self) -> Iterator[Conversation]:
        assert self.is_chat
        self._begin()
        for where, row, fields, store in self._chat_rows(self.excluded.copy()):
            self.counts["num_documents"] += 1
            yield read_conversation(where, row, fields, store)

    def _read_parquet(
        self, path: Path, form: Format, chunks: Iterator[bytes]
    ) -> Iterator[tuple[str, Any, Store]]:
        """Arrow reads the end first: a packed file is unpacked to disk, any other hashed later."""
        if (path, form) in self.files and not form.packed:
            yield from read_parquet(path, form.fields, path)
            for _ in chunks:
                pass
            return
        with tempfile.TemporaryFile() as file:
            try:
                file.writelines(self._unpacked(path, form, chunks))
                file.seek(0)
            except OSError as error:
                where = f"{path} in {tempfile.gettempdir()}"
                raise UserError(f"cannot unpack {where}: {error.strerror}") from error
            yield from read_parquet(path, form.fields, file)

    def _read(self, path: Path, form: Format, chunks: Iterator[bytes]) -> Iterator[str]:
        """The text of one file, in non-empty parts, without its byte-order mark."""
        decoder = self.codec.incrementaldecoder()
        offset = 0
        is_start = True
        for chunk in self._unpacked(path, form, chunks):
            if offset == 0 and chunk.startswith(encodings.MARKUP):
                raise self._not_text(path, chunk, 0)
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
        pending = decoder.getstate()[0]  # bytes of a character that the last chunk began
        is_wide = self.codec.name.startswith(("utf-16", "utf-32"))  # has NUL bytes
        nul = -1 if is_wide else chunk.find(b"\0")
        try:
            text = decoder.decode(chunk, final=not chunk)
            text.encode()  # fails on a lone surrogate, as utf-7 can write it
            if "\0" not in text:
                return text
        except UnicodeDecodeError as error:
            if nul < 0 or error.start < nul:
                raise self._not_text(path, pending + chunk, at - len(pending), error) from error
        except UnicodeError as error:
            raise UserError(f"{path} is not {self.encoding} text: {error}") from error
        raise self._not_text(path, chunk, at)

    def _not_text(
        self, path: Path, content: bytes, at: int, error: UnicodeDecodeError | None = None
    ) -> UserError:
        """Says what a file is instead, whose `content`, `at` so many bytes, can't be read."""
        if at == 0 and (found := encodings.format_of_bytes(content[: encodings.SAMPLED])):
            kind, hint = found
            return UserError(f"{path} is {kind}, not text", hint=hint)
        first = error.start if error else max(content.find(b"\0"), 0)
        # From the start of a line, if the chunk is a long one.
        start = content.rfind(b"\n", 0, max(first - encodings.SAMPLED // 2, 0)) + 1
        sample = content[start : start + encodings.SAMPLED]
        if error is None:
            has_nul = b"\0" in content and not self.codec.name.startswith(("utf-16", "utf-32"))
            where = f" at offset {at + first:,}" if has_nul else ""
            problem = f"{path} looks like a binary file (NUL byte{where})"
            if not (has_nul and encodings.detect(sample)):
                return UserError(problem, hint=encodings.LEAVE_OUT)
        else:
            byte = error.object[error.start]
            where = f"byte 0x{byte:02x} at offset {at + error.start:,}"
            problem = f"{path} is not {self.encoding} text ({where})"
        hint = encodings.suggest_encoding(sample, first - start, self.codec.name)
        return UserError(problem, hint=hint)

    def _unpacked(self, path: Path, form: Format, chunks: Iterator[bytes]) -> Iterator[bytes]:
        """Chunks of what is in the file, the last b""."""
        return unpack(path, form.packed, chunks) if form.packed else chunks

    def _read_bytes(self, path: Path, form: Format) -> Iterator[bytes]:
        """Chunks of the file, the last b""; format, bytes and length go into the digest."""
        self._digest.update(form.label.encode())
        if form.kind in archives.KINDS and self.excluded:
            self._digest.update(json.dumps(list(self.excluded)).encode())
        try:
            with path.open("rb") as file:
                self._stamps_read.add(path.name, os.fstat(file.fileno()))
                while chunk := file.read(CHUNK):
                    self._digest.update(chunk)
                    self._advance(len(chunk))
                    yield chunk
                self._digest.update(f"end {file.tell()}".encode())
                yield b""
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from error


def holds_conversations(text: TextFiles) -> bool:
    """Whether its rows are conversations, without reading more than the first one."""
    unread = Known("", True, {})
    return Reader(text, needs_fields=False, known=unread).is_chat


def no_fields(text_field: str | list[str], place: str) -> UserError:
    return UserError(
        f"is for .json(l), .csv, .tsv and .parquet files, and {place} has none",
        field="text_field",
        value=text_field,
        hint="leave it out, or check what `path` names",
    )


def _text_codec(encoding: str) -> codecs.CodecInfo:
    with suppress(LookupError, ValueError):  # ValueError: a NUL in the name
        codec = codecs.lookup(encoding)
        # Neither base64 nor rot13, nor the codecs of host names, which can't be read in parts.
        if codec._is_text_encoding and codec.name not in ("idna", "punycode"):
            return codec
    raise UserError(
        "unknown encoding", field="encoding", value=encoding, hint="try utf-8 or gb18030"
    )
