"""A long text whose encoding is stopped: the next start continues, and gets the same tokens."""

import gzip
import io
import json
import os
import random
import signal
import subprocess
import sys
import tarfile
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from lit_gpt import storage
from lit_gpt.errors import UserError
from lit_gpt.text import encoding_pool, manifest, new_folder, token_file
from lit_gpt.text import files as files_module
from lit_gpt.text.corpus import load_corpus
from lit_gpt.text.files import TextFiles
from lit_gpt.text.tokenizer import Tokenizer
from lit_gpt.text.vocabularies import Vocabulary
from tests.conftest import ROOT
from tests.text.conftest import entries, text_of, texts_of, write

LINE = "It's 12.5 °C, “fine”!\r\n农夫山泉 天然水，550ml*24瓶。\n\n  été 👩‍👩‍👧 <|endoftext|> word"
SMALL = {  # pieces of which a small text has some
    (files_module, "CHUNK"): 512,
    (encoding_pool, "BATCH"): 100,
    (manifest, "LARGE"): 0,
    (token_file, "MARKED"): 0.0,  # marked after each piece
}


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    for (module, name), value in SMALL.items():
        monkeypatch.setattr(module, name, value)


def numbered(count: int) -> list[str]:
    return [f"{LINE}{i};" for i in range(count)]


def plain(folder: Path) -> None:
    for name in "abc":
        write(folder / f"{name}.txt", "".join(numbered(20)).encode())


def rows(folder: Path) -> None:
    lines = "".join(json.dumps({"text": text}) + "\n" for text in numbered(40))
    write(folder / "x.jsonl.gz", gzip.compress(lines.encode()))
    write(folder / "y.txt", "".join(numbered(20)).encode())


def archive(folder: Path) -> None:
    folder.mkdir()
    with tarfile.open(folder / "x.tar.gz", "w:gz") as tar:
        for i, text in enumerate(numbered(30)):
            member = tarfile.TarInfo(f"{i}.txt")
            member.size = len(text.encode())
            tar.addfile(member, io.BytesIO(text.encode()))


def stop_after(number: int, error: BaseException, patch: pytest.MonkeyPatch) -> list[int]:
    """Raises the error in place of encoding one more batch; returns how many are encoded."""
    encode_parts = Tokenizer.encode_parts
    done = [0]

    def encode(self, texts):
        if done[0] == number:
            raise error
        done[0] += 1
        return encode_parts(self, texts)

    patch.setattr(Tokenizer, "encode_parts", encode)
    return done


def partials(cache: Path) -> list[Path]:
    return list(cache.glob("partial-*"))


KEPT = "Encoding was stopped: the next start continues there\n"


@pytest.mark.parametrize("make", [plain, rows, archive])
@pytest.mark.parametrize("tokenizer", ["bytes", "cl100k_base", "o200k_base", "bpe:300", "chars"])
def test_a_stopped_text_is_continued_to_the_same_tokens(
    make, tokenizer, load, tmp_path, cache_folder, monkeypatch, capsys
):
    make(tmp_path / "texts")
    text = TextFiles(str(tmp_path / "texts"), cache=str(tmp_path / "other"))
    with monkeypatch.context() as patch:
        total = stop_after(-1, AssertionError(), patch)
        expected = load_corpus(text, Vocabulary(tokenizer, True))
    assert total[0] > 12
    for number in (5, 4):
        with monkeypatch.context() as patch:
            stop_after(number, KeyboardInterrupt(), patch)
            with pytest.raises(KeyboardInterrupt):
                load(tmp_path / "texts", tokenizer)
        assert capsys.readouterr().err.endswith(KEPT)
        assert [entries(p) for p in partials(cache_folder)] == [
            ["ids.bin", "mark.json", "source.json"]
        ]
    with monkeypatch.context() as patch:
        rest = stop_after(-1, AssertionError(), patch)
        corpus = load(tmp_path / "texts", tokenizer)
    assert "characters are already encoded: continuing there" in capsys.readouterr().err
    assert corpus.tokens.tobytes() == expected.tokens.tobytes()
    assert (corpus.info, corpus.tokenizer) == (expected.info, expected.tokenizer)
    meta = [(c.folder / "meta.json").read_bytes() for c in (corpus, expected)]
    assert meta[0] == meta[1]
    assert rest[0] <= total[0] - 9 + 2  # batches begin elsewhere
    assert entries(corpus.folder) == ["meta.json", "tokens.bin"]
    assert partials(cache_folder) == []


