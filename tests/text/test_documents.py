"""Documents in the files that people have: kept exactly, told apart, or refused in one line."""

import bz2
import csv
import gzip
import hashlib
import json
import lzma
import os
import random
import re
import subprocess
import sys
import tracemalloc
import zlib
from itertools import product
from pathlib import Path

import numpy as np
import pyarrow
import pytest
import torch
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from lit_gpt.callbacks.checkpoints import save_atomically
from lit_gpt.command import run
from lit_gpt.errors import UserError
from lit_gpt.generation import generate as generate_command
from lit_gpt.generation.sampling import Sampling, generate
from lit_gpt.model import GPT, GPTConfig
from lit_gpt.text import files as files_module
from lit_gpt.text.compression import unpack
from lit_gpt.text.corpus import Corpus
from lit_gpt.text.files import Reader, TextFiles
from lit_gpt.text.finding import find_files
from lit_gpt.text.overlap import SharedLines, shared_lines
from tests.conftest import ROOT
from tests.text.conftest import load_once

DOCUMENTS = [
    "农夫山泉 天然水，550ml*24瓶",
    "two\r\nlines\rand \"three\"\n",
    "<|endoftext|>",
    "\ufeffa mark, \x85\u2028 \t 🦊 e\u0301",
    "NULL",
    " ",
    "last",
]  # fmt: skip
PACK = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.compress,
}


def xz_with_a_huge_window() -> bytes:
    """A small .xz file whose header asks for a window of 3 GB."""
    content = bytearray(lzma.compress(b"text"))
    content[16] = 39  # of the block's header, which is bytes 12 to 24 and ends with its checksum
    content[20:24] = zlib.crc32(content[12:20]).to_bytes(4, "little")
    return bytes(content)


@pytest.mark.parametrize("kind", ["jsonl", "ndjson", "json", "csv", "tsv", "txt"])
def test_a_line_of_any_length_takes_little_memory(kind, tmp_path):
    """However small the file: this one has 80 KB."""
    path = tmp_path / f"x.{kind}.gz"
    with gzip.open(path, "wb") as file:
        file.write({"csv": b'text,n\n"', "tsv": b"text\tn\n", "txt": b""}.get(kind, b'{"text": "'))
        for _ in range(40):
            file.write(b"word " * 200_000)
        file.write({"csv": b'",1', "tsv": b"\t1", "txt": b""}.get(kind, b'", "n": 1}'))
    fields = [] if kind == "txt" else ["text"]
    tracemalloc.start()
    try:
        num_characters = sum(len(part or "") for part in read(str(path), *fields))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert num_characters == 40_000_000
    assert peak < 16_000_000


def zst_with_a_long_window(text: bytes) -> bytes:
    """As `zstd --long=28` writes it."""
    params = zstandard.ZstdCompressionParameters(window_log=28, hash_log=6, chain_log=6)
    packer = zstandard.ZstdCompressor(compression_params=params).compressobj()
    return packer.compress(text) + packer.flush()


