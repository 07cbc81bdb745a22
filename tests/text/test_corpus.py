"""Text files to one token array: exactly the text, encoded piece by piece, cached by content."""

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest

from lit_gpt import storage
from lit_gpt.command import run
from lit_gpt.errors import UserError
from lit_gpt.text import vocabularies
from lit_gpt.text.corpus import load_corpus
from lit_gpt.text.files import TextFiles
from lit_gpt.text.tokenizer import Tokenizer
from lit_gpt.text.vocabularies import Vocabulary
from tests.conftest import ROOT
from tests.text.conftest import entries, load_once, text_of, texts_of, unix, write

CHUNK = 1 << 20  # bytes that are read at a time, unless a test says otherwise
BOM = "\ufeff".encode()
LINE = "It's 12.5 °C, “fine”!\r\n农夫山泉 天然水，550ml*24瓶。\n\n  été 👩‍👩‍👧 <|endoftext|> word1;"
MIXED = LINE * 3


# The text


@pytest.mark.parametrize(
    "text",
    ["a\r\nb\rc\n", "👩‍👩‍👧 e\u0301", "<|endoftext|>", "农夫山泉", "  \t a  ", "a\ufeffb", MIXED],
    ids=["CRLF", "emoji", "endoftext", "Chinese", "white space", "BOM inside", "mixed"],
)
@pytest.mark.parametrize(
    ("tokenizer", "compact"),
    [("bytes", True), ("cl100k_base", True), ("cl100k_base", False), ("o200k_base", True)],
)
def test_tokens_decode_to_exactly_the_text(text, tokenizer, compact, load, tmp_path):
    corpus = load(write(tmp_path / "x.txt", text.encode()), tokenizer, compact)
    assert text_of(corpus) == text
    assert corpus.info.removed_boms == 0


@pytest.mark.parametrize(
    ("text", "characters", "num_bytes", "tokens"),
    [
        ("hello world", 11, 11, 2),
        ("农夫", 2, 6, 4),
        ("<|endoftext|>", 13, 13, 7),
        ("I'm 1234567", 11, 11, 6),
        ("hello\r\nworld", 12, 12, 3),
    ],
)
def test_counts(text, characters, num_bytes, tokens, load, tmp_path):
    info = load(write(tmp_path / "x.txt", text.encode()), "cl100k_base").info
    counts = info.num_characters, info.num_bytes, info.num_tokens, info.removed_boms
    assert counts == (characters, num_bytes, tokens, 0)
    assert info.added_line_ends == 0


def test_byte_order_mark_is_removed_and_counted(load, tmp_path):
    corpus = load(write(tmp_path / "x.txt", BOM + b"hello"))
    assert text_of(corpus) == "hello"
    assert (corpus.info.removed_boms, corpus.info.num_bytes) == (1, 5)


@pytest.mark.parametrize("encoding", ["gb18030", "utf-16", "utf-16-le", "latin-1"])
def test_other_encodings(encoding, load, tmp_path):
    text = "été\r\n" if encoding == "latin-1" else MIXED
    path = write(tmp_path / "x.txt", text.encode(encoding))
    assert text_of(load(path, encoding=encoding)) == text


@pytest.mark.parametrize(
    ("files", "text"),
    [
        ({"b.txt": b"two", "a.txt": b"one"}, ["one", "two"]),
        ({"a": b"one\n", "b": b"two\r\n", "c": b"three"}, ["one\n", "two\r\n", "three"]),
        ({"a": BOM + b"one", "b": b"", "c": BOM + b"two", "d": b""}, ["one", "two"]),
        ({"2.txt": b"two", "10.txt": b"ten"}, ["ten", "two"]),
        ({"b.txt": b"1", "a/z.txt": b"0", "c/d/e.txt": b"2"}, ["0", "1", "2"]),
        ({"a": b"one", ".hidden": b"\0", ".git/config": b"\0", "b/.x/y": b"\0"}, ["one"]),
    ],
)
@pytest.mark.parametrize("tokenizer", ["bytes", "chars", "cl100k_base", "bpe:300"])
def test_folder_is_read_in_name_order_with_an_end_of_text_between_files(
    tokenizer, files, text, load, tmp_path
):
    for name, content in files.items():
        write(tmp_path / "texts" / name, content)
    corpus = load(tmp_path / "texts", tokenizer)
    assert texts_of(corpus) == text
    assert corpus.info.num_characters == corpus.info.num_bytes == len("".join(text))
    assert corpus.info.removed_boms == sum(content.startswith(BOM) for content in files.values())
    assert (corpus.info.file_ends, corpus.info.added_line_ends) == (len(text) - 1, 0)
    assert corpus.tokenizer.end_of_text == corpus.tokenizer.vocab_size - 1