@pytest.mark.parametrize("error", [MemoryError(), UserError("bad"), OSError(28, "No space")])
def test_what_fails_leaves_nothing(error, load, tmp_path, cache_folder, monkeypatch, capsys):
    plain(tmp_path / "texts")
    with monkeypatch.context() as patch:
        stop_after(5, error, patch)
        with pytest.raises((MemoryError, UserError)):
            load(tmp_path / "texts")
    assert entries(cache_folder) == ["texts"]
    assert capsys.readouterr().err == ""


def test_a_text_that_is_stopped_before_the_first_mark_leaves_nothing(
    load, tmp_path, cache_folder, monkeypatch, capsys
):
    plain(tmp_path / "texts")
    monkeypatch.setattr(token_file, "MARKED", 100.0)
    with monkeypatch.context() as patch:
        stop_after(5, KeyboardInterrupt(), patch)
        with pytest.raises(KeyboardInterrupt):
            load(tmp_path / "texts")
    assert entries(cache_folder) == ["texts"]
    assert capsys.readouterr().err == ""


def stop(load, path: Path, monkeypatch, tokenizer: str = "bytes", number: int = 5) -> None:
    with monkeypatch.context() as patch:
        stop_after(number, KeyboardInterrupt(), patch)
        with pytest.raises(KeyboardInterrupt):
            load(path, tokenizer)


def damage_ids(folder: Path) -> None:
    with (folder / "ids.bin").open("r+b") as file:
        file.write(b"\1")


def another_mark(**changes) -> None:
    def change(folder: Path) -> None:
        mark = storage.read_json(folder / "mark.json")
        storage.write_json(folder / "mark.json", mark | changes)

    return change


@pytest.mark.parametrize(
    ("change", "is_used"),
    [
        (lambda folder: None, True),
        # Written after the mark, as by a process that was killed.
        (lambda folder: (folder / "ids.bin").open("ab").write(b"\1\2\3"), True),
        (damage_ids, False),
        (lambda folder: os.truncate(folder / "ids.bin", 8), False),
        (lambda folder: (folder / "ids.bin").unlink(), False),
        (lambda folder: (folder / "mark.json").write_bytes(b"{}"), False),
        (another_mark(tokenizer="another"), False),
        (another_mark(num_characters=1), False),  # the text is cut elsewhere
        (another_mark(num_parts=1), False),
    ],
)
def test_only_what_is_whole_is_continued(
    change, is_used, load, tmp_path, cache_folder, monkeypatch
):
    plain(tmp_path / "texts")
    stop(load, tmp_path / "texts", monkeypatch)
    (folder,) = partials(cache_folder)
    change(folder)
    with monkeypatch.context() as patch:
        done = stop_after(-1, AssertionError(), patch)
        corpus = load(tmp_path / "texts")
    assert texts_of(corpus) == ["".join(numbered(20))] * 3
    total = len(list(encoding_pool.batches(corpus.parts())))
    assert (done[0] < total) == is_used


def test_what_was_kept_of_a_text_that_changed_is_removed(load, tmp_path, cache_folder, monkeypatch):
    plain(tmp_path / "texts")
    write(tmp_path / "other.txt", "".join(numbered(60)).encode())
    for path, tokenizer in (("texts", "bytes"), ("texts", "chars"), ("other.txt", "bytes")):
        stop(load, tmp_path / path, monkeypatch, tokenizer)
    assert len(partials(cache_folder)) == 3
    write(tmp_path / "texts" / "a.txt", b"new")
    held = partials(cache_folder)  # by other processes, which encode into them
    with ExitStack() as others:
        for partial in held:
            name = partial.name.removeprefix("partial-")
            others.enter_context(storage.held(cache_folder / "texts" / f"{name}.lock"))
        load(tmp_path / "texts", "o200k_base")
    assert partials(cache_folder) == held
    write(tmp_path / "texts" / "a.txt", b"newer")
    load(tmp_path / "texts", "o200k_base")
    (kept,) = partials(cache_folder)  # of the other text
    long_ago = time.time() - new_folder.EXPIRED - 1
    os.utime(kept, (long_ago, long_ago))
    load(write(tmp_path / "third.txt", b"third"))
    assert partials(cache_folder) == []


# Processes

LOAD = f"""
import sys, zlib
sys.path.insert(0, {str(ROOT)!r})
from lit_gpt.text import corpus, encoding_pool, files, manifest, token_file
for module, name, value in {[(m.__name__.rpartition(".")[2], n, v) for (m, n), v in SMALL.items()]}:
    setattr(globals()[module], name, value)
path, cache, tokenizer = sys.argv[1:]
found = corpus.load_corpus(files.TextFiles(path, cache=cache), corpus.Vocabulary(tokenizer, True))
print(zlib.crc32(found.tokens.data))
"""


