"""Columns of .parquet files: of every type that holds text, nested, joined, or chats."""

import re

import pyarrow
import pytest
from pyarrow import parquet

from lit_gpt.errors import UserError
from lit_gpt.text.parquet_pages import measure
from tests.text.test_documents import documents_in, read

TEXTS = ["农夫", None, "b", ""]
CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "你好"}]
KINDS = ["string", "large_string", "string_view", "binary", "large_binary", "binary_view"]


@pytest.mark.parametrize("store_schema", [True, False])
@pytest.mark.parametrize("kind", [*KINDS, "dictionary<string>", "dictionary<binary>"])
def test_columns_of_every_type_of_text(kind, store_schema, tmp_path):
    name = re.sub(r"dictionary<(.*)>", r"\1", kind)
    column = pyarrow.array([x and x.encode() for x in TEXTS], "binary").cast(name)
    column = column.dictionary_encode() if name != kind else column
    path = tmp_path / "x.parquet"
    parquet.write_table(pyarrow.table({"text": column}), path, store_schema=store_schema)
    reader = read(str(path))
    assert documents_in(reader) == ["农夫", "b"]
    assert reader.counts["empty_documents"] == 2


@pytest.mark.parametrize(
    ("field", "expected"),
    [
        ("data.text", ["a", "b"]),
        (["data.title", "data.text"], ["T\na", "b"]),
        (["id", "data.text"], ["7\na", "8\nb", "9"]),
        ("chat", ["user: Hi\n\nassistant: 你好"]),
        ("x.y", ["z"]),
    ],
)
def test_nested_columns_and_several(field, expected, tmp_path):
    columns = {
        "id": ["7", "8", "9"],
        "data": [{"title": "T", "text": "a", "n": 1}, {"title": None, "text": "b", "n": 2}, None],
        "chat": [CHAT, [], None],
        "x.y": ["z", None, ""],
    }
    parquet.write_table(pyarrow.table(columns), tmp_path / "x.parquet")
    assert documents_in(read(str(tmp_path / "x.parquet"), field)) == expected


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ("data.body", "has no field 'data.body'; name one with text_field, or leave the file out,"
         " in a folder with exclude; there are 'id', 'data.n'"
         ", 'data.t'"),
        ("data.n", ": column 'data.n' holds int64, not text; name another one with text_field"),
        ("data", ": column 'data' holds struct<n: int64, t: string>, not text"),
        ("id.n", "has no field 'id.n'"),
        ("ids", ": column 'ids' holds list<element: int64>, not text"),
    ],
)  # fmt: skip
def test_which_columns_are_refused(field, message, tmp_path):
    columns = {"id": ["1"], "data": [{"n": 1, "t": "a"}]} | (
        {"ids": [[1]]} if field == "ids" else {}
    )
    parquet.write_table(pyarrow.table(columns), tmp_path / "x.parquet")
    with pytest.raises(UserError) as caught:
        documents_in(read(str(tmp_path / "x.parquet"), field))
    assert str(caught.value).startswith(str(tmp_path / "x.parquet"))
    assert message in str(caught.value)


def test_bytes_that_are_no_text_name_their_row(tmp_path):
    parquet.write_table(pyarrow.table({"text": [b"a", b"b\xff"]}), tmp_path / "x.parquet")
    with pytest.raises(UserError, match=r"x\.parquet, row 2: 'text' is not valid Unicode text"):
        documents_in(read(str(tmp_path / "x.parquet")))


def bomb(name: str, path) -> None:
    """A file of 1,000 to 50,000 bytes that unpacks to gigabytes."""
    options = {"compression": "zstd", "store_schema": False}
    if name == "one value in many rows":
        values = pyarrow.array(["a" * 30_000_000])
        column = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 100), values)
    elif name == "items of a list":
        rows = pyarrow.nulls(1 << 27, pyarrow.struct([("role", "string"), ("content", "string")]))
        column = pyarrow.ListArray.from_arrays(pyarrow.array([0, 1 << 27], "int32"), rows)
    else:
        column = pyarrow.array(["a" * 600_000_000])
        options["use_dictionary"] = False
    parquet.write_table(pyarrow.table({"text": column}), path, **options)


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("a value", "has a page of 600 MB"),
        ("a value that the footer hides", "has a page of 600 MB"),
        ("items of a list", "has 134,217,728 list items in a row group"),
    ],
)
def test_bombs_are_refused_before_they_are_unpacked(name, problem, tmp_path):
    path = tmp_path / "x.parquet"
    bomb(name, path)
    if "footer" in name:
        content = path.read_bytes()
        size = parquet.ParquetFile(path).metadata.row_group(0).total_byte_size
        varint = bytes((2 * size >> 7 * i & 127) | 128 * (i < 4) for i in range(5))
        path.write_bytes(content.replace(varint, b"\xc0\x80\x80\x80\x00"))
        assert parquet.ParquetFile(path).metadata.row_group(0).total_byte_size == 32
    start = pyarrow.total_allocated_bytes()
    with pytest.raises(UserError, match=problem) as error:
        list(read(str(path)))
    assert "write it as .jsonl" in str(error.value)
    assert pyarrow.total_allocated_bytes() - start < 1_000_000


def test_a_long_value_in_many_rows_is_read_row_by_row(tmp_path):
    bomb("one value in many rows", tmp_path / "x.parquet")
    assert (tmp_path / "x.parquet").stat().st_size < 10_000
    num_bytes = num_documents = most = 0
    for part in read(str(tmp_path / "x.parquet")):
        num_bytes += len(part or "")
        num_documents += part is None
        most = max(most, pyarrow.total_allocated_bytes())
    assert (num_documents, num_bytes) == (100, 100 * 30_000_000)
    assert most < 200_000_000


def test_a_long_value_is_decoded_in_pieces(tmp_path):
    text = "农夫é" * 600_000
    for kind in ("string", "binary", "string_view", "large_string"):
        column = pyarrow.array([text.encode(), None, b"b"], "binary").cast(kind)
        options = {"use_dictionary": False, "compression": "none"}
        parquet.write_table(pyarrow.table({"text": column}), tmp_path / "x.parquet", **options)
        parts = list(read(str(tmp_path / "x.parquet")))
        assert "".join(part or "|" for part in parts) == f"{text}|b|"
        assert max(len(part or "") for part in parts) <= 1 << 16


@pytest.mark.parametrize("codec", ["none", "snappy", "zstd"])
@pytest.mark.parametrize("version", ["1.0", "2.0"])
def test_pages_of_every_kind_are_measured(codec, version, tmp_path):
    """In each file, the only large page is that of the long value."""
    texts = [f"{i}" for i in range(5000)] + ["x" * 3_000_000] + [f"{i}" for i in range(5000)]
    for use_dictionary in (True, False):
        parquet.write_table(
            pyarrow.table({"other": texts, "text": texts}),
            tmp_path / "x.parquet",
            compression=codec,
            data_page_version=version,
            use_dictionary=use_dictionary,
            data_page_size=10_000,
            row_group_size=9000,
        )
        metadata = parquet.ParquetFile(tmp_path / "x.parquet").metadata
        with (tmp_path / "x.parquet").open("rb") as file:
            first, second = (measure(file, metadata.row_group(i).column(1)) for i in (0, 1))
        assert (first.num_values, second.num_values) == (9000, 1001)
        assert 3_000_000 < first.largest < 3_100_000
        assert second.largest < 20_000
        assert documents_in(read(str(tmp_path / "x.parquet"))) == texts