def write_documents(path: Path, documents: list[str], field: str = "text") -> Path:
    """A file as its library writes it, of the kind and packed as its name ends."""
    kind, _, packed = path.name.partition(".")[2].partition(".")
    plain = path.with_name("plain")
    if kind == "jsonl":
        lines = (json.dumps({"id": i, field: d}) + "\n" for i, d in enumerate(documents))
        plain.write_text("".join(lines), encoding="utf-8")
    elif kind == "parquet":
        table = pyarrow.table({"id": range(len(documents)), field: documents})
        parquet.write_table(table, plain, row_group_size=max(3, len(documents) // 2))
    else:
        with plain.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, "excel-tab" if kind == "tsv" else "excel")
            writer.writerow(["id", field])
            writer.writerows(enumerate(documents))
    path.write_bytes(PACK[f".{packed}" if packed else ""](plain.read_bytes()))
    plain.unlink()
    return path


def documents_of(corpus: Corpus) -> list[str]:
    """The text between the end-of-text tokens; after the last one there must be none."""
    tokens, end = corpus.tokens, corpus.tokenizer.end_of_text
    *documents, rest = np.split(tokens, np.flatnonzero(tokens == end) + 1)
    assert len(rest) == 0
    return [corpus.tokenizer.decode_bytes(ids[:-1].tolist()).decode() for ids in documents]


def read(
    paths: str | list[str],
    field: str | list[str] | None = None,
    encoding: str = "utf-8",
    tsv_quotes: bool = True,
) -> Reader:
    return Reader(TextFiles(paths, None, encoding, field, tsv_quotes))


def documents_in(reader: Reader) -> list[str]:
    documents = [""]
    for part in reader:
        documents = [*documents, ""] if part is None else [*documents[:-1], documents[-1] + part]
    assert documents.pop() == ""
    return documents


# Documents


@pytest.mark.parametrize("packed", PACK)
@pytest.mark.parametrize("kind", ["jsonl", "csv", "tsv", "parquet"])
def test_documents_are_kept_exactly_in_every_format(kind, packed, load, tmp_path):
    path = write_documents(tmp_path / f"x.{kind}{packed}", DOCUMENTS, "内容")
    corpus = load(path, text_field="内容", tsv_quotes=True)
    assert documents_of(corpus) == DOCUMENTS
    info = corpus.info
    text = "".join(DOCUMENTS)
    assert (info.num_characters, info.num_bytes) == (len(text), len(text.encode()))
    assert info.num_tokens == info.num_bytes + len(DOCUMENTS)
    assert (info.num_documents, info.empty_documents) == (len(DOCUMENTS), 0)
    assert (info.removed_boms, info.added_line_ends) == (0, 0)
    assert corpus.tokenizer.token_lengths()[corpus.tokens].sum() == info.num_bytes


@pytest.mark.parametrize("compact", [True, False])
@pytest.mark.parametrize("name", ["cl100k_base", "bytes"])
def test_each_document_is_encoded_on_its_own(name, compact, load, tmp_path):
    corpus = load(write_documents(tmp_path / "x.jsonl", DOCUMENTS), name, compact)
    full = load_once(name)
    expected = [piece for d in DOCUMENTS for piece in [*map(full.tokens.__getitem__,
                full.encode(d)), b"\n\n"]]  # fmt: skip
    assert [corpus.tokenizer.tokens[i] for i in corpus.tokens] == expected
    assert corpus.tokenizer.end_of_text == corpus.tokenizer.vocab_size - 1
    if not compact:
        assert corpus.tokenizer.vocab_size == full.vocab_size + 1
    assert full.end_of_text is None


@given(
    documents=st.lists(st.text(), min_size=1, max_size=8), chunk=st.sampled_from([1, 5, 1 << 20])
)
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_documents_come_back_from_every_format(documents, chunk, tmp_path, monkeypatch):
    monkeypatch.setattr(files_module, "CHUNK", chunk)
    texts = [d for d in documents if d]
    for kind in ("jsonl", "csv", "tsv", "parquet"):
        if kind in ("csv", "tsv"):  # where a NUL byte is the sign of a binary file
            documents = [d.replace("\0", "") for d in documents]
            texts = [d for d in documents if d]
        for packed in PACK:
            path = write_documents(tmp_path / f"x.{kind}{packed}", documents)
            reader = read(str(path), "text")
            if texts:
                assert documents_in(reader) == texts, (kind, packed)
                assert reader.counts["num_documents"] == len(texts)
                assert reader.counts["empty_documents"] == len(documents) - len(texts)
            else:
                with pytest.raises(UserError, match=re.escape(f"path: no text in {path}; name a")):
                    documents_in(reader)


@pytest.mark.parametrize("chunk", [1, 2, 3, 1 << 20])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_line_ends_of_any_kind_between_rows_and_inside_of_fields(end, chunk, tmp_path, monkeypatch):
    monkeypatch.setattr(files_module, "CHUNK", chunk)
    rows = ["text,id", '"a\r\nb",1', "", 'c "d" e,2', '"f\r""g""\n",3']
    for last in ("", end):
        (tmp_path / "x.csv").write_bytes(end.join(rows).encode() + last.encode())
        reader = read(str(tmp_path / "x.csv"), "text")
        assert documents_in(reader) == ["a\r\nb", 'c "d" e', 'f\r"g"\n']
        lines = end.join(f'{{"text": "{i}\\n"}}' for i in range(3)) + last
        (tmp_path / "x.jsonl").write_bytes(lines.encode())
        if end != "\r":  # which ends no line of .jsonl
            assert documents_in(read(str(tmp_path / "x.jsonl"))) == ["0\n", "1\n", "2\n"]


def test_nulls_and_empty_texts_are_left_out_and_counted(load, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": null}\n{"text": ""}\n{"text": "a"}\n')
    parquet.write_table(pyarrow.table({"text": [None, "b", ""]}), tmp_path / "b.parquet")
    corpus = load([str(tmp_path / "a.jsonl"), str(tmp_path / "b.parquet")])
    assert documents_of(corpus) == ["a", "b"]
    assert (corpus.info.num_documents, corpus.info.empty_documents) == (2, 4)


@pytest.mark.parametrize("kind", ["large_string", "dictionary"])
def test_texts_of_a_parquet_file_may_be_of_any_kind_of_string(kind, load, tmp_path):
    texts = pyarrow.array(["农夫", "b", "农夫"])
    texts = texts.cast("large_string") if kind == "large_string" else texts.dictionary_encode()
    parquet.write_table(pyarrow.table({"a.b": texts}), tmp_path / "x.parquet")
    assert documents_of(load(tmp_path / "x.parquet", text_field="a.b")) == ["农夫", "b", "农夫"]


def test_the_encoding_and_the_mark_are_those_of_the_file(load, tmp_path):
    line = json.dumps({"text": "农夫"}, ensure_ascii=False)
    (tmp_path / "x.JSONL.GZ").write_bytes(gzip.compress(line.encode("utf-16")))
    corpus = load(tmp_path / "x.JSONL.GZ", encoding="utf-16")
    assert documents_of(corpus) == ["农夫"]
    assert corpus.info.removed_boms == 1
    (tmp_path / "x.csv").write_bytes("\ufefftext\r\n农夫\r\n".encode())
    assert documents_of(load(tmp_path / "x.csv", text_field="text")) == ["农夫"]


def test_a_plain_text_among_documents_is_one_too(load, tmp_path):
    write_documents(tmp_path / "b.jsonl", ["one", "two"])
    (tmp_path / "a.txt").write_bytes(b"plain\ntext")
    (tmp_path / "c.csv").write_bytes(b"x,y\n1,2")
    (tmp_path / "d.md").write_bytes(b"")
    corpus = load(tmp_path)
    assert documents_of(corpus) == ["plain\ntext", "one", "two", "x,y\n1,2"]
    assert (corpus.info.num_documents, corpus.info.added_line_ends) == (4, 0)


def test_other_fields_are_other_corpora(load, tmp_path):
    (tmp_path / "x.csv").write_text("a,b\n1,2\n3,4\n")
    assert documents_of(load(tmp_path / "x.csv", text_field="a")) == ["1", "3"]
    assert documents_of(load(tmp_path / "x.csv", text_field="b")) == ["2", "4"]
    plain = load(tmp_path / "x.csv")
    assert plain.tokenizer.decode(plain.tokens) == "a,b\n1,2\n3,4\n"
    assert len(list((tmp_path / "cache").iterdir())) == 3
    (tmp_path / "x.csv").rename(tmp_path / "x.tsv")  # the same bytes, read otherwise
    (tmp_path / "x.tsv").write_text("a\tb\n1,2\t3\n")
    first = load(tmp_path / "x.tsv", text_field="a").info.fingerprint
    (tmp_path / "x.tsv").rename(tmp_path / "x.csv")
    with pytest.raises(UserError, match="line 1 has no field 'a'"):
        load(tmp_path / "x.csv", text_field="a")
    assert load(tmp_path / "x.csv").info.fingerprint != first


def test_a_document_ends_its_line(tmp_path, load):
    corpus = load(write_documents(tmp_path / "x.jsonl", ["a b", "c\nd", "a b", "c", "e"]))
    tokens, tokens_of = corpus.tokens, corpus.tokenizer.tokens
    cut = tokens.tolist().index(corpus.tokenizer.end_of_text, 5) + 1  # after the second document
    assert shared_lines(tokens[:cut], tokens[cut:], tokens_of) == SharedLines(3, 2, 4 / 5)


# Plain text


def test_plain_text_is_what_it_always_was(load, tmp_path):
    """Fingerprint and vocabulary know nothing of documents; only ends of files are new."""
    for name in ("a.txt", "b.md", "c.csv", "d.tsv", "e.jsonnet", "f"):
        (tmp_path / "texts" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "texts" / name).write_text("<|endoftext|>, 农夫\t山泉")
    corpus = load(tmp_path / "texts", "cl100k_base")
    full = load_once("cl100k_base")
    ids = full.encode("<|endoftext|>, 农夫\t山泉")
    compact, new_ids = full.compact(ids)
    end = compact.vocab_size
    assert corpus.tokens.tolist() == [*new_ids[ids], end] * 5 + [*new_ids[ids]]
    assert (corpus.tokenizer.tokens, corpus.tokenizer.end_of_text) == (
        [*compact.tokens, b"\n\n"],
        end,
    )
    assert (corpus.info.num_documents, corpus.info.file_ends) == (0, 5)
    assert corpus.info.added_line_ends == 0
    part = "<|endoftext|>, 农夫\t山泉".encode()
    expected = hashlib.sha256((part + f"end {len(part)}".encode()) * 6).hexdigest()
    assert corpus.info.fingerprint == expected


@pytest.mark.parametrize("packed", [packed for packed in PACK if packed])
def test_packed_plain_text(packed, load, tmp_path):
    text = "农夫\r\n山泉 " * 1000
    (tmp_path / f"x.txt{packed}").write_bytes(PACK[packed](text.encode()))
    corpus = load(tmp_path / f"x.txt{packed}")
    assert corpus.tokenizer.decode(corpus.tokens) == text
    assert corpus.tokenizer.end_of_text not in corpus.tokens
    assert corpus.tokenizer.learnt_end is None


@pytest.mark.parametrize("packed", [packed for packed in PACK if packed])
def test_streams_in_a_row_are_one(packed, load, tmp_path):
    parts = [b"one", b"", b"t\xe5", b"\x86\x9c"]
    content = b"".join(map(PACK[packed], parts))
    (tmp_path / f"x{packed}").write_bytes(content + bytes(512))  # padding
    corpus = load(tmp_path / f"x{packed}")
    assert corpus.tokenizer.decode(corpus.tokens) == "onet农"


def test_a_large_zst_file_may_have_a_long_window(load, tmp_path):
    noise = random.Random(0).randbytes(8_400_000).hex().encode()  # is packed to a half
    content = zst_with_a_long_window(noise + b"text")
    assert zstandard.get_frame_parameters(content).window_size == 1 << 28
    assert 16 * 2 * len(content) >= 1 << 28 > 16 * len(content)
    path = tmp_path / "x.zst"
    path.write_bytes(content)
    with pytest.raises(UserError, match="needs too much memory to unpack"):
        list(read(str(path)))
    path.write_bytes(content * 2)
    assert sum(len(text) for text in read(str(path))) == 2 * (2 * 8_400_000 + 4)


# Which files


@pytest.fixture
def texts(tmp_path, monkeypatch) -> Path:
    names = ("a.txt", "b.md", "sub/a.txt", "sub/deep/c.txt", "sub/.hidden.txt", "[x].txt", "x.txt")
    for name in names:
        path = tmp_path / "texts" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    monkeypatch.chdir(tmp_path / "texts")
    return tmp_path / "texts"


@pytest.mark.parametrize(
    ("paths", "found"),
    [
        ("**/*.txt", ["[x].txt", "a.txt", "sub/a.txt", "sub/deep/c.txt", "x.txt"]),
        ("*", ["[x].txt", "a.txt", "b.md", "sub/a.txt", "sub/deep/c.txt", "x.txt"]),
        ("s*", ["sub/a.txt", "sub/deep/c.txt"]),
        ("sub/**", ["sub/a.txt", "sub/deep/c.txt"]),
        ("[x].txt", ["[x].txt"]),  # the file of that name
        ("[xa].txt", ["a.txt", "x.txt"]),
        (["x.txt", "a.txt"], ["x.txt", "a.txt"]),
        (["sub", "*.txt", "sub/a.txt"], ["sub/a.txt", "sub/deep/c.txt", "[x].txt", "a.txt",
                                         "x.txt"]),
        (["a.txt", "../texts/a.txt", "a.txt"], ["a.txt"]),
    ],
)  # fmt: skip
def test_lists_and_globs(paths, found, texts):
    assert [path.as_posix() for path in find_files(paths)] == found


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        ("*.csv", "path '*.csv': matches no files"),
        ("nowhere/**/*.csv", "path 'nowhere/**/*.csv': matches no files"),
        ("a.txt/*", "path 'a.txt/*': matches no files"),
        (["a.txt", "b.txt"], "path 'b.txt': no such file or folder"),
        (["a.txt", "*.b"], "path '*.b': matches no files"),
        ([], "path []: names no files; name a file or folder"),
    ],
)
def test_what_leads_to_no_file(paths, message, texts):
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        find_files(paths)


