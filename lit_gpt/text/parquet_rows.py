"""Rows of .parquet files, batch by batch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import IO, Any

from lit_gpt.errors import UserError
from lit_gpt.text.compression import needs_package
from lit_gpt.text.conversations import fields_of
from lit_gpt.text.fields import no_field
from lit_gpt.text.parquet_pages import measure
from lit_gpt.text.windows import Store

ROWS = 1 << 6  # read at a time, if they are short
BATCH = 1 << 26  # bytes read at a time, unless one row has more
BUFFER = 1 << 20  # bytes of the file read at a time
LONG = 1 << 22  # bytes of a page: only a longer one has values that are decoded in pieces
MAX_PAGE = 1 << 29  # bytes; writers aim at 1 MB, but never divide a value
MAX_ITEMS = 1 << 26  # of the lists in a row group: they are in memory together
STRINGS = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view")


def read_parquet(
    path: Path, fields: tuple[str, ...], source: Path | IO[bytes]
) -> Iterator[tuple[str, dict[str, Any], Store]]:
    """The rows, of the columns that are needed, as `documents.read_rows` yields them.

    Args:
        path: the file's name.
        fields: of each row; see `lit_gpt.text.fields.find`. None: those of a conversation; where
            the file has none, a single row without values has the names of its columns.
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
        with source.open("rb") if isinstance(source, Path) else nullcontext(source) as file:
            # Without `pre_buffer`, which would read the whole column of a large row group ahead.
            table = parquet.ParquetFile(file, buffer_size=BUFFER, pre_buffer=False)
            if not fields:
                names = list(table.schema_arrow.names)
                fields = fields_of(names)
                if not fields:
                    yield str(path), dict.fromkeys(names), store
            for field in fields:
                _check_column(path, field, list(table.schema_arrow))
            longest = _longest(path, fields, table, file)
            rows = max(1, min(ROWS, BATCH // longest))
            for batch in table.iter_batches(rows, columns=list(fields)):
                for values in zip(*batch.columns, strict=True):
                    number += 1
                    plain = (_plain(value, longest) for value in values)
                    row = dict(zip(batch.schema.names, plain, strict=True))
                    yield f"{path}, row {number:,}", row, store
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        after = f" after row {number - 1:,}" if number > 1 else ""
        raise UserError(f"{path} cannot be read as .parquet{after}: {error}") from error


def _longest(path: Path, fields: tuple[str, ...], table: Any, file: IO[bytes]) -> int:
    """Bytes of the largest page of the fields: no value is longer, whatever its encoding.

    Raises:
        UserError: there is a page that would take too much memory.
        ValueError: one that is damaged.
    """
    longest = 1
    for i in range(table.metadata.num_row_groups):
        group = table.metadata.row_group(i)
        for j in range(group.num_columns):
            column = group.column(j)
            if not f"{column.path_in_schema}.".startswith(tuple(f"{x}." for x in fields)):
                continue
            pages = measure(file, column)
            has_lists = table.schema.column(j).max_repetition_level > 0
            if pages.largest > MAX_PAGE or (has_lists and pages.num_values > MAX_ITEMS):
                size = f"a page of {pages.largest / 1e6:,.0f} MB"
                items = f"{pages.num_values:,} list items in a row group"
                raise UserError(
                    f"{path} has {size if pages.largest > MAX_PAGE else items}, which would be in "
                    "memory all at once",
                    hint="write it as .jsonl, or with smaller pages and row groups",
                )
            longest = max(longest, pages.largest)
    return longest


def _plain(value: Any, longest: int) -> Any:
    """A value of Arrow's as one of Python's; a string that may be long as its bytes."""
    if longest > LONG and value.is_valid and hasattr(value, "as_buffer"):
        return memoryview(value.as_buffer())
    return value.as_py()


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
