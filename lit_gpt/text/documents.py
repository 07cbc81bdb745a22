"""Owns how documents are read out of .jsonl, .csv, .tsv and .parquet files, and of .gz and .zst.

Piece by piece: what is held in memory is one document, or one batch of rows, at a time. Whatever a
file is not, is one error that names it and the line.
"""

from __future__ import annotations

import csv
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from lit_gpt.errors import UserError

FIELD = "text"  # of .jsonl and .parquet files, unless --data.text_field names another
# A piece of a compressed file can't be larger than 32 MB when it is unpacked (zstd: 128 KB from 4
# bytes), so memory stays bounded whatever somebody packed.
PACKED, UNPACKED = 1 << 10, 1 << 18  # bytes unpacked at a time; handed on together, or more
WINDOW = 1 << 31  # bytes of text that a .zst file may look back, as `zstd --long=31` makes them
ROWS, BUFFER = 1 << 10, 1 << 20  # of a .parquet file, at a time: rows, bytes
MAX_FIELD = 1 << 28  # characters of a .csv: a quote that nobody closed ends there
MAX_LISTED = 20  # fields that an error lists

LINE_END = re.compile(r"\n")
CSV_LINE_END = re.compile(r"\r\n|\n|\r(?=[^\n])")  # a CR at the end may be half of one


@dataclass(frozen=True)
class Format:
    """How a file is read: by the ending of its name, whatever its case.

    Args:
        kind: jsonl, csv, tsv or parquet, or text for all others.
        packed: gz, zst or nothing.
        field: the one that holds the documents; None where `kind` is text.
    """

    kind: str
    packed: str
    field: str | None

    @property
    def label(self) -> str:
        """Nothing for plain text; else differs where what is read does."""
        plain = self.kind == "text" and not self.packed
        return "" if plain else json.dumps([self.kind, self.packed, self.field])


def format_of(path: Path, text_field: str | None) -> Format:
    """Of a file by that name. A .csv or .tsv is plain text unless a field is named."""
    name, packed = path.name.lower(), ""
    if name.endswith((".gz", ".zst")):
        name, _, packed = name.rpartition(".")
    kind = name.rpartition(".")[2]
    if kind in ("jsonl", "parquet") or (kind in ("csv", "tsv") and text_field is not None):
        return Format(kind, packed, FIELD if text_field is None else text_field)
    return Format("text", packed, None)