def test_a_link_to_nothing_is_said_in_a_glob_too(texts):
    (texts / "w.txt").symlink_to("nowhere")
    with pytest.raises(UserError, match=r"^cannot read w.txt: the link is broken$"):
        find_files("*.txt")


def test_files_from_here_and_from_the_root(texts):
    for name in ("a.txt", "b.md"):
        (texts / name).write_text("")
    reader = read(["a.txt", str(texts / "b.md")])
    with pytest.raises(UserError, match=r"^path: no text in path; name a file"):
        documents_in(reader)


# What is refused


def table(**columns) -> bytes:
    sink = pyarrow.BufferOutputStream()
    parquet.write_table(pyarrow.table(columns), sink)
    return sink.getvalue().to_pybytes()


def flipped(content: bytes, at: float) -> bytes:
    place = int(len(content) * at)
    return content[:place] + bytes([content[place] ^ 0x55]) + content[place + 1 :]


BAD_UTF8 = pyarrow.Array.from_buffers(
    pyarrow.string(),
    2,
    [None, pyarrow.py_buffer(np.array([0, 1, 2], np.int32)), pyarrow.py_buffer(b"a\xff")],
)
ONE = b'{"text": "one"}\n'
LINES = {  # contents of a .jsonl or .csv file (text_field: text), and what is said of it
    "x.jsonl": [
        (b"\r\n \t\n", "path: no text in {}"),
        (ONE + b'{"text": "tw', "{}, line 2 is not valid JSON (Unterminated string starting at: c"),
        (ONE * 2 + b"{'text': 1}", "{}, line 3 is not valid JSON (Expecting property name"),
        (b'{"text": "a"} {"text": "b"}', "{}, line 1 is not valid JSON (Extra data: column 15)"),
        (b"[" * 100_000, "{}, line 1 is not valid JSON (maximum recursion depth exceeded"),
        (b"9" * 5000, "{}, line 1 is not a JSON object such as"),
        (ONE + b'["one"]', '{}, line 2 is not a JSON object such as {{"text": ...}}'),
        (ONE + b"null", "{}, line 2 is not a JSON object"),
        (b'\n{"text": "a"}\n5', "{}, line 3 is not a JSON object"),
        (ONE + b'{"t": 1, "Text": 2}', "{}, line 2 has no field 'text'; name one with --text_"
         "field, or leave the file out, in a folder with --exclude; there are 't', 'Text'"),
        (b"{}", "{}, line 1 has no field 'text'; name one with --text_field, or leave"
         " the file out, in a folder with --exclude; there are none"),
        (b'{"text": 5}', "{}, line 1: 'text' holds a number, not text"),
        (b'{"text": ["a"]}', "{}, line 1: 'text' holds a list, not text"),
        (b'{"text": {}}', "{}, line 1: 'text' holds an object, not text"),
        (b'{"text": true}', "{}, line 1: 'text' holds a boolean, not text"),
        (ONE + b'{"text": "\\ud800"}', "{}, line 2: 'text' is not valid Unicode text: 'utf-8'"),
        (ONE + b'{"text": "\xff"}', "{} is not utf-8 text (byte 0xff at offset 26)"),
        (ONE + b"\0", "{} looks like a binary file (NUL byte at offset 16)"),
        (b"", "path: no text in {}; name a file that has some"),
        (b'{"text": null}', "path: no text in {}"),
    ],
    "x.csv": [
        (b"id,body\n1,a\n", "{}, line 1 has no field 'text'; name one with --text_field, or"
         " leave the file out, in a folder with --exclude; there are 'id', 'body'"),
        (b"\n\ntext\tid\n", "{}, line 3 has no field 'text'"),
        (b"text,text\n1,a\n", "{}, line 1 has 2 fields 'text'"),
        (b"text,id\na,1\nb,c,2\n", "{}, line 3 has more than its header's 2 fields; put text that"),
        (b'text,id\n"a\nb",1\nb\n', "{}, line 4 has 1 of its header's 2 fields; put text that"),
        (b'text,id\n\n"a" b,1\n', "{}, line 3 has ' ' after a field in double quotes; put"),
        (b'text,id\na,1\n"b,1\nc,2\n', "{}, line 3 has a field in double quotes that never ends"),
        (b"text,id\n", "path: no text in {}"),
        (b"", "path: no text in {}"),
    ],
    "x.tsv": [(b"text\tid\n1,a\n", "{}, line 2 has 1 of its header's 2 fields; a .tsv file has"
               " no quoting unless you set --tsv_quotes")],
    "x.txt": [(b"text", "text_field 'text': is for .json(l), .csv, .tsv and .parquet files, and"
               " {} has none; leave it out")],
    "x.parquet": [
        (b"", "{} cannot be read as .parquet: "),
        (b"PAR1 and no more", "{} cannot be read as .parquet: "),
        (table(body=["a"], id=[1]), "{} has no field 'text'; name one with --text_field, or"
         " leave the file out, in a folder with --exclude; there are 'body', 'id'"),
        (table(**{f"c{i}": [i] for i in range(30)}), "'c19' and 10 more"),
        (table(text=[1]), "{}: column 'text' holds int64, not text; name another one with"),
        (table(text=[["a"]]), "{}: column 'text' holds list<"),
        (table(text=[b"a", b"\xff"]), "{}, row 2: 'text' is not valid Unicode text: 'utf-8' codec"),
        (table(text=pyarrow.array([], pyarrow.string())), "path: no text in {}; name a file"),
        (table(text=pyarrow.array([None], pyarrow.string())), "path: no text in {}; name a"),
        (table(text=BAD_UTF8), "{} cannot be read as .parquet after row 1: 'utf-8' codec can't"),
    ],
    "x.gz": [
        (b"plain", "{} is not a valid .gz file (Error -3 while decompressing data: incorr"),
        (gzip.compress(b"text")[:-1], "{} is truncated; get the file again"),
        (gzip.compress(b"text") + b"more", "{} is not a valid .gz file (Error -3"),
    ],
    "x.zst": [
        (b"plain", "{} is not a valid .zst file ("),
        (zstandard.compress(b"text")[:-1], "{} is truncated; get the file again"),
        (zstandard.compress(b"text") + b"more", "{} is not a valid .zst file ("),
        (zst_with_a_long_window(b"text"), "{} needs too much memory to unpack; unpack it"
         " first, with zstd -d --long=31"),
    ],
    "x.bz2": [
        (b"plain", "{} is not a valid .bz2 file (Invalid data stream): it is damaged or in"),
        (bz2.compress(b"text")[:-1], "{} is truncated; get the file again"),
        (bz2.compress(b"text") + b"more", "{} is not a valid .bz2 file (Invalid data stream)"),
    ],
    "x.xz": [
        (b"plain text " * 9, "{} is not a valid .xz file (Input format not supported by decoder)"),
        (lzma.compress(b"text")[:-1], "{} is truncated; get the file again"),
        (lzma.compress(b"text") + b"more" * 9, "{} is not a valid .xz file (Input format not"),
        (xz_with_a_huge_window(), "{} needs too much memory to unpack; unpack it first, with xz"),
    ],
}  # fmt: skip
CASES = [(name, *case) for name, cases in LINES.items() for case in cases]


