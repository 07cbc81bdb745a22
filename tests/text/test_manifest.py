"""Starting again on a text that is known: what is read again, and what is not."""

import os
import tarfile
import time
import zipfile
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from lit_gpt import storage
from lit_gpt.errors import UserError
from lit_gpt.text import manifest, token_file
from lit_gpt.text.corpus import load_corpus
from lit_gpt.text.files import Reader, TextFiles
from lit_gpt.text.tokenizer import Tokenizer
from lit_gpt.text.vocabularies import Vocabulary
from tests.text.conftest import entries, text_of, texts_of, unix, write


@pytest.fixture(autouse=True)
def every_text_is_worth_it(monkeypatch):
    monkeypatch.setattr(manifest, "LARGE", 0)
    monkeypatch.setattr(manifest, "SETTLED", 0)


@pytest.fixture
def count_reads(monkeypatch):
    """Names of the files whose bytes are read."""
    read: list[str] = []
    read_bytes = Reader._read_bytes

    def counted(self, path, form):
        read.append(path.name)
        yield from read_bytes(self, path, form)

    monkeypatch.setattr(Reader, "_read_bytes", counted)
    return read


@pytest.fixture
def refuse_to_encode(monkeypatch):
    def refuse() -> None:
        def fail(*args):
            raise AssertionError("encoded again")

        monkeypatch.setattr(Tokenizer, "encode_parts", fail)

    return refuse


def manifests(cache: Path) -> list[Path]:
    return list((cache / "texts").glob("*.json"))


def test_a_text_that_is_known_is_not_read(load, tmp_path, count_reads):
    for name in ("a.txt", "b.txt"):
        write(tmp_path / "texts" / name, name.encode() * 100)
    first = load(tmp_path / "texts")
    assert "a.txt" in count_reads
    count_reads.clear()
    again = load(tmp_path / "texts")
    assert count_reads == []
    assert (again.info, again.tokens.tolist()) == (first.info, first.tokens.tolist())
    assert "".join(part or "\n\n" for part in again.parts()) == text_of(first)  # is still there
    assert count_reads == ["a.txt", "b.txt"]


