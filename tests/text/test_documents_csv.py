"""Rows of .csv and .tsv files: quotes that belong there, stray ones, and very long fields."""

import csv
import io
import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lit_gpt.errors import UserError
from lit_gpt.text import csv_rows, files
from tests.text.test_documents import documents_in, documents_of, read

ROWS = [
    f"{i}\t{text}" for i, text in enumerate(["one", "two", '"Birds river', "four", "five", 'six"'])
]
PROSE = "Roses are red,\nviolets are blue,\n\nsugar, 2 spoons,\n3, perhaps, and so are you."


def write_rows(path, rows: list[str]) -> str:
    path.write_text("".join(f"{row}\n" for row in rows))
    return str(path)


def test_a_quote_in_a_tsv_file_is_a_character(load, tmp_path):
    write_rows(tmp_path / "x.tsv", ["id\ttext", *ROWS])
    corpus = load(tmp_path / "x.tsv", text_field="text")
    assert documents_of(corpus) == ["one", "two", '"Birds river', "four", "five", 'six"']
    rows = ["id\ttext", "1\tone", '2\t"two\tand\n""more"""']
    write_rows(tmp_path / "x.tsv", rows)
    with pytest.raises(UserError) as caught:
        load(tmp_path / "x.tsv", text_field="text")
    assert str(caught.value) == (
        f"{tmp_path / 'x.tsv'}, line 3 has more than its header's 2 fields; a .tsv file has no "
        "quoting unless you set tsv_quotes"
    )
    quoted = load(tmp_path / "x.tsv", text_field="text", tsv_quotes=True)
    assert documents_of(quoted) == ["one", 'two\tand\n"more"']


def test_with_quotes_or_without_is_another_corpus(load, tmp_path):
    write_rows(tmp_path / "x.tsv", ["id\ttext", '1\t"one"'])
    plain, quoted = (load(tmp_path / "x.tsv", text_field="text", tsv_quotes=q) for q in (0, 1))
    assert (documents_of(plain), documents_of(quoted)) == (['"one"'], ["one"])
    assert plain.info.fingerprint != quoted.info.fingerprint


@pytest.mark.parametrize("name", ["x.csv", "x.tsv"])
def test_a_stray_quote_swallows_no_rows(name, tmp_path, monkeypatch):
    delimiter = "," if name == "x.csv" else "\t"
    rows = [row.replace("\t", delimiter) for row in ["id\ttext", *ROWS]]
    path = write_rows(tmp_path / name, rows)
    for limit in (1 << 16, 12):  # 12: as if the field were too long for memory
        monkeypatch.setattr(csv_rows, "SHORT", limit)
        with pytest.raises(UserError) as caught:
            documents_in(read(path, "text"))
        assert re.sub("over . lines", "over N lines", str(caught.value)) == (
            f"{path}, line 4 has a field in double quotes over N lines that look like rows; "
            "remove the stray quote, or write the file as .jsonl if these lines are one text"
        )


@pytest.mark.parametrize(
    ("rows", "found"),
    [
        (['"a",1', '"b', 'c",2'], 0),  # no delimiter
        (['"a",1', '"b,2', 'c",3'], 1),  # may be two rows
        (['"a",1', '"b,2', "c,3", 'd",4'], None),  # is three: numbers where this row has one
        (['"a",x', '"b,x', "c,y", 'd",z'], 1),  # who knows
        (['"a",x', '"b,x', *["c,y"] * 20, 'd",z'], None),  # by chance?
        (['"a",1', '"b,2', "c,three", 'd",4'], 1),
        (['"a",1', '"b,2', "c,d,3", 'e",4'], 0),
        (['"a",1', f'"{PROSE}",2', f'"{PROSE}",3'], 0),
    ],
)
def test_lines_in_a_field_that_look_like_rows(rows, found, tmp_path):
    path = write_rows(tmp_path / "x.csv", ["text,id", *rows])
    reader = read(path, "text")
    if found is None:
        with pytest.raises(UserError, match="line 3 has a field in double quotes over"):
            documents_in(reader)
    else:
        expected = [row[0] for row in csv.reader(io.StringIO("\n".join(rows)))]
        assert documents_in(reader) == expected
        assert reader.counts["row_like_fields"] == found


