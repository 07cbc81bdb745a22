"""Documents in JSON of every shape: lines, arrays, nested fields, chats, and very long values."""

import json
import re
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lit_gpt.errors import UserError
from lit_gpt.text import files, json_rows, windows
from tests.text.test_documents import documents_in, documents_of, read

TEXTS = ["农夫山泉", 'two\r\nlines, "three"\\', "🦊 \x85\u2028", "last"]
ROWS = [{"id": i, "text": text} for i, text in enumerate(TEXTS)]


@pytest.mark.parametrize("ascii_only", [True, False])
@pytest.mark.parametrize(
    ("name", "content"),
    {
        "lines.jsonl": lambda dump: "\n".join(map(dump, ROWS)),
        "lines.ndjson": lambda dump: "\r\n".join(map(dump, ROWS)) + "\n",
        "lines.json": lambda dump: "\n".join(map(dump, ROWS)) + "\n",
        "array.json": lambda dump: dump(ROWS),
        "pretty.json": lambda dump: f" {dump(ROWS, indent=2)} \n",
        "strings.json": lambda dump: dump(TEXTS),
        "strings.jsonl": lambda dump: "\n".join(map(dump, TEXTS)),
        "objects.json": lambda dump: "".join(dump(row, indent=1) for row in ROWS),
    }.items(),
)
def test_every_shape_of_json(name, content, ascii_only, tmp_path, monkeypatch):
    text = content(lambda value, **how: json.dumps(value, ensure_ascii=ascii_only, **how))
    (tmp_path / name).write_text(text, encoding="utf-8", newline="")
    for chunk in (1, 7, 1 << 20):
        monkeypatch.setattr(files, "CHUNK", chunk)
        reader = read(str(tmp_path / name))
        assert documents_in(reader) == TEXTS
        assert (reader.counts["num_documents"], reader.counts["blank_lines"]) == (len(TEXTS), 0)


def test_blank_lines_are_skipped_and_counted(load, tmp_path):
    (tmp_path / "a.jsonl").write_text('\n{"text": "a"}\n\n \t\r\n{"text": "b"}\n\n')
    (tmp_path / "b.csv").write_text('text,id\n\n"c\n\nd",1\n\r\n')
    corpus = load(tmp_path, text_field="text")
    assert documents_of(corpus) == ["a", "b", "c\n\nd"]
    assert (corpus.info.blank_lines, corpus.info.num_documents) == (4 + 2, 3)


def test_many_blank_lines_take_no_time(tmp_path):
    """One by one, these take ten seconds."""
    blank = b"\n" * 3_000_000 + b" \t\r\n" * 300_000
    (tmp_path / "x.jsonl").write_bytes(blank + b'{"text": "a"}\n' + blank + b'{"text": 1}')
    reader = read(str(tmp_path / "x.jsonl"))
    start = time.process_time()
    with pytest.raises(UserError, match="line 6,600,002: 'text' holds a number"):
        list(reader)
    assert reader.counts["blank_lines"] == 6_600_000
    assert time.process_time() - start < 2


def test_numbers_of_any_size_are_skipped(tmp_path):
    """Python refuses to parse whole numbers of more than 4,300 digits."""
    row = f'{{"n": {"9" * 5000}, "text": "a", "x": [-{"1" * 10_000}]}}\n'
    for name in ("x.jsonl", "x.json"):
        (tmp_path / name).write_text(row * 2)
        assert documents_in(read(str(tmp_path / name))) == ["a", "a"]


def test_blank_lines_are_in_the_data_card(train, tmp_path):
    line = json.dumps({"text": "a text " * 40}) + "\n\n"
    (tmp_path / "a.jsonl").write_text(line * 2)
    result = train(**{"data.path": tmp_path / "a.jsonl"})
    assert result.status == 0, result.err
    assert "Documents: 2\nBlank lines skipped: 2\n" in result.out