def unpack(path: Path, packed: str, chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Chunks of a .gz or .zst file, the last b"", to those of what is in it, the last b"" too.

    Several streams in a row are one, as gzip and zstd have it.

    Raises:
        UserError: truncated, damaged or something else; zstandard is not installed.
    """
    new, failures = _decoder(path, packed)
    decoder, parts, size = None, [], 0
    try:
        for chunk in chunks:
            for at in range(0, len(chunk), PACKED):
                piece = chunk[at : at + PACKED]
                while piece := piece if decoder else piece.lstrip(b"\0"):  # padding, as of tapes
                    decoder = decoder or new()
                    parts.append(decoder.decompress(piece))
                    size += len(parts[-1])
                    piece = decoder.unused_data
                    decoder = None if decoder.eof else decoder
                if size >= UNPACKED:
                    yield b"".join(parts)
                    parts, size = [], 0
    except failures as error:
        raise UserError(
            f"{path} is no whole .{packed} file ({error}): it is damaged or something else"
        ) from error
    if decoder:
        raise UserError(f"{path} is no whole .{packed} file: its end is missing, get it again")
    if size:
        yield b"".join(parts)
    yield b""


def _decoder(path: Path, packed: str) -> tuple[Callable[[], Any], type[Exception]]:
    """What makes a new decoder, with `decompress`, `eof` and `unused_data`; what that raises."""
    if packed == "gz":
        return lambda: zlib.decompressobj(wbits=31), zlib.error
    try:
        import zstandard
    except ImportError as error:
        raise _needs(path, "zstandard", "zstd") from error
    unpacker = zstandard.ZstdDecompressor(max_window_size=WINDOW)
    return unpacker.decompressobj, zstandard.ZstdError


def _needs(path: Path, package: str, extra: str) -> UserError:
    return UserError(f'{path} needs the package {package}: pip install -e ".[{extra}]"')


def read_documents(path: Path, form: Format, texts: Iterable[str]) -> Iterator[str]:
    """The documents in the text of a .jsonl, .csv or .tsv file; "" for one that is null.

    Raises:
        UserError: names the line that is not as it must be.
    """
    if form.kind == "jsonl":
        return _read_jsonl(path, form.field, texts)
    return _read_csv(path, form.field, texts, "\t" if form.kind == "tsv" else ",")


def _lines(texts: Iterable[str], line_end: re.Pattern) -> Iterator[str]:
    """The text in lines, each with its end, however it was cut."""
    begun: list[str] = []  # pieces of a line
    for text in texts:
        if begun and begun[-1].endswith("\r"):
            text = begun.pop() + text
        start = 0
        for match in line_end.finditer(text):
            yield "".join([*begun, text[start : match.end()]])
            begun, start = [], match.end()
        begun.append(text[start:])
    if rest := "".join(begun):
        yield rest


def _read_jsonl(path: Path, field: str, texts: Iterable[str]) -> Iterator[str]:
    for number, line in enumerate(_lines(texts, LINE_END), 1):
        where = f"{path}, line {number:,}"
        if not line.strip():
            raise UserError(f"{where} is empty: each line must hold one JSON object, take it out")
        try:
            values = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = f"{error.msg} at {error.colno:,}" if hasattr(error, "colno") else str(error)
            raise UserError(f"{where} is not valid JSON ({reason}): mend or remove it") from error
        if not isinstance(values, dict):
            raise UserError(f"{where} is not a JSON object, as {{{json.dumps(field)}: ...}} is")
        if field not in values:
            raise _no_field(where, field, list(values))
        yield _checked(where, field, values[field])


def _read_csv(path: Path, field: str, texts: Iterable[str], delimiter: str) -> Iterator[str]:
    csv.field_size_limit(MAX_FIELD)
    rows = csv.reader(_lines(texts, CSV_LINE_END), delimiter=delimiter, strict=True)
    header, column, number = None, 0, 1
    try:
        for row in rows:
            where, number = f"{path}, line {number:,}", rows.line_num + 1  # of the next row
            if not row:
                continue  # an empty line
            if header is None:
                header = row
                if header.count(field) != 1:
                    raise _no_field(where, field, header)
                column = header.index(field)
            elif len(row) != len(header):
                raise UserError(
                    f"{where} has {len(row):,} fields, its header {len(header):,}: text with "
                    "separators, quotes or line ends in it must stand in double quotes"
                )
            else:
                yield row[column]
    except csv.Error as error:
        raise UserError(f"{path}, line {number:,} can't be read as .csv: {error}") from error


def read_parquet(path: Path, field: str, file: IO[bytes]) -> Iterator[str]:
    """The documents in a column of a .parquet file, batch by batch; "" for one that is null.

    Raises:
        UserError: no column of texts by that name, damaged, or pyarrow is not installed.
    """
    try:
        import pyarrow
        from pyarrow import parquet, types
    except ImportError as error:
        raise _needs(path, "pyarrow", "parquet") from error
    number = 0
    try:
        # In pieces too where a group of rows is large: the whole column would be read ahead.
        table = parquet.ParquetFile(file, buffer_size=BUFFER, pre_buffer=False)
        names = table.schema_arrow.names
        if names.count(field) != 1:
            raise _no_field(str(path), field, names)
        kind = table.schema_arrow.field(field).type
        if types.is_dictionary(kind):
            kind = kind.value_type
        if not (types.is_string(kind) or types.is_large_string(kind)):
            raise UserError(
                f"{path}: the column {field!r} holds no text but {kind}: name another with "
                "--data.text_field"
            )
        for batch in table.iter_batches(ROWS, columns=[field]):
            for value in batch.column(0):
                text = value.as_py()
                number += 1
                yield text or ""
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        after = f" after row {number:,}" if number else ""
        raise UserError(f"{path} can't be read as .parquet{after}: {error}") from error


def _checked(where: str, field: str, value: Any) -> str:
    """Null is no document; what is one must be text."""
    if value is None:
        return ""
    if not isinstance(value, str):
        kind = {dict: "an object", list: "a list", bool: "a truth value"}.get(type(value))
        raise UserError(f"{where}: {field!r} holds no text but {kind or 'a number'}")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # a lone surrogate, as \ud800 writes it
        raise UserError(f"{where}: {field!r} is not valid Unicode text: {error}") from error
    return value


def _no_field(where: str, field: str, names: list[str]) -> UserError:
    listed = ", ".join(map(repr, names[:MAX_LISTED])) or "none"
    more = f" and {len(names) - MAX_LISTED:,} more" if len(names) > MAX_LISTED else ""
    has = f"{names.count(field)} fields {field!r}" if field in names else f"no field {field!r}"
    return UserError(
        f"{where} has {has}: name one with --data.text_field, there are {listed}{more}"
    )