def overwrite_in_place(path: Path) -> None:
    """As long as before, and as old."""
    stat = path.stat()
    with path.open("r+b") as file:
        file.write(b"X")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def replace_by_a_file_of_that_age(path: Path) -> None:
    stat = path.stat()
    other = write(path.with_name(".other"), b"Y" * stat.st_size)
    os.utime(other, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    other.replace(path)


CHANGES = {
    "appended": lambda path: path.write_bytes(path.read_bytes() + b"!"),
    "overwritten": overwrite_in_place,
    "replaced": replace_by_a_file_of_that_age,
    "removed": Path.unlink,
    "a file more": lambda path: write(path.with_name("c.txt"), b"three"),
    "another order": lambda path: path.rename(path.with_name("z.txt")),
}


@unix
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_noticed(change, load, tmp_path, cache_folder):
    path = write(tmp_path / "texts" / "a.txt", b"one and more\n")
    write(tmp_path / "texts" / "b.txt", b"two")
    before = load(tmp_path / "texts")
    load(tmp_path / "texts")
    CHANGES[change](path)
    after = load(tmp_path / "texts")
    files = sorted((tmp_path / "texts").glob("*.txt"))
    assert texts_of(after) == [file.read_text() for file in files]
    assert after.info.fingerprint != before.info.fingerprint


def test_a_touched_file_is_read_but_not_encoded(load, tmp_path, count_reads, refuse_to_encode):
    path = write(tmp_path / "a.txt", b"one two")
    first = load(path)
    os.utime(path, (1, 1))
    count_reads.clear()
    refuse_to_encode()
    assert load(path).info == first.info
    assert count_reads == ["a.txt"]
    load(path)
    assert count_reads == ["a.txt"]


def test_what_was_changed_just_before_it_was_read_is_read_again(
    load, tmp_path, count_reads, cache_folder, monkeypatch
):
    """A change within the same tick of the clock would not show."""
    monkeypatch.setattr(manifest, "SETTLED", 300_000_000)
    path = write(tmp_path / "a.txt", b"one")
    load(path)
    assert manifests(cache_folder) == []
    time.sleep(0.4)
    load(path)
    assert len(manifests(cache_folder)) == 1
    count_reads.clear()
    load(path)
    assert count_reads == []


@pytest.mark.parametrize(
    ("changed", "modified", "settled"),
    [
        (-3, -3, True),
        (-1, -3, False),
        (-3, -1, False),
        (3, -3, False),  # the clock was set back
        (-3, 3, True),  # touch -d tomorrow
    ],
)
def test_two_seconds_old_is_settled(changed, modified, settled, monkeypatch):
    monkeypatch.undo()
    now = time.time_ns()

    class Stat:
        st_ctime_ns = now + changed * 1_000_000_000
        st_mtime_ns = now + modified * 1_000_000_000

    assert manifest.is_settled(Stat()) == settled


@pytest.mark.parametrize(
    "other", [{"st_size": 2}, {"st_mtime_ns": 2}, {"st_ctime_ns": 2}, {"st_ino": 2}, {"name": "b"}]
)
def test_files_that_differ_in_anything_differ(other):
    """Two files that were made within one tick of the clock differ in their inodes alone."""

    def digest(name: str = "a", **different: int) -> str:
        stamps = manifest.Stamps()
        times = {"st_size": 1, "st_mtime_ns": 1, "st_ctime_ns": 1, "st_ino": 1}
        stamps.add(name, SimpleNamespace(**times | different))
        return stamps.digest

    assert digest() == digest()
    assert digest(**other) != digest()


def test_a_small_text_leaves_no_manifest(load, tmp_path, cache_folder, monkeypatch):
    monkeypatch.setattr(manifest, "LARGE", 100)
    monkeypatch.setattr(manifest, "MANY", 3)
    load(write(tmp_path / "a" / "1", b"x" * 99))
    assert not (cache_folder / "texts").exists()
    load(write(tmp_path / "b" / "1", b"x" * 100))
    assert len(manifests(cache_folder)) == 1
    for i in range(3):
        write(tmp_path / "c" / str(i), b"x")
    load(tmp_path / "c")
    assert len(manifests(cache_folder)) == 2


def test_a_damaged_manifest_is_made_again(load, tmp_path, cache_folder, count_reads):
    path = write(tmp_path / "a.txt", b"one")
    load(path)
    (file,) = manifests(cache_folder)
    content = file.read_bytes()
    for damaged in (b"", content[:-5], content.replace(b'"has_documents": false', b"7")):
        file.write_bytes(damaged)
        count_reads.clear()
        assert text_of(load(path)) == "one"
        assert count_reads == ["a.txt"]
        assert file.read_bytes() == content


def test_how_a_text_is_read_is_part_of_it(load, tmp_path):
    path = write(tmp_path / "a.csv", b"a,b\n1,2\n")
    texts = [text_of(load(path, text_field=field)) for field in (None, "a", "b", None, "a", "b")]
    assert texts == ["a,b\n1,2\n", "1\n\n", "2\n\n"] * 2


def test_a_relative_name_is_the_same_text(load, tmp_path, count_reads, monkeypatch):
    path = write(tmp_path / "a.txt", b"one")
    load(path)
    count_reads.clear()
    monkeypatch.chdir(tmp_path)
    load("a.txt")
    assert count_reads == []


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_archives_are_not_looked_into_again(kind, tmp_path, cache_folder, count_reads):
    members = {"a.txt": b"one", "b.log": b"two", "c.jsonl": b'{"text": "three"}\n'}
    for name, content in members.items():
        write(tmp_path / "in" / name, content)
    where = tmp_path / "texts" / f"x.{kind}"
    write(tmp_path / "texts" / "d.log")
    with zipfile.ZipFile(where, "w") if kind == "zip" else tarfile.open(where, "w") as archive:
        for name in members:
            add = archive.write if kind == "zip" else archive.add
            add(tmp_path / "in" / name, name)
    text = TextFiles(str(tmp_path / "texts"), "*.log", cache=str(cache_folder))

    def look() -> tuple:
        corpus = load_corpus(text, Vocabulary("bytes"))
        return text_of(corpus), corpus.reader.has_documents, dict(corpus.reader.excluded)

    assert look() == ("one\n\nthree\n\n", True, {"*.log": 2})
    count_reads.clear()
    assert look() == ("one\n\nthree\n\n", True, {"*.log": 2})
    assert count_reads == []


def test_if_the_files_were_others_after_all_the_next_start_reads_them(
    load, tmp_path, cache_folder, monkeypatch
):
    """As on a file system that does not keep times."""
    path = write(tmp_path / "a.txt", b"one")
    load(path)
    with monkeypatch.context() as patch:
        patch.setattr(manifest.Stamps, "digest", "always the same")
        load(path)
        write(path, b"two")
        with pytest.raises(UserError, match="changed while it was being read; start again"):
            load(path, tokenizer="cl100k_base")
        assert manifests(cache_folder) == []
        assert text_of(load(path, tokenizer="cl100k_base")) == "two"


def test_a_cache_that_may_only_be_read_still_serves(load, tmp_path, cache_folder, monkeypatch):
    path = write(tmp_path / "a.txt", b"one")
    load(path)

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    os.utime(path, (1, 1))
    monkeypatch.setattr(storage, "write_json", refuse)
    monkeypatch.setattr("filelock.FileLock._acquire", refuse)
    assert text_of(load(path)) == "one"


# Token files


@pytest.fixture
def small_blocks(monkeypatch):
    """tokens.bin of 100 tokens has four blocks, of which one is checked at each start."""
    monkeypatch.setattr(token_file, "BLOCK", 50)
    monkeypatch.setattr(token_file, "CHECKED", 1)
    chosen: list[list[int]] = []

    def choose(self, population, k):
        assert (list(population), k) == ([0, 1, 2, 3], 1)
        return chosen[-1]

    monkeypatch.setattr(token_file.random.SystemRandom, "sample", choose)
    return chosen


def test_a_large_token_file_is_checked_in_full_once_then_in_parts(
    small_blocks, load, tmp_path, cache_folder, capsys, monkeypatch
):
    path = write(tmp_path / "a.txt", b"x" * 100)
    folder = load(path).folder
    checksums = folder / "checksums.json"
    assert checksums.exists()
    tokens = folder / "tokens.bin"
    content = tokens.read_bytes()
    damaged = content[:120] + b"y" + content[121:]  # in the third block

    def damage(times: bool) -> None:
        tokens.write_bytes(damaged)
        if not times:  # as when the disk itself loses a bit
            stat = tokens.stat()
            stamp = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
            known = storage.read_json(checksums)
            storage.write_json(checksums, known | {"stamp": stamp})

    small_blocks.append([1])  # would be checked alone, were it the same file
    damage(times=True)
    assert text_of(load(path)) == "x" * 100
    assert "are damaged: encoding the text again" in capsys.readouterr().err
    damage(times=False)
    load(path)
    assert capsys.readouterr().err == ""
    assert tokens.read_bytes() == damaged  # not seen in the block that was checked
    small_blocks.append([2])
    assert text_of(load(path)) == "x" * 100
    assert "are damaged: encoding the text again" in capsys.readouterr().err
    assert tokens.read_bytes() == content


def test_a_token_file_that_was_just_written_is_checked_in_full_again(
    small_blocks, load, tmp_path, monkeypatch
):
    monkeypatch.setattr(manifest, "SETTLED", 10**12)
    path = write(tmp_path / "a.txt", b"x" * 100)
    for _ in range(2):
        assert entries(load(path).folder) == ["meta.json", "tokens.bin"]


def test_checksums_of_blocks(small_blocks, load, tmp_path):
    folder = load(write(tmp_path / "a.txt", bytes(range(1, 101)))).folder
    tokens = np.arange(1, 101, dtype=np.uint16)
    blocks = [zlib.crc32(tokens[at : at + 25].tobytes()) for at in range(0, 100, 25)]
    assert storage.read_json(folder / "checksums.json")["crc32"] == blocks