@pytest.mark.parametrize(
    ("files", "text"),
    [
        ([b"one", b"two"], "one\ntwo"),
        ([b"one\n", b"two\r\n", b"three"], "one\ntwo\r\nthree"),
        ([b"one", b"", b"two"], "one\ntwo"),
    ],
)
def test_a_model_without_an_end_of_text_has_line_ends_between_files(
    files, text, load, tmp_path, cache_folder
):
    for i, content in enumerate(files):
        write(tmp_path / "texts" / str(i), content)
    source = TextFiles(str(tmp_path / "texts"), cache=str(cache_folder))
    named = Vocabulary("bytes", compact=True, ends_files=False)  # as earlier releases read it
    for vocabulary in (Vocabulary(load_once("bytes")), named):
        corpus = load_corpus(source, vocabulary)
        assert text_of(corpus) == text
        assert (corpus.tokenizer.vocab_size, corpus.tokenizer.end_of_text) == (256, None)
        joints = text.count("\n") - b"".join(files).count(b"\n")
        assert (corpus.info.file_ends, corpus.info.added_line_ends) == (None, joints)
    assert load(tmp_path / "texts").folder != corpus.folder


def test_what_earlier_releases_cached_is_found(tmp_path, cache_folder):
    """The key of a text that is read as they did is theirs."""
    path = write(tmp_path / "x.txt", b"hello")
    vocabulary = Vocabulary("bytes", compact=True, ends_files=False)
    corpus = load_corpus(TextFiles(str(path), cache=str(cache_folder)), vocabulary)
    fingerprint = hashlib.sha256(b"helloend 5").hexdigest()
    key = json.dumps([4, fingerprint, "bytes", True, "utf-8"]).encode()
    assert corpus.folder.name == hashlib.sha256(key).hexdigest()[:24]
    meta = json.loads((corpus.folder / "meta.json").read_text())
    assert meta["value"]["tokenizer"].keys() == {"name", "pattern", "vocabulary"}
    for name in ("file_ends", "compact_tokens"):  # as they wrote it
        del meta["value"]["info"][name]
    storage.write_json(corpus.folder / "meta.json", meta["value"])
    again = load_corpus(TextFiles(str(path), cache=str(cache_folder)), vocabulary)
    assert (again.folder, again.info) == (corpus.folder, corpus.info)


def test_folder_inside_a_hidden_folder_is_read(load, tmp_path):
    write(tmp_path / ".hidden" / "texts" / "a", b"one")
    assert text_of(load(tmp_path / ".hidden" / "texts")) == "one"


@pytest.mark.parametrize(
    ("tokenizer", "compact", "vocab_size", "dtype"),
    [
        ("cl100k_base", True, 266, np.uint16),
        ("cl100k_base", False, 100_257, np.uint32),
        ("bytes", True, 257, np.uint16),
        ("bytes", False, 257, np.uint16),
    ],
)
def test_array_is_as_narrow_as_the_vocabulary_allows(
    tokenizer, compact, vocab_size, dtype, load, tmp_path
):
    corpus = load(write(tmp_path / "x.txt", b"hello world"), tokenizer, compact)
    assert (corpus.tokenizer.vocab_size, corpus.tokens.dtype) == (vocab_size, dtype)
    assert corpus.tokens.tolist() == corpus.tokenizer.encode("hello world").tolist()


# Piece by piece