@pytest.fixture
def refusal(load, capfd):
    """The one line that is said of a file, which leaves nothing in the cache."""

    def refusal(path: Path, cache: Path, **options) -> str:
        capfd.readouterr()
        status = run(lambda: load(path, **options) and None)
        out, err = capfd.readouterr()
        assert (status, out, len(err.splitlines())) == (2, "", 1), err
        assert err.startswith("error: ")
        assert list(cache.glob("*")) == []
        return err.removeprefix("error: ")

    return refusal


@pytest.mark.parametrize(
    ("name", "content", "message"), CASES, ids=[f"{c[0]}-{i}" for i, c in enumerate(CASES)]
)
def test_what_cannot_be_read_is_one_line_and_leaves_nothing(
    name, content, message, refusal, tmp_path
):
    (tmp_path / name).write_bytes(content)
    options = {} if name[1:] in PACK or name == "x.jsonl" else {"text_field": "text"}
    said = refusal(tmp_path / name, tmp_path / "cache", **options)
    assert message.format(tmp_path / name) in said


@pytest.mark.parametrize(
    ("name", "content"),
    [("x.txt", b"a"), ("x.csv", b"id\na"), ("x.tsv", b"a\n"), ("x.jsonl", ONE), ("x.json", ONE)],
)
def test_a_field_that_is_not_there_is_refused_whatever_is_cached(name, content, load, tmp_path):
    path = tmp_path / name
    path.write_bytes(content)
    for _ in range(2):
        with pytest.raises(UserError, match="text_field"):
            load(path, text_field="body")
        load(path)  # now its text is in the cache