@pytest.mark.parametrize("name", ["x.jsonl", "x.json"])
@pytest.mark.parametrize(
    ("row", "field", "text"),
    [
        ({"data": {"text": "a"}}, "data.text", "a"),
        ({"data": {"a.b": {"c": "d"}}}, "data.a.b.c", "d"),
        ({"x": {"a": 1}}, "x.c", None),
        ({"data.text": "a", "data": {"text": "b"}}, "data.text", "a"),
        ({"data": None}, "data.text", ""),
        ({"title": "T", "text": "a"}, ["title", "text"], "T\na"),
        ({"title": "T", "text": "a"}, ["text", "title"], "a\nT"),
        ({"title": None, "text": "a", "end": ""}, ["title", "text", "end"], "a"),
        ({"title": "", "text": None}, ["title", "text"], ""),
        ({"q": {"a": "1", "b": "2"}}, ["q.a", "q.b"], "1\n2"),
        (
            {"messages": [{"role": "system", "content": "Be brief."}, {"content": "Hi\n", "x": 1,
             "role": "user"}, {"role": "assistant", "content": "你好"}]},
            "messages",
            "system: Be brief.\n\nuser: Hi\n\n\nassistant: 你好",
        ),
        (
            {"id": 1, "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt",
             "value": ""}]},
            "conversations",
            "human: Hi\n\ngpt: ",
        ),
        ({"id": "7", "m": [{"role": "user", "content": "Hi"}]}, ["id", "m"], "7\nuser: Hi"),
        ({"messages": []}, "messages", ""),
    ],
)  # fmt: skip
def test_what_of_a_row_is_text(row, field, text, name, tmp_path, monkeypatch):
    (tmp_path / name).write_text(json.dumps([row, row] if name == "x.json" else row))
    for limit in (1 << 20, 0):  # 0: as if it were too long to be parsed at once
        monkeypatch.setattr(json_rows, "LONG", limit)
        monkeypatch.setattr(json_rows, "SHORT_STRING", re.compile(r'"[^"\\]{0,20}"'))
        if text is None:
            with pytest.raises(
                UserError, match=r"'x' has no field 'c'; name one with .*; there are 'a'"
            ):
                documents_in(read(str(tmp_path / name), field))
        elif text == "":
            with pytest.raises(UserError, match="no text in"):
                documents_in(read(str(tmp_path / name), field))
        else:
            expected = [text, text] if name == "x.json" else [text]
            assert documents_in(read(str(tmp_path / name), field)) == expected


@pytest.mark.parametrize(
    ("name", "content", "field", "message"),
    [
        ("x.json", '[{"text": "a"},\n{"text": "b"},]', None,
         "line 2 is not valid JSON (Expecting value: character 31); fix or remove it"),
        ("x.json", '[{"text": "a"}\n{"text": "b"}]', None,
         "line 2 is not valid JSON (Expecting ',' or ']' after a value)"),
        ("x.json", '["a"]\n["b"]', None, "line 2 is not valid JSON (Extra data after the array)"),
        ("x.json", '["a",\n"b', None, "line 2 is not valid JSON (Unterminated string"),
        ("x.json", '["a"', None, "line 1 is not valid JSON (Expecting ',' or ']' after a value)"),
        ("x.json", '[\n"a", {"t": {"b": 1, "c": {"d": 2}}}]', None, "line 2 has no field 'text'; "
         "name one with text_field, or leave the file out, in a folder with exclude; there are "
         "'t.b', 't.c.d'"),
        ("x.json", '[["a"]]', None, 'line 1 is not a JSON object such as {"text": ...}'),
        ("x.json", "[1]", None, "line 1 is not a JSON object"),
        ("x.json", '["a"]', "body", 'line 1 is not a JSON object such as {"body": ...}'),
        ("x.json", '{"name": "a package", "version": "1"}', None, "line 1 has no field 'text'; "
         "name one with text_field, or leave the file out, in a folder with exclude; there are "
         "'name', 'version'"),
        ("x.jsonl", '{"a": 5}', "a.b", "line 1: 'a' holds a number, so it has no 'b'"),
        ("x.jsonl", '{"m": ["a"]}', "m", "line 1: 'm' holds a list, not text, and its element 1 is "
         "no chat message; name a field with text, or with messages like"),
        ("x.jsonl", '{"m": [{"role": "a", "content": "b"}, {}]}', "m", "its element 2 is no chat"),
        ("x.jsonl", '{"m": [{"role": "a", "content": null}]}', "m",
         "line 1: 'm', message 1: 'content' holds null, not text"),
        ("x.jsonl", '{"m": [{"role": "a"}]}', "m", "message 1: 'content' holds null, not text"),
        ("x.jsonl", '{"m": [{"role": 1, "content": "a"}]}', "m", "1: 'role' holds a number"),
        ("x.jsonl", '{"a": {"b": "\\ud800"}}', "a.b", "line 1: 'a.b' is not valid Unicode text"),
        ("x.jsonl", '{"text": "a"}', [], "text_field []: names no field"),
    ],
)  # fmt: skip
def test_what_of_json_is_refused(name, content, field, message, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        documents_in(read(str(tmp_path / name), field))
    assert field == [] or str(caught.value).startswith(str(tmp_path / name))


# Long values

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner),
    max_leaves=5,
)


def long_values(monkeypatch, chunk: int) -> None:
    """Makes every value longer than what is parsed at once, in views of a few characters."""
    monkeypatch.setattr(json_rows, "LONG", 2)
    monkeypatch.setattr(json_rows, "SHORT", 10)
    short = json_rows.SHORT_STRING.pattern.replace("1024", "10")
    monkeypatch.setattr(json_rows, "SHORT_STRING", re.compile(short))
    for module in (windows, json_rows):
        monkeypatch.setattr(module, "PIECE", 7)
    monkeypatch.setattr(files, "CHUNK", chunk)