@pytest.mark.parametrize("compact", [True, False])
@pytest.mark.parametrize("cut", range(4))  # bytes of MIXED that are read with what comes before
def test_corpus_of_several_chunks_has_the_tokens_of_the_whole(cut, compact, load, tmp_path):
    text = "word " * (CHUNK // 5)
    text = text[: CHUNK - len(BOM) - cut] + MIXED[MIXED.index("农") :] + MIXED
    text += "\ufeff" * 9  # inside a text it is kept
    corpus = load(write(tmp_path / "x.txt", BOM + text.encode()), "cl100k_base", compact)
    full = load_once("cl100k_base")
    split = [corpus.tokenizer.tokens[i] for i in corpus.tokens]
    assert split == [full.tokens[i] for i in full.encode(text)]
    assert corpus.tokens.tolist() == corpus.tokenizer.encode(text).tolist()
    assert corpus.info.num_bytes == len(text.encode())
    assert corpus.info.num_characters == len(text)
    assert corpus.info.removed_boms == 1


@pytest.mark.parametrize(
    ("piece", "megabytes"),
    [
        ("aé=1中😀", 3),
        ("x", 2),  # one word: byte-pair encoding of 10 MB of it alone takes 8 s
        *(
            pytest.param(x, 10, marks=pytest.mark.slow)
            for x in ("x", "=", " ", "😀", "👩‍👩‍👧", "\u0301")
        ),
    ],
)
def test_one_long_line_without_white_space(piece, megabytes, load, tmp_path):
    text = piece * (megabytes * 1_000_000 // len(piece.encode()))
    corpus = load(write(tmp_path / "x.txt", text.encode()), "cl100k_base")
    assert text_of(corpus) == text
    assert corpus.info.num_characters == len(text)


def test_one_million_spaces(load, tmp_path):
    text = "a" + " " * 1_000_000 + "b"
    assert text_of(load(write(tmp_path / "x.txt", text.encode()), "cl100k_base")) == text


# The cache


def test_second_time_the_cache_is_used(load, tmp_path, monkeypatch):
    path = write(tmp_path / "x.txt", MIXED.encode())
    first = load(path, "cl100k_base")

    def refuse(*args):
        raise AssertionError("encoded again")

    monkeypatch.setattr(vocabularies, "load_tokenizer", refuse)
    monkeypatch.setattr(Tokenizer, "encode", refuse)
    again = load(path, "cl100k_base")
    renamed = load(path.rename(tmp_path / "y.txt"), "cl100k_base")
    for second in (again, renamed):
        assert second.tokens.tolist() == first.tokens.tolist()
        assert (second.tokenizer, second.info) == (first.tokenizer, first.info)


@pytest.mark.parametrize(
    ("other", "text"),
    [
        ({}, "hello there"),
        ({"tokenizer": "o200k_base"}, "hello world"),
        ({"compact": False}, "hello world"),
        ({"encoding": "latin-1"}, "hello world"),
    ],
    ids=["content", "tokenizer", "compactness", "encoding"],
)
def test_cache_is_keyed_by(other, text, load, tmp_path, cache_folder):
    options = {"tokenizer": "cl100k_base", "compact": True, "encoding": "utf-8"}
    path = write(tmp_path / "x.txt", b"hello world")
    stat, first = path.stat(), load(path, **options)
    write(path, text.encode())  # as long as before, and as old
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    second = load(path, **options | other)
    assert len(entries(cache_folder)) == 2
    assert (text_of(first), text_of(second)) == ("hello world", text)


def test_two_texts_of_one_name_have_two_caches(load, tmp_path):
    paths = [write(tmp_path / folder / "x.txt", folder.encode()) for folder in ("one", "two")]
    for _ in range(2):
        assert [text_of(load(path)) for path in paths] == ["one", "two"]


def test_the_same_bytes_in_other_files_are_another_text(load, tmp_path):
    for folder, contents in {"one": [b"ab", b"c"], "two": [b"a", b"bc"]}.items():
        for i, content in enumerate(contents):
            write(tmp_path / folder / f"{i}.txt", content)
    assert texts_of(load(tmp_path / "one")) == ["ab", "c"]
    assert texts_of(load(tmp_path / "two")) == ["a", "bc"]


def without_rank_0(meta: bytes) -> bytes:
    return meta.replace(b"AA== 0", b"")


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("meta.json", None),  # what is left when writing stops halfway
        ("meta.json", lambda content: b""),
        ("meta.json", lambda content: content[:100]),
        ("meta.json", lambda content: b"[]"),
        ("meta.json", lambda content: b"\xff"),
        ("meta.json", without_rank_0),
        ("meta.json", lambda content: content.replace(b'"num_bytes": 11', b'"num_bytes": 12')),
        ("meta.json", lambda content: b"[" * 100_000),
        ("tokens.bin", lambda content: content[:4] + b"\0" + content[5:]),  # another text
        ("tokens.bin", lambda content: content[:4] + b"\xff\xff" + content[6:]),  # no such token
        ("tokens.bin", None),
        ("tokens.bin", lambda content: b""),
        ("tokens.bin", lambda content: content[:-2]),
        ("tokens.bin", lambda content: content[:-1]),
        ("tokens.bin", lambda content: content + b"\0\0"),
    ],
)
def test_damaged_cache_is_built_again(file, damage, load, tmp_path, cache_folder, capsys):
    path = write(tmp_path / "x.txt", b"hello world")
    load(path)
    load(path)
    assert capsys.readouterr().err == ""
    (folder,) = cache_folder.iterdir()
    content = (folder / file).read_bytes()
    (folder / file).unlink()
    if damage:
        (folder / file).write_bytes(damage(content))
    assert text_of(load(path)) == "hello world"
    assert (folder / file).read_bytes() == content
    assert entries(cache_folder) == [folder.name]
    assert capsys.readouterr() == (
        "",
        f"The tokens in {folder} are damaged: encoding the text again\n",
    )