@pytest.mark.parametrize(
    ("kind", "packed"),
    [*product(["jsonl", "csv", "parquet"], [".gz", ".zst"]), ("parquet", "")],
)
def test_a_file_that_was_cut_or_damaged_is_refused_or_whole(
    kind, packed, load, refusal, tmp_path, monkeypatch
):
    """Wherever: what is packed has checksums; no bad file is read halfway."""
    texts = [f"{i} {random.Random(i).random()} 农夫" for i in range(300)]
    path = write_documents(tmp_path / f"x.{kind}{packed}", texts)
    if packed == ".zst":  # with a checksum, as the zstd command makes them
        plain = zstandard.ZstdDecompressor().decompressobj().decompress(path.read_bytes())
        path.write_bytes(zstandard.ZstdCompressor(write_checksum=True).compress(plain))
    content = path.read_bytes()
    for at in (0.01, 0.3, 0.6, 0.95, 0.999):
        path.write_bytes(content[: int(len(content) * at)])
        assert str(path) in refusal(path, tmp_path / "cache", text_field="text")
        if packed:
            path.write_bytes(flipped(content, at))
            if not (packed == ".gz" and at == 0.01):  # its header holds a name and a time
                assert str(path) in refusal(path, tmp_path / "cache", text_field="text")
    path.write_bytes(content)
    assert documents_of(load(path, text_field="text")) == texts


