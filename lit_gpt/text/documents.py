"""Documents in .jsonl, .csv, .tsv and .parquet files.

Memory holds one document, or one batch of rows, at a time. A damaged file, or one that is not what
its name says, is a UserError that names the line.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from lit_gpt.errors import UserError
from lit_gpt.text.compression import PACKERS, needs_package

FIELD = "text"  # of .jsonl and .parquet files, unless `text_field` names another
ROWS = 1 << 10  # of a .parquet file, read at a time
BUFFER = 1 << 20  # bytes of a .parquet file, read at a time
MAX_FIELD = 1 << 28  # characters of a .csv field: limits one whose quote is never closed
MAX_LISTED = 20  # field names in an error

LINE_END = re.compile(r"\n")
CSV_LINE_END = re.compile(r"\r\n|\n|\r(?=[^\n])")  # a CR at the end may be half of one


@dataclass(frozen=True)
class Format:
    """How a file is read: decided by the ending of its name, in either case.

    Args:
        kind: jsonl, csv, tsv or parquet; text for all others.
        packed: one of PACKERS, or "".
        field: the one that holds the documents; "" if `kind` is text.
    """

    kind: str
    packed: str
    field: str

    @property
    def label(self) -> str:
        """Differs between formats that read the same bytes differently; "" for plain text."""
        is_plain = self.kind == "text" and not self.packed
        return "" if is_plain else json.dumps([self.kind, self.packed, self.field or None])


def format_of(path: Path, text_field: str | None) -> Format:
    """The format of a file with this name; .csv and .tsv are plain text unless a field is named."""
    name = path.name.lower()
    packed = ""
    if name.endswith(tuple(f".{packer}" for packer in PACKERS)):
        name, _, packed = name.rpartition(".")
    kind = name.rpartition(".")[2]
    if kind in ("jsonl", "parquet") or (kind in ("csv", "tsv") and text_field is not None):
        return Format(kind, packed, FIELD if text_field is None else text_field)
    return Format("text", packed, "")


def _lines(texts: Iterable[str], line_end: re.Pattern[str]) -> Iterator[str]:
    """The text's lines, each with its end, wherever the parts were cut."""
    begun: list[str] = []  # pieces of a line
    for text in texts:
        if begun and begun[-1].endswith("\r"):
            text = begun.pop() + text
        start = 0
        for match in line_end.finditer(text):
            yield "".join([*begun, text[start : match.end()]])
            begun = []
            start = match.end()
        begun.append(text[start:])
    if rest := "".join(begun):
        yield rest


def read_jsonl(path: Path, form: Format, texts: Iterable[str]) -> Iterator[str]:
    """The documents in the text of a .jsonl file; "" for one that is null."""
    for number, line in enumerate(_lines(texts, LINE_END), 1):
        where = f"{path}, line {number:,}"
        try:
            values = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = str(error)
            if isinstance(error, json.JSONDecodeError):
                reason = f"{error.msg}: column {error.colno:,}"
            raise UserError(
                f"{where} is not valid JSON ({reason})", hint="fix or remove it"
            ) from error
        if not isinstance(values, dict):
            raise UserError(
                f"{where} is not a JSON object such as {{{json.dumps(form.field)}: ...}}"
            )
        if form.field not in values:
            raise _no_field(where, form.field, list(values))
        yield _checked(where, form.field, values[form.field])


def _checked(where: str, field: str, value: Any) -> str:
    """A document's text; "" for null, which does not count as a document."""
    if value is None:
        return ""
    if not isinstance(value, str):
        kind = {dict: "an object", list: "a list", bool: "a boolean"}.get(type(value))
        raise UserError(f"{where}: {field!r} holds {kind or 'a number'}, not text")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # a lone surrogate, as \ud800 writes it
        raise UserError(f"{where}: {field!r} is not valid Unicode text: {error}") from error
    return value


def read_csv(path: Path, form: Format, texts: Iterable[str]) -> Iterator[str]:
    """The documents in the text of a .csv or .tsv file with a header."""
    delimiter = "\t" if form.kind == "tsv" else ","
    csv.field_size_limit(MAX_FIELD)
    rows = csv.reader(_lines(texts, CSV_LINE_END), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    column = 0
    number = 1  # of the line that the next row begins
    try:
        for row in rows:
            where = f"{path}, line {number:,}"
            number = rows.line_num + 1
            if not row:
                continue  # an empty line
            if header is None:
                header = row
                if header.count(form.field) != 1:
                    raise _no_field(where, form.field, header)
                column = header.index(form.field)
            elif len(row) != len(header):
                raise UserError(
                    f"{where} has {len(row):,} fields, its header {len(header):,}",
                    hint="put text that contains separators, quotes or line ends in double quotes",
                )
            else:
                yield row[column]
    except csv.Error as error:
        raise UserError(f"{path}, line {number:,} cannot be read as .csv: {error}") from error


def read_parquet(path: Path, form: Format, source: Path | IO[bytes]) -> Iterator[str]:
    """The documents in a column of a .parquet file, batch by batch; "" for one that is null."""
    try:
        import pyarrow
        from pyarrow import parquet, types
    except ImportError as error:
        raise needs_package(path, "pyarrow", "parquet") from error
    number = 0
    try:
        # Without `pre_buffer`, which would read the whole column of a large row group ahead.
        table = parquet.ParquetFile(source, buffer_size=BUFFER, pre_buffer=False)
        names = table.schema_arrow.names
        if names.count(form.field) != 1:
            raise _no_field(str(path), form.field, names)
        kind = table.schema_arrow.field(form.field).type
        if types.is_dictionary(kind):
            kind = kind.value_type
        if not (types.is_string(kind) or types.is_large_string(kind)):
            raise UserError(
                f"{path}: column {form.field!r} holds {kind}, not text",
                hint="name another one with `text_field`",
            )
        for batch in table.iter_batches(ROWS, columns=[form.field]):
            for value in batch.column(0):
                yield value.as_py() or ""
                number += 1
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        after = f" after row {number:,}" if number else ""
        raise UserError(f"{path} cannot be read as .parquet{after}: {error}") from error


def _no_field(where: str, field: str, names: list[str]) -> UserError:
    listed = ", ".join(map(repr, names[:MAX_LISTED])) or "none"
    more = f" and {len(names) - MAX_LISTED:,} more" if len(names) > MAX_LISTED else ""
    has = f"{names.count(field)} fields {field!r}" if field in names else f"no field {field!r}"
    return UserError(
        f"{where} has {has}", hint=f"name one with `text_field`; there are {listed}{more}"
    )