@given(
    rows=st.lists(st.dictionaries(st.text(max_size=5), json_values, max_size=3), max_size=4),
    texts=st.lists(st.text(), min_size=4, max_size=4),
    how=st.fixed_dictionaries(
        {"ensure_ascii": st.booleans(), "indent": st.sampled_from([None, 1])}
    ),
    chunk=st.sampled_from([4, 9, 100]),
)
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
def test_long_values_are_read_as_short_ones(rows, texts, how, chunk, tmp_path, monkeypatch):
    rows = [row | {"text": text} for row, text in zip(rows, texts, strict=False)]
    expected = [row["text"] for row in rows if row["text"]]
    (tmp_path / "x.json").write_text(json.dumps(rows, **how), encoding="utf-8")
    lines = [json.dumps(row, ensure_ascii=how["ensure_ascii"]) for row in rows]
    (tmp_path / "x.jsonl").write_text("\n".join(lines), encoding="utf-8")
    with monkeypatch.context() as patch:
        long_values(patch, chunk)
        for name in ("x.json", "x.jsonl"):
            if expected:
                assert documents_in(read(str(tmp_path / name))) == expected
            else:
                with pytest.raises(UserError, match="no text in"):
                    documents_in(read(str(tmp_path / name)))


@given(
    line=st.text(alphabet='{}[]":,\\u0dac8 \t\x01etx1', max_size=30).map(
        lambda text: f'{{"text": "a", "b": {text}}}'
    )
)
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
def test_long_lines_are_refused_as_short_ones(line, tmp_path, monkeypatch):
    (tmp_path / "x.jsonl").write_text(line)

    def outcome() -> object:
        try:
            return documents_in(read(str(tmp_path / "x.jsonl")))
        except UserError as error:
            return re.sub(r" \(.*| holds .*", "", str(error))

    expected = outcome()
    with monkeypatch.context() as patch:
        long_values(patch, 4)
        assert outcome() == expected


def test_the_line_of_a_long_value_and_what_is_wrong_with_it(tmp_path, monkeypatch):
    long_values(monkeypatch, 4)
    path = tmp_path / "x.jsonl"
    for bad, reason in {
        '{"text": "abcdefghijklmnopqrst\\x"}': "Invalid \\\\escape",
        '{"text": "abcdefghijklmnopqrst': "Unterminated string",
        '{"text": "abcdefghijklmnop\\u12"}': "Unterminated string",
        '{"text": "abcdefghijklmnopqrst"]': "Expecting ',' delimiter",
        '{"text": "abcdefghijklmnopqrst"} {}': "Extra data",
        '{"text": "abcdefghijklmnopqrst\ttab"}': "Unterminated string, or a character",
    }.items():
        path.write_text('{"text": "a"}\n\n' + bad + "\n")
        with pytest.raises(UserError, match=rf"x.jsonl, line 3 is not valid JSON \({reason}"):
            documents_in(read(str(path)))
    path.write_text('{"text": "a"}\n{"text": "abcdefghijklmnopqrstu\\ud800"}\n')
    with pytest.raises(UserError, match="line 2: 'text' is not valid Unicode text"):
        documents_in(read(str(path)))


def test_a_value_of_too_many_small_ones_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(json_rows, "LONG", 100)
    monkeypatch.setattr(json_rows, "MAX_ABRIDGED", 1000)
    rows = [{"text": "a" * 5000, "vector": [0.5] * n} for n in (10, 150, 300)]
    for row in rows[:2]:
        (tmp_path / "x.jsonl").write_text(json.dumps(row))
        assert documents_in(read(str(tmp_path / "x.jsonl"))) == ["a" * 5000]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match=r"x\.jsonl, line 3 has more than 1,000 characters bes"):
        documents_in(read(str(tmp_path / "x.jsonl")))


def test_a_name_in_the_store_is_no_text_of_the_file(tmp_path, monkeypatch):
    """What stands for a long text can't be written by hand."""
    long_values(monkeypatch, 9)
    monkeypatch.setattr("secrets.token_hex", lambda size: "0" * 32)
    long = "a text of more than ten characters"
    row = {"other": long, "text": "b", "name": "0" * 32}
    (tmp_path / "x.jsonl").write_text(json.dumps(row))
    assert documents_in(read(str(tmp_path / "x.jsonl"))) == ["b"]


def test_a_disk_without_room_for_a_long_text(tmp_path, small_disk, monkeypatch):
    long_values(monkeypatch, 1 << 20)
    monkeypatch.setattr("tempfile.tempdir", str(small_disk(200)))
    path: Path = tmp_path / "x.jsonl"
    path.write_text(json.dumps({"text": "a" * 400_000}))
    with pytest.raises(UserError) as caught:
        documents_in(read(str(path)))
    disk = tmp_path / "disk"
    assert (
        str(caught.value) == f"cannot keep a long text of {path} in {disk}: No space left on device"
    )