def test_a_cache_with_a_token_that_is_in_no_vocabulary_is_built_again(load, tmp_path, cache_folder):
    """Even if the checksum fits: training would end in an IndexError."""
    path = write(tmp_path / "x.txt", b"hello world")
    load(path)
    (folder,) = cache_folder.iterdir()
    tokens = np.fromfile(folder / "tokens.bin", np.uint16)
    tokens[3] = 257
    tokens.tofile(folder / "tokens.bin")
    meta = storage.read_json(folder / "meta.json")
    storage.write_json(folder / "meta.json", meta | {"crc32": zlib.crc32(tokens.tobytes())})
    assert text_of(load(path)) == "hello world"


@pytest.mark.parametrize("value", [{"a": [1, 0.1, None]}, None])
def test_what_is_remembered_is_computed_again_if_it_was_changed(value, load, tmp_path, capsys):
    corpus = load(write(tmp_path / "x.txt", b"hello world"))
    assert corpus.remember("it", lambda: value) == value
    assert corpus.remember("it", lambda: "not again") == value
    path = corpus.folder / "it.json"
    content = path.read_bytes()
    for changed in (content.replace(b"1", b"2"), content[:-1], b"", b"[]", b"\xff", b"7"):
        path.write_bytes(changed)
        assert corpus.remember("it", lambda: value) == value
        assert capsys.readouterr() == ("", f"{path} is damaged: computing it again\n")
        assert path.read_bytes() == content


@pytest.fixture
def tokenizing(tmp_path, cache_folder):
    """A process that is in the midst of tokenizing a text, stopped there, and its folder."""
    if not hasattr(signal, "SIGSTOP"):
        pytest.skip("a process can't be stopped here")
    code = (
        "import sys; from lit_gpt.text import corpus, files\nfiles.CHUNK = 4096\n"
        "text = files.TextFiles(sys.argv[1], cache=sys.argv[2])\n"
        "corpus.load_corpus(text, corpus.Vocabulary('bytes'))"
    )
    path = write(tmp_path / "long.txt", MIXED.encode() * 20_000)
    process = subprocess.Popen([sys.executable, "-c", code, path, cache_folder])
    while process.poll() is None:
        if any(p.stat().st_size for p in cache_folder.glob("unfinished-*/corpus/ids.bin")):
            break
        time.sleep(0.001)
    process.send_signal(signal.SIGSTOP)
    (work,) = cache_folder.glob("unfinished-*")
    yield process, path, work
    process.kill()
    process.wait()


