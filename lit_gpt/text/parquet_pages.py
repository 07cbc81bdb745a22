"""The pages of .parquet files: their sizes, before Arrow reads them.

Arrow allocates what a page's header says, and 1,000 bytes can unpack to gigabytes. A header is a
PageHeader of parquet.thrift, in Thrift's compact protocol.
"""

from __future__ import annotations

from typing import IO, Any, NamedTuple

UNPACKED, PACKED = 2, 3  # fields of a PageHeader: sizes in bytes
DATA, DATA_V2 = 5, 8  # what is said of a page of values; its field 1 is their number
BYTE, INT16, INT32, INT64, DOUBLE, BINARY, STRUCT = 3, 4, 5, 6, 7, 8, 12  # types of fields
MAX_DEPTH = 4  # of structs in each other


class Pages(NamedTuple):
    """Of one column in one row group."""

    largest: int  # bytes, unpacked
    num_values: int


def measure(file: IO[bytes], column: Any) -> Pages:
    """Reads the headers of a column's pages.

    Args:
        file: the .parquet file.
        column: ColumnChunkMetaData of pyarrow.

    Raises:
        ValueError: a header that is damaged.
    """
    at = column.data_page_offset
    if column.has_dictionary_page and 0 < column.dictionary_page_offset < at:
        at = column.dictionary_page_offset
    end = at + column.total_compressed_size
    largest = 0
    num_values = 0
    while at < end and column.num_values:  # without values, Arrow reads no page
        file.seek(at)
        header = _struct(file)
        sizes = (header.get(UNPACKED, -1), header.get(PACKED, -1))
        if min(sizes) < 0:
            raise ValueError("a damaged page")
        largest = max(largest, *sizes)
        num_values += (header.get(DATA) or header.get(DATA_V2) or {}).get(1, 0)
        at = file.tell() + header[PACKED]
    return Pages(largest, num_values)


def _struct(file: IO[bytes], depth: int = 0) -> dict[int, Any]:
    """The fields of a struct by their numbers: whole numbers, structs, and None for all others."""
    fields: dict[int, Any] = {}
    number = 0
    while head := _byte(file):
        kind = head & 15
        number = number + (head >> 4) if head >> 4 else _number(file)
        value: Any = None
        if kind in (INT16, INT32, INT64):
            value = _number(file)
        elif kind == STRUCT and depth < MAX_DEPTH:
            value = _struct(file, depth + 1)
        elif kind in (BYTE, DOUBLE):
            file.seek(1 if kind == BYTE else 8, 1)
        elif kind == BINARY:
            file.seek(_varint(file), 1)
        elif kind > 2:  # 1 and 2 are true and false; a page's header has no lists
            raise ValueError("a damaged page")
        fields[number] = value
    return fields


def _number(file: IO[bytes]) -> int:
    """A signed number: 0, -1, 1, -2, ... are written as 0, 1, 2, 3, ..."""
    value = _varint(file)
    return (value >> 1) ^ -(value & 1)


def _varint(file: IO[bytes]) -> int:
    value = 0
    for shift in range(0, 70, 7):
        byte = _byte(file)
        value |= (byte & 127) << shift
        if byte < 128:
            return value
    raise ValueError("a damaged page")


def _byte(file: IO[bytes]) -> int:
    if not (byte := file.read(1)):
        raise ValueError("a damaged page")
    return byte[0]
