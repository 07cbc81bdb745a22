"""Processes that are started together: one reads the text for all of them."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from lit_gpt import storage
from lit_gpt.text import files as files_module
from lit_gpt.text import launch
from lit_gpt.text.corpus import load_corpus
from lit_gpt.text.files import TextFiles
from lit_gpt.text.vocabularies import Vocabulary
from tests.conftest import ROOT
from tests.text.conftest import text_of, unix, write

# Loads a text, prints its tokens, how many bytes it read and how many batches it encoded.
LOAD = f"""
import json, sys
sys.path.insert(0, {str(ROOT)!r})
from lit_gpt.text import corpus, files
from lit_gpt.text.tokenizer import Tokenizer
found = dict.fromkeys(("read", "looked", "encoded"), 0)
def counted(owner, name, key):
    original = getattr(owner, name)
    def call(*args):
        found[key] += 1
        return original(*args)
    setattr(owner, name, call)
counted(files.Reader, "_read_bytes", "read")
counted(files, "find_files", "looked")
counted(Tokenizer, "encode_parts", "encoded")
text = files.TextFiles(sys.argv[1], cache=sys.argv[2])
loaded = corpus.load_corpus(text, corpus.Vocabulary("bytes"))
print(json.dumps(found | {{"text": bytes(loaded.tokens.tolist()).decode()}}), flush=True)
"""
# torchrun: starts processes at once, prints what they print, and goes on at each line of stdin.
RUN = f"""
import subprocess, sys
for line in sys.stdin:
    words = [sys.executable, "-c", {LOAD!r}, *sys.argv[1:]]
    started = [subprocess.Popen(words, stdout=subprocess.PIPE, text=True) for _ in range(int(line))]
    for process in started:
        print(process.communicate()[0].strip() or "failed", flush=True)