def age(folder: Path, seconds: float) -> None:
    os.utime(folder, (time.time() - seconds,) * 2)


@pytest.mark.parametrize("seconds", [0, 120])
def test_what_a_killed_process_left_is_removed_a_minute_later(
    seconds, tokenizing, load, tmp_path, cache_folder
):
    process, _, work = tokenizing
    process.kill()
    process.wait()
    assert entries(work) == ["corpus", "lock"]
    age(work, seconds)
    assert text_of(load(write(tmp_path / "x.txt", b"hello world"))) == "hello world"
    assert work.exists() == (seconds == 0)
    assert len(entries(cache_folder)) == 1 + (seconds == 0)


def test_the_folder_of_a_process_at_work_is_left_alone_however_old(
    tokenizing, load, tmp_path, cache_folder
):
    process, path, work = tokenizing
    age(work, 3600)
    load(write(tmp_path / "x.txt", b"hello world"))
    assert entries(work) == ["corpus", "lock"]
    process.send_signal(signal.SIGCONT)
    assert process.wait() == 0
    assert not work.exists()
    assert [entries(folder) for folder in cache_folder.iterdir()] == [
        ["meta.json", "tokens.bin"]
    ] * 2
    assert text_of(load(path)) == path.read_bytes().decode()


def test_a_folder_without_a_lock_is_removed_a_minute_later(load, tmp_path, cache_folder):
    """As that of a process that was killed before it could lock it: only seen, then removed."""
    for name, seconds in {"unfinished-old": 120, "unfinished-new": 0, "other": 120}.items():
        write(cache_folder / name / "ids.bin", b"\0")
        age(cache_folder / name, seconds)
    load(write(tmp_path / "x.txt", b"hello world"))
    assert set(entries(cache_folder)) >= {"unfinished-old", "unfinished-new", "other"}
    age(cache_folder / "unfinished-old", 120)
    load(write(tmp_path / "x.txt", b"hello there"))
    assert set(entries(cache_folder)) >= {"unfinished-new", "other"}
    assert len(entries(cache_folder)) == 4


@pytest.mark.parametrize("error", [OSError(37, "No locks available"), NotImplementedError()])
def test_without_locks_corpora_are_built_and_nothing_is_removed(
    error, load, tmp_path, cache_folder, monkeypatch
):
    def refuse(*args):
        raise error

    monkeypatch.setattr("filelock.FileLock._acquire", refuse)
    write(cache_folder / "unfinished-old" / "ids.bin", b"\0")
    age(cache_folder / "unfinished-old", 120)
    assert text_of(load(write(tmp_path / "x.txt", b"hello"))) == "hello"
    assert "unfinished-old" in entries(cache_folder)
    assert len(entries(cache_folder)) == 2


def raise_on_second_call(error: BaseException):
    """An `encode` that works once."""
    encode, calls = Tokenizer.encode, []

    def encode_once(self, text):
        calls.append(text)
        if len(calls) > 1:
            raise error
        return encode(self, text)

    return encode_once


@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError()])
def test_interrupted_run_leaves_nothing_half_made(error, load, tmp_path, cache_folder, monkeypatch):
    path = write(tmp_path / "x.txt", MIXED.encode())
    with monkeypatch.context() as patch:
        patch.setattr(Tokenizer, "encode", raise_on_second_call(error))
        with pytest.raises(type(error)):
            load(path)
    assert entries(cache_folder) == []
    assert text_of(load(path)) == MIXED


def test_the_slower_of_two_processes_keeps_the_folder_of_the_quicker_one(
    load, tmp_path, cache_folder, monkeypatch
):
    path = write(tmp_path / "x.txt", b"hello world")
    inodes = []

    def inode() -> int:
        (tokens,) = cache_folder.glob("*/tokens.bin")
        return tokens.stat().st_ino

    def encode_after_another_process(tokenizer, texts, encode_parts=Tokenizer.encode_parts):
        monkeypatch.setattr(Tokenizer, "encode_parts", encode_parts)
        load(path)
        inodes.append(inode())
        return encode_parts(tokenizer, texts)

    monkeypatch.setattr(Tokenizer, "encode_parts", encode_after_another_process)
    assert text_of(load(path)) == "hello world"
    assert [inode()] == inodes