@pytest.fixture
def begin(cache_folder):
    """Starts loading a text in a process of its own."""
    started = []

    def begin(path: Path, tokenizer: str = "bytes", **env: str) -> subprocess.Popen:
        words = [sys.executable, "-c", LOAD, str(path), str(cache_folder), tokenizer]
        process = subprocess.Popen(
            words,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **env},
        )
        started.append(process)
        return process

    yield begin
    for process in started:
        process.kill()
        process.wait()


def until_marked(process: subprocess.Popen, cache: Path, least: int = 1) -> Path:
    """Waits until so many bytes of ids are marked."""
    while process.poll() is None:
        for mark in cache.glob("partial-*/mark.json"):
            if storage.read_json(mark)["num_ids"] * 4 >= least:
                return mark.parent
        time.sleep(0.001)
    raise AssertionError(process.communicate())


def test_a_killed_process_is_continued(begin, load, tmp_path, cache_folder, capsys, monkeypatch):
    path = write(tmp_path / "x.txt", "".join(numbered(6000)).encode())
    process = begin(path)
    until_marked(process, cache_folder, 40_000)
    process.kill()
    process.wait()
    monkeypatch.setattr(token_file, "MARKED", 100.0)
    corpus = load(path)
    assert "characters are already encoded" in capsys.readouterr().err
    assert text_of(corpus) == path.read_bytes().decode()
    assert partials(cache_folder) == []


def test_ctrl_c_says_that_the_next_start_continues(begin, tmp_path, cache_folder):
    path = write(tmp_path / "x.txt", "".join(numbered(6000)).encode())
    process = begin(path)
    until_marked(process, cache_folder)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    assert KEPT in err
    assert len(partials(cache_folder)) == 1


def test_a_second_process_waits_and_takes_what_the_first_made(begin, load, tmp_path, cache_folder):
    path = write(tmp_path / "x.txt", "".join(numbered(3000)).encode())
    first = begin(path)
    until_marked(first, cache_folder)
    second = begin(path)
    other = begin(path, "o200k_base")  # another vocabulary does not wait
    results = [process.communicate() for process in (first, second, other)]
    assert [p.returncode for p in (first, second, other)] == [0, 0, 0], results
    assert results[0][0] == results[1][0] != results[2][0]
    assert "Another process is encoding this text" in results[1][1]
    assert "Another process" not in results[0][1] + results[2][1]
    assert text_of(load(path)) == path.read_bytes().decode()


def test_if_the_first_process_is_killed_the_one_that_waits_continues(
    begin, load, tmp_path, cache_folder
):
    path = write(tmp_path / "x.txt", "".join(numbered(3000)).encode())
    first = begin(path)
    until_marked(first, cache_folder, 40_000)
    second = begin(path)
    while "waiting for it" not in second.stderr.readline():
        assert second.poll() is None
    first.kill()
    _, err = second.communicate()
    assert second.returncode == 0
    assert "characters are already encoded: continuing there" in err
    assert text_of(load(path)) == path.read_bytes().decode()


@pytest.mark.slow
@pytest.mark.parametrize("tokenizer", ["cl100k_base", "chars", "bpe:300"])
def test_killed_at_random_moments_it_is_still_the_same(tokenizer, begin, tmp_path, cache_folder):
    rows(tmp_path / "texts")
    for name in "defg":
        write(tmp_path / "texts" / f"{name}.txt", "".join(numbered(1500)).encode())
    text = TextFiles(str(tmp_path / "texts"), cache=str(tmp_path / "other"))
    expected = load_corpus(text, Vocabulary(tokenizer, True))
    rng = random.Random(1)
    kills = 0
    while True:
        process = begin(tmp_path / "texts", tokenizer)
        time.sleep(rng.uniform(0.3, 0.8 + 0.2 * kills))  # whether the machine is fast or slow
        if process.poll() is not None:
            break
        process.send_signal(rng.choice([signal.SIGKILL, signal.SIGINT, signal.SIGTERM]))
        process.wait()
        kills += 1
    assert (process.returncode, kills > 2) == (0, True), process.communicate()
    (folder,) = [p.parent for p in cache_folder.glob("*/tokens.bin")]
    for name in ("tokens.bin", "meta.json"):
        assert (folder / name).read_bytes() == (expected.folder / name).read_bytes()
    assert partials(cache_folder) == []
