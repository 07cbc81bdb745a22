"""Columns of .parquet files: of every type that holds text, nested, joined, or chats."""

import re

import pyarrow
import pytest
from pyarrow import parquet

from lit_gpt.errors import UserError
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
        ("data.body", "has no field 'data.body'; name one with text_field; there are 'id', 'data.n'"
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