# Errors


@pytest.mark.parametrize(
    ("content", "encoding", "message"),
    [
        (b"", "utf-8", "path: no text in {}; name a file that has some"),
        (BOM, "utf-8", "path: no text in {}; name a file that has some"),
        (b"caf\xe9 au lait", "utf-8", "{} is not utf-8 text (byte 0xe9 at offset 3); name its enc"),
        (b"abc\xe5\x86", "utf-8", "{} is not utf-8 text (byte 0xe5 at offset 3); name its enc"),
        (BOM + b"a\xff", "utf-8", "{} is not utf-8 text (byte 0xff at offset 4); name its enc"),
        (
            b"a" * 1_500_000 + b"\xff" + b"a" * CHUNK,
            "utf-8",
            "{} is not utf-8 text (byte 0xff at offset 1,500,000); name its encoding",
        ),
        (
            b"a" * (CHUNK - 1) + b"\xe5\x86x",  # cut by the border of two chunks
            "utf-8",
            "{} is not utf-8 text (byte 0xe5 at offset 1,048,575); name its encoding",
        ),
        (
            b"a" * (2 * CHUNK - 2) + b"\xe5\x86",
            "utf-8",
            "{} is not utf-8 text (byte 0xe5 at offset 2,097,150); name its encoding",
        ),
        (
            "农夫".encode("gb18030") + b"\xff",
            "gb18030",
            "{} is not gb18030 text (byte 0xff at offset 4); name its encoding",
        ),
        ("农夫".encode(), "ascii", "{} is not ascii text (byte 0xe5 at offset 0); name its enc"),
        (
            "odd".encode("utf-16") + b"!",
            "utf-16",
            "{} is not utf-16 text (byte 0x21 at offset 8); name its encoding",
        ),
        (b"hello", "utf-16", "{} is not utf-16 text"),
        (b"\x7fELF\2\1\1\0", "utf-8", "{} is a program, not text; leave it out"),
        (b"hello", "utf-9", "encoding 'utf-9': unknown encoding; try utf-8 or gb18030"),
        (b"hello", "rot13", "encoding 'rot13': unknown encoding; try utf-8 or gb18030"),
        (b"hello", "base64", "encoding 'base64': unknown encoding; try utf-8 or gb18030"),
    ],
)
def test_text_that_cannot_be_used(content, encoding, message, load, tmp_path, cache_folder):
    load(write(tmp_path / "good.txt", b"hello"))
    before, path = entries(cache_folder), write(tmp_path / "bad.txt", content)
    with pytest.raises(UserError, match=re.escape(message.format(path))):
        load(path, encoding=encoding)
    assert entries(cache_folder) == before


def test_error_names_the_file_of_a_folder_and_the_offset_in_it(load, tmp_path):
    write(tmp_path / "texts" / "a.txt", b"good")
    bad = write(tmp_path / "texts" / "b.txt", b"bad \xff")
    with pytest.raises(
        UserError, match=re.escape(f"{bad} is not utf-8 text (byte 0xff at offset 4)")
    ):
        load(tmp_path / "texts")


def test_folders_without_text(load, tmp_path):
    write(tmp_path / "hidden" / ".a.txt", b"hidden")
    write(tmp_path / "empty" / "a.txt", b"")
    with pytest.raises(
        UserError, match=f"^path {re.escape(repr(str(tmp_path / 'hidden')))}: no files in this"
    ):
        load(tmp_path / "hidden")
    with pytest.raises(
        UserError, match=re.escape(f"path: no text in {tmp_path / 'empty' / 'a.txt'}; name")
    ):
        load(tmp_path / "empty")


@pytest.mark.parametrize(
    "name",
    [
        "missing.csv",
        "missing/folder",
        "x" * 300,
    ],
    ids=["file", "folder", "too long"],
)
def test_missing_path(name, load, tmp_path):
    path = str(tmp_path / name)
    with pytest.raises(UserError, match=f"^path {re.escape(repr(path))}: no such file or folder$"):
        load(path)


