"""Which files hold documents, and their rows.

Memory holds a view of the text, or one batch of rows, at a time, whatever the length of a row. A
damaged file, or one that is not what its name says, is a UserError that names the line.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lit_gpt.text import archives
from lit_gpt.text.compression import PACKERS
from lit_gpt.text.csv_rows import Table
from lit_gpt.text.fields import FIELD, no_field
from lit_gpt.text.json_rows import read_json
from lit_gpt.text.windows import Store

LINES = ("jsonl", "ndjson")  # of JSON
SHORT_NAMES = {".tgz": ".tar.gz", ".tbz": ".tar.bz2", ".tbz2": ".tar.bz2", ".txz": ".tar.xz"}


@dataclass(frozen=True)
class Format:
    """How a file is read: decided by the ending of its name, in either case.

    Args:
        kind: jsonl, ndjson, json, csv, tsv or parquet; zip or tar; text for all others.
        packed: one of PACKERS, or "".
        fields: those that hold the documents; none if `kind` is text.
        has_quotes: whether fields may be in double quotes, if `kind` is csv or tsv.
    """

    kind: str
    packed: str
    fields: tuple[str, ...] = ()
    has_quotes: bool = False

    @property
    def label(self) -> str:
        """Differs between formats that read the same bytes differently; "" for plain text."""
        if self.kind == "text" and not self.packed:
            return ""
        may_lack_quotes = self.kind in ("tsv", *archives.KINDS)
        kind = (
            f"{self.kind} without quotes" if may_lack_quotes and not self.has_quotes else self.kind
        )
        field = self.fields[0] if len(self.fields) == 1 else self.fields
        return json.dumps([kind, self.packed, field or None])


def format_of(path: Path, text_field: str | list[str] | None, tsv_quotes: bool = False) -> Format:
    """The format of a file with this name; .csv and .tsv are plain text unless a field is named."""
    name = path.name.lower()
    packed = ""
    for short, long in SHORT_NAMES.items():
        if name.endswith(short):
            name = name.removesuffix(short) + long
    if name.endswith(tuple(f".{packer}" for packer in PACKERS)):
        name, _, packed = name.rpartition(".")
    kind = name.rpartition(".")[2]
    named = FIELD if text_field is None else text_field
    fields = (named,) if isinstance(named, str) else tuple(named)
    if kind in (*LINES, "json", "parquet"):
        return Format(kind, packed, fields)
    if kind in ("csv", "tsv") and text_field is not None:
        return Format(kind, packed, fields, has_quotes=kind == "csv" or tsv_quotes)
    if kind == "tar" or (kind == "zip" and not packed):
        return Format(kind, packed, () if text_field is None else fields, has_quotes=tsv_quotes)
    return Format("text", packed)


def read_rows(
    path: Path, form: Format, texts: Iterable[str], counts: dict[str, int]
) -> Iterator[tuple[str, Any, Store]]:
    """The rows in the text of a file that is not .parquet.

    Args:
        path, form: of the file.
        texts: its text, in pieces.
        counts: of "blank_lines", and of the "row_like_fields" of `Table`.

    Yields:
        Where a row is, the row for `text_of`, and the store of its long strings.
    """
    if form.kind in (*LINES, "json"):
        yield from read_json(path, form.kind in LINES, texts, counts)
        return
    columns: list[int] = []
    for where, row, store in Table(path, form.kind, form.has_quotes, texts, counts):
        if columns:
            yield where, dict(zip(form.fields, (row[i] for i in columns), strict=True)), store
            continue
        for field in form.fields:
            if row.count(field) != 1:
                raise no_field(where, field, row)
            columns.append(row.index(field))