"""
TORCHRUN = {"TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_RESTART_COUNT": "0", "LOCAL_RANK": "0"}


@pytest.fixture
def launcher(cache_folder):
    """`launcher(path)(3)`: what three processes find that are started at once."""
    started = []

    def start(path: Path, **env: str):
        words = [sys.executable, "-c", RUN, str(path), str(cache_folder)]
        process = subprocess.Popen(
            words,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **env},
        )
        started.append(process)

        def run(number: int) -> list:
            process.stdin.write(f"{number}\n")
            process.stdin.flush()
            lines = [process.stdout.readline().strip() for _ in range(number)]
            return [line if line == "failed" else json.loads(line) for line in lines]

        return run

    yield start
    for process in started:
        process.communicate()


@unix
def test_of_processes_that_start_at_once_one_reads(launcher, tmp_path):
    path = write(tmp_path / "x.txt", b"hello")
    found = launcher(path, **TORCHRUN)(3)
    assert [f["text"] for f in found] == ["hello"] * 3
    assert sorted(f["encoded"] for f in found) == [0, 0, 1]
    assert sorted(f["looked"] for f in found) == [0, 0, 1]
    assert sorted(f["read"] for f in found)[:2] == [0, 0]


@unix
def test_all_see_the_text_as_the_first_one_did_until_the_next_launch(launcher, tmp_path):
    path = write(tmp_path / "x.txt", b"hello")
    run = launcher(path, **TORCHRUN)
    run(1)
    write(path, b"changed")
    assert [f["text"] for f in run(2)] == ["hello"] * 2
    assert launcher(path, **TORCHRUN)(1)[0]["text"] == "changed"


def test_processes_that_torchrun_starts_again_are_another_launch(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    names = []
    for attempt in ("0", "0", "1"):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", attempt)
        names.append(launch._launch())
    assert names[0] == names[1] != names[2]


@unix
def test_processes_of_no_launcher_each_look(launcher, tmp_path):
    """As the commands of a batch script, although SLURM sets its variables for them too."""
    path = write(tmp_path / "x.txt", b"hello")
    run = launcher(path, SLURM_PROCID="0", SLURM_LOCALID="0", SLURM_NTASKS="2", LOCAL_RANK="0")
    assert run(1)[0]["text"] == "hello"
    write(path, b"changed")
    assert run(1)[0]["text"] == "changed"


@unix
def test_if_the_first_fails_the_others_say_so_too_and_none_hangs(launcher, tmp_path):
    run = launcher(tmp_path / "x.txt", **TORCHRUN)
    assert run(3) == ["failed"] * 3
    write(tmp_path / "x.txt", b"hello")
    assert [f["text"] for f in run(2)] == ["hello"] * 2


@unix
def test_a_cache_that_is_gone_is_made_again(launcher, tmp_path, cache_folder):
    path = write(tmp_path / "x.txt", b"hello")
    run = launcher(path, **TORCHRUN)
    run(1)
    for meta in cache_folder.glob("*/meta.json"):
        meta.unlink()
    found = run(3)
    assert [f["text"] for f in found] == ["hello"] * 3
    assert sorted(f["encoded"] for f in found) == [0, 0, 1]


def become_another_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(launch, "READ", set())


@pytest.mark.parametrize("launcher_of", ["lightning", "torchrun"])
def test_a_process_that_reads_a_text_again_reads_it_as_it_is_by_then(
    launcher_of, load, tmp_path, monkeypatch
):
    """As a script that trains twice: its first process has a LOCAL_RANK too, the second time."""
    monkeypatch.delenv(launch.VARIABLE, raising=False)
    if launcher_of == "torchrun":
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    path = write(tmp_path / "x.txt", b"hello")
    assert text_of(load(path)) == "hello"
    monkeypatch.setenv("LOCAL_RANK", "0")
    write(path, b"changed")
    assert text_of(load(path)) == "changed"
    become_another_process(monkeypatch)
    load(path)
    write(path, b"again")
    assert text_of(load(path)) == "again"


def test_what_lightning_starts_takes_what_its_first_process_found(
    load, tmp_path, monkeypatch, cache_folder
):
    """Its launcher starts the other processes from the first one, later."""
    monkeypatch.delenv(launch.VARIABLE, raising=False)
    text = write(tmp_path / "x.txt", b"hello\n")
    other = write(tmp_path / "y.txt", b"other\n")
    for path in (text, other):
        load(path)
    become_another_process(monkeypatch)
    write(text, b"changed")
    monkeypatch.setattr(files_module, "find_files", None)  # not called
    for path, content in ((text, "hello\n"), (other, "other\n")):
        corpus = load(path)
        assert text_of(corpus) == content
        assert not corpus.reader.has_documents
    monkeypatch.undo()
    assert text_of(load(text)) == "changed"


def test_what_was_excluded_is_told_too(tmp_path, monkeypatch, cache_folder):
    monkeypatch.delenv(launch.VARIABLE, raising=False)
    for name in ("a.txt", "b.log", "c.log"):
        write(tmp_path / "texts" / name)
    text = TextFiles(str(tmp_path / "texts"), ["*.log", "no"], cache=str(cache_folder))
    load_corpus(text, Vocabulary("bytes"))
    become_another_process(monkeypatch)
    reader = load_corpus(text, Vocabulary("bytes")).reader
    assert reader.excluded == {"*.log": 2, "no": 0}
    assert [path.name for path in reader.paths] == ["a.txt"]
    assert reader.excluded == {"*.log": 2, "no": 0}


def test_only_a_few_texts_are_passed_on(load, tmp_path, monkeypatch):
    """A process that reads thousands has an environment of a limited size."""
    monkeypatch.setattr(launch, "MAX_TOLD", 3)
    monkeypatch.delenv(launch.VARIABLE, raising=False)
    folders = [load(write(tmp_path / f"{i}", b"%d" % i)).folder.name for i in range(5)]
    told = json.loads(os.environ[launch.VARIABLE])
    assert [name for name, _ in told.values()] == folders[-3:]


def test_files_of_old_launches_are_removed(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    old = write(tmp_path / "texts" / "launch-old.json")
    new = write(tmp_path / "texts" / "launch-new.lock")
    other = write(tmp_path / "texts" / "other.json")
    for path in (old, other):
        os.utime(path, (1, 1))
    with launch.texts_of_launch(tmp_path) as texts:
        texts.tell("x", "name", launch.Known("f", False, {}))
        assert texts.find("x") == ("name", launch.Known("f", False, {}))
        assert texts.find("y") is None
    assert (old.exists(), new.exists(), other.exists()) == (False, True, True)


def test_whoever_comes_later_waits_for_the_lock(tmp_path):
    order = []
    entered = threading.Event()

    def later() -> None:
        with storage.held(tmp_path / "x" / "lock") as is_held:
            order.append(is_held)

    with storage.held(tmp_path / "x" / "lock") as is_held:
        thread = threading.Thread(target=later)
        thread.start()
        entered.wait(0.1)
        order.append("first")
        assert is_held
        with storage.held(tmp_path / "x" / "lock", wait=False) as is_held_twice:
            assert not is_held_twice
    thread.join(10)
    assert order == ["first", True]