@pytest.mark.parametrize(
    ("lines", "found"),
    [
        (["1,{}", '2,"{}', "3,{}", '4,{}"'], None),
        (["1,{}", '2,"{}', "", "3,{}", "", '4,{}"'], None),  # blank lines are no rows
        (["1,{}", '2,"{}', "3,{}", "4,{}"], None),  # up to the end of the file
        (["1,{}", '2,"{}', '3,{}"'], 1),
        (["1,{}", '2,"{}', "{}", '3,{}"'], 0),
    ],
)
@pytest.mark.parametrize("size", [5, 70_000])
def test_lines_that_look_like_rows_may_be_of_any_length(size, lines, found, tmp_path):
    rows = [line.format("x" * size) for line in lines]
    reader = read(write_rows(tmp_path / "x.csv", ["id,text", *rows]), "text")
    if found is None:
        with pytest.raises(UserError, match="line 3 has a field in double quotes over"):
            documents_in(reader)
    else:
        documents_in(reader)
        assert reader.counts["row_like_fields"] == found


def test_a_stray_quote_in_the_only_column_is_counted(tmp_path):
    """It may also be a poem."""
    rows = ["text", "one", '"two', *["three"] * 30, 'four"', '"a, b', 'c, d"']
    reader = read(write_rows(tmp_path / "x.csv", rows), "text")
    assert documents_in(reader) == [
        "one",
        "\n".join(["two", *["three"] * 30, "four"]),
        "a, b\nc, d",
    ]
    assert reader.counts["row_like_fields"] == 1


def test_fields_that_look_like_rows_are_in_the_data_card(train, tmp_path):
    rows = ["text,id", *['"' + "b a\n" * 50 + '",x', '"b,x', 'c",x'] * 3]
    path = write_rows(tmp_path / "x.csv", rows)
    result = train(**{"data.path": path, "data.text_field": "text"})
    assert result.status == 0, result.err
    assert "Quoted fields over lines that look like rows: 3\n" in result.out


def test_columns_are_joined(load, tmp_path):
    path = write_rows(tmp_path / "x.csv", ["text,id,title", "a,1,T", "b,2,", ",3,", '"c,""",4,U'])
    corpus = load(path, text_field=["title", "text"])
    assert documents_of(corpus) == ["T\na", "b", 'U\nc,"']
    assert (corpus.info.num_documents, corpus.info.empty_documents) == (3, 1)


texts = st.text(alphabet='ab,\t"\r\n农', max_size=12)


@given(
    rows=st.lists(st.tuples(texts, texts), max_size=5),
    kind=st.sampled_from(["csv", "tsv"]),
    end=st.sampled_from(["\n", "\r\n", "\r"]),
    short=st.sampled_from([7, 12, 1 << 16]),
)
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
def test_rows_are_those_of_the_csv_module(rows, kind, end, short, tmp_path, monkeypatch):
    content = io.StringIO()
    delimiter = "," if kind == "csv" else "\t"
    quoting = csv.QUOTE_MINIMAL if end == "\r\n" else csv.QUOTE_ALL  # or else text has line ends
    writer = csv.writer(content, delimiter=delimiter, lineterminator=end, quoting=quoting)
    writer.writerows([("x", "y"), *rows])
    (tmp_path / f"x.{kind}").write_bytes(content.getvalue().encode())
    for field, expected in zip("xy", zip(*rows, strict=True), strict=False):
        with monkeypatch.context() as patch:
            patch.setattr(csv_rows, "SHORT", short)
            patch.setattr(csv_rows, "PIECE", 4)
            patch.setattr(csv_rows, "MANY_ROWS", 99)
            patch.setattr(files, "CHUNK", 4)
            reader = read(str(tmp_path / f"x.{kind}"), field)
            if any(expected):
                assert documents_in(reader) == [text for text in expected if text]


def test_a_table_with_endless_columns_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(csv_rows, "MAX_COLUMNS", 100)
    path = write_rows(tmp_path / "x.csv", ["text" + "," * 99, "a" + "," * 99])
    assert documents_in(read(path, "text")) == ["a"]
    path = write_rows(tmp_path / "x.csv", ["text" + "," * 100])
    with pytest.raises(UserError, match="line 1 has more than 100 fields"):
        documents_in(read(path, "text"))