@pytest.mark.parametrize(
    ("name", "package", "extra"),
    [("x.parquet", "pyarrow", "parquet"), ("x.jsonl.zst", "zstandard", "zstd")],
)
def test_a_package_that_is_not_there_is_named(name, package, extra, refusal, tmp_path, monkeypatch):
    path = write_documents(tmp_path / name, DOCUMENTS)
    monkeypatch.setitem(sys.modules, package, None)
    said = refusal(path, tmp_path / "cache")
    assert said == f'{path} needs the package {package}; install it: pip install -e ".[{extra}]"\n'


@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz", "x.csv.zst", "x.parquet"])
def test_a_change_while_reading_is_noticed(name, tmp_path):
    path = write_documents(tmp_path / name, DOCUMENTS * 4000)
    parts = iter(read(str(path)))
    next(parts)
    with path.open("ab") as file:
        file.write(ONE if name == "x.jsonl" else b"\0")  # what does no harm otherwise
    with pytest.raises(UserError, match=f"^{re.escape(str(path))} changed while it was being read"):
        list(parts)


def test_a_packed_parquet_file_that_has_no_room(refusal, tmp_path, small_disk, monkeypatch):
    texts = [str(random.Random(i).random()) for i in range(40_000)]
    path = write_documents(tmp_path / "x.parquet.gz", texts)
    monkeypatch.setattr("tempfile.tempdir", str(small_disk(200)))
    said = refusal(path, tmp_path / "cache")
    assert said == f"cannot unpack {path} in {tmp_path}/disk: No space left on device\n"
    assert list((tmp_path / "disk").iterdir()) == []