def test_a_text_that_is_changed_while_it_is_encoded_leaves_nothing(
    load, tmp_path, cache_folder, monkeypatch
):
    path = write(tmp_path / "x.txt", b"0 text\r\n" * 400_000)  # more than is encoded at once

    def truncate_and_encode(tokenizer, texts, encode_parts=Tokenizer.encode_parts):
        os.truncate(path, 50_000)
        return encode_parts(tokenizer, texts)

    monkeypatch.setattr(Tokenizer, "encode_parts", truncate_and_encode)
    with pytest.raises(UserError, match=f"^{re.escape(str(path))} changed while it was being read"):
        load(path)
    assert entries(cache_folder) == []


@unix
@pytest.mark.parametrize(
    ("cache_name", "reason"), [("a file", "File exists"), ("a file/folder", "Not a directory")]
)
def test_cache_that_cannot_be_written(cache_name, reason, tmp_path):
    path, _ = write(tmp_path / "x.txt", b"hello"), write(tmp_path / "a file", b"in the way")
    where = tmp_path / cache_name
    with pytest.raises(UserError) as error:
        load_corpus(TextFiles(str(path), cache=str(where)), Vocabulary("bytes"))
    assert str(error.value) == (
        f"cache: cannot store the tokens in {where}: {reason}; name another folder"
    )


@pytest.mark.parametrize("megabytes", [0.2, 1.0], ids=["while renumbering", "while encoding"])
@pytest.mark.parametrize("damaged_before", [False, True])
def test_full_disk_is_one_line_and_leaves_nothing(
    damaged_before, megabytes, load, tmp_path, small_disk, capfd
):
    """4 bytes a token are written first, then 2 more."""
    small_disk = small_disk(1024)
    small, path = (
        write(tmp_path / "small", b"x"),
        write(tmp_path / "x", b"x" * int(megabytes * 1e6)),
    )
    load_corpus(TextFiles(str(small), cache=str(small_disk)), Vocabulary("bytes"))
    if damaged_before:
        for meta in small_disk.glob("*/meta.json"):
            meta.unlink()
    before = [(p, p.read_bytes()) for p in small_disk.rglob("*") if p.is_file()]
    text = TextFiles(str(path), cache=str(small_disk))
    status = run(lambda: load_corpus(text, Vocabulary("bytes")))
    assert (status, capfd.readouterr().err) == (
        2,
        f"error: --cache: cannot store the tokens in {small_disk}: No space left on device; "
        "name another folder\n",
    )
    assert [(p, p.read_bytes()) for p in small_disk.rglob("*") if p.is_file()] == before
    again = load_corpus(TextFiles(str(small), cache=str(small_disk)), Vocabulary("bytes"))
    assert text_of(again) == "x"
    assert len(entries(small_disk)) == 1


@pytest.mark.slow
def test_memory_does_not_grow_with_the_text(tmp_path):
    """Of a process without torch; the tokens count as memory if they are mapped and read."""
    code = (
        "import re, sys; from pathlib import Path; from lit_gpt.text import corpus, files\n"
        "text = files.TextFiles(sys.argv[1], cache=sys.argv[2])\n"
        "corpus.load_corpus(text, corpus.Vocabulary('cl100k_base', True))\n"
        "status = Path('/proc/self/status').read_text()\n"
        "print(re.search(r'VmHWM:\\s+(\\d+) kB', status)[1])"
    )
    if sys.platform != "linux":
        pytest.skip("reads /proc")
    lines = "".join(f"{i * 7919 % 1000003} and {i * 31 % 977} apples\n" for i in range(400_000))
    peaks = []
    for times in (1, 8):  # 9 and 70 MB
        path = write(tmp_path / "x.txt", lines.encode() * times)
        words = [sys.executable, "-c", code, path, tmp_path / f"cache{times}"]
        done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, check=True)
        peaks.append(int(done.stdout) / 1000)
    assert peaks[1] < 220
    assert peaks[1] - peaks[0] < 40
