"""Rows of .parquet files, batch by batch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from lit_gpt.errors import UserError
from lit_gpt.text.compression import needs_package
from lit_gpt.text.fields import no_field
from lit_gpt.text.windows import Store

ROWS = 1 << 6  # read at a time
BUFFER = 1 << 20  # bytes read at a time
STRINGS = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view")


def read_parquet(
    path: Path, fields: tuple[str, ...], source: Path | IO[bytes]
) -> Iterator[tuple[str, dict[str, Any], Store]]:
    """The rows, of the columns that are needed, as `documents.read_rows` yields them.

    Args:
        path: the file's name.
        fields: of each row; see `lit_gpt.text.fields.find`.
        source: the file, or what was unpacked from it.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise needs_package(path, "pyarrow", "parquet") from error
    number = 0
    store = Store(path)  # of nothing
    try:
        # Without `pre_buffer`, which would read the whole column of a large row group ahead.
        table = parquet.ParquetFile(source, buffer_size=BUFFER, pre_buffer=False)
        for field in fields:
            _check_column(path, field, list(table.schema_arrow))
        for batch in table.iter_batches(ROWS, columns=list(fields)):
            for values in zip(*batch.columns, strict=True):
                number += 1
                row = {x: v.as_py() for x, v in zip(batch.schema.names, values, strict=True)}
                yield f"{path}, row {number:,}", row, store
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        after = f" after row {number - 1:,}" if number > 1 else ""
        raise UserError(f"{path} cannot be read as .parquet{after}: {error}") from error


def _check_column(path: Path, field: str, columns: list[Any]) -> None:
    """Refuses a column that is not there, or holds neither text nor lists of objects."""
    from pyarrow import types

    wanted = field
    inner = columns
    while len(found := [column for column in inner if column.name == wanted]) != 1:
        head, _, wanted = wanted.partition(".")
        outer = [x for x in inner if x.name == head and types.is_struct(x.type)]
        if found or len(outer) != 1:
            raise no_field(str(path), field, list(_names(columns)))
        inner = list(outer[0].type)
    kind = found[0].type
    if types.is_dictionary(kind):
        kind = kind.value_type
    is_list = types.is_list(kind) or types.is_large_list(kind)
    if str(kind) not in STRINGS and not (is_list and types.is_struct(kind.value_type)):
        raise UserError(
            f"{path}: column {field!r} holds {kind}, not text",
            hint="name another one with `text_field`",
        )


def _names(columns: list[Any]) -> Iterator[str]:
    """The columns' names, nested ones with dots."""
    from pyarrow import types

    for column in columns:
        if types.is_struct(column.type):
            yield from (f"{column.name}.{name}" for name in _names(list(column.type)))
        else:
            yield column.name