def test_a_checkpoint_of_plain_text_is_not_given_documents(load, tmp_path):
    path = write_documents(tmp_path / "x.jsonl", DOCUMENTS)
    with pytest.raises(
        UserError, match=r"^path: has documents, but the model's tokenizer has no end-of-text"
    ):
        load(path, load_once("bytes"), False)
    with_documents = load(path).tokenizer
    assert documents_of(load(path, with_documents, False)) == DOCUMENTS
    (tmp_path / "x.txt").write_text("plain")
    plain = load(tmp_path / "x.txt", with_documents, False)  # the other way is fine
    assert plain.tokenizer == with_documents
    assert plain.tokens.tolist() == [*b"plain"]


# Memory and time


def test_rows_are_read_piece_by_piece(tmp_path):
    texts = [f"{i} " + "农夫山泉 " * 50 for i in range(20_000)]  # 13 MB
    for name in ("x.jsonl.gz", "x.parquet"):
        path = write_documents(tmp_path / name, texts)
        reader, digest = read(str(path), "text"), hashlib.sha256()
        pieces = most_arrow = 0
        tracemalloc.start()
        for part in reader:
            pieces += part is None
            most_arrow = max(most_arrow, pyarrow.total_allocated_bytes())
            digest.update((part or "\0").encode())
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert (pieces, reader.counts["num_documents"]) == (20_000, 20_000)
        assert digest.digest() == hashlib.sha256(("\0".join(texts) + "\0").encode()).digest()
        assert most < 6e6, name
        assert most_arrow < 6e6


@pytest.mark.parametrize("packed", ["gz", "bz2", "xz", "zst"])
def test_a_bomb_is_unpacked_piece_by_piece(packed, tmp_path):
    bomb = PACK[f".{packed}"](b"a" * (1 << 28))
    assert len(bomb) < 1 << 19
    size = 0
    tracemalloc.start()
    for chunk in unpack(tmp_path, packed, [bomb, b""]):
        size += len(chunk)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert size == 1 << 28
    assert most < 100e6


def test_what_is_not_used_is_not_imported(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(ONE * 3)
    code = (
        "import sys; from lit_gpt.text import corpus, files\n"
        "text = files.TextFiles('x.jsonl', cache='cache')\n"
        "corpus.load_corpus(text, corpus.Vocabulary('bytes'))\n"
        "print({'pyarrow', 'zstandard'} & set(sys.modules))"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("set()\n", 0), done.stderr


# The commands


def test_training_on_a_list_says_the_documents_and_goes_on_with_the_same_field(train, tmp_path):
    for name in ("a.jsonl.gz", "b.parquet"):
        write_documents(tmp_path / name, DOCUMENTS * 20, "body")
    options = {"data.path": f'["{tmp_path}/*.gz", {tmp_path}/b.parquet]', "data.text_field": "body"}
    result = train(**options)
    assert result.status == 0, result.err
    assert f"Documents: {len(DOCUMENTS) * 40}\n" in result.out
    assert result.run.data.tokenizer.end_of_text is not None
    result = train(**options, **{"trainer.max_steps": 8, "ckpt_path": "last"})
    assert (result.status, result.evaluated) == (0, [8]), result.err
    config = tmp_path / "logs" / "version_0" / "config.yaml"
    again = train(f"--config={config}", "--ckpt_path=last", "--trainer.max_steps=10", defaults={})
    assert (again.status, again.evaluated) == (0, [10]), again.err
    write_documents(tmp_path / "a.jsonl.gz", DOCUMENTS * 20, "id2")
    write_documents(tmp_path / "b.parquet", DOCUMENTS * 20, "id2")
    options |= {"data.text_field": "id2", "trainer.max_steps": 12}
    result = train(**options, ckpt_path="last")
    assert (result.status, len(result.err.splitlines())) == (2, 1)
    assert "text_field was body and is now id2" in result.err


def test_a_text_without_documents_says_nothing_of_them(train):
    assert "Documents" not in train().out


def test_generated_text_ends_with_the_document(tmp_path, capsys):
    tokenizer = load_once("bytes").with_end_of_text()
    torch.manual_seed(0)
    config = GPTConfig(tokenizer.vocab_size, 8, 8, 1, 1)
    model = GPT(config).eval()
    weights = {f"gpt.{name}": value for name, value in model.state_dict().items()}
    content = {"gpt": vars(config), "tokenizer": tokenizer.to_dict(), "state_dict": weights}
    save_atomically(content, tmp_path / "x.ckpt")
    options = [f"--ckpt_path={tmp_path / 'x.ckpt'}", "--max_new_tokens=3000"]
    options += ["--temperature=1", "--seed=2"]
    for prompt, ids in {"农": [*"农".encode()], "": [256]}.items():
        new = generate(model, torch.tensor([ids]), 3000, Sampling(1.0), 2, tokenizer)
        new = [int(i) for i in new]
        end = new.index(256)
        assert 0 < end < 2999
        generate_command.main([*options, f"--prompt={prompt}"])
        written = tokenizer.decode_bytes(new[:end]).decode()
        assert capsys.readouterr().out == f"{prompt}{written}\n"
