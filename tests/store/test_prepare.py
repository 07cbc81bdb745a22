"""The prepare command: what it writes, how tasks share the work, what it refuses."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import zlib
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from obstore.exceptions import PermissionDeniedError

from lit_gpt.__main__ import main
from lit_gpt.errors import UserError
from lit_gpt.store import prepare as prepare_command
from lit_gpt.store.objects import Objects
from lit_gpt.store.plan import load_tokenizer, share, sizes_of
from lit_gpt.text.files import Reader, TextFiles
from lit_gpt.text.tokenizer import BYTES, Tokenizer
from lit_gpt.text.vocabularies import load_tokenizer as load_bytes
from tests.conftest import ROOT

PAGE = 8192  # tokens


def read_index(folder: Path) -> dict:
    return json.loads((folder / "index.json").read_text())["value"]


def tokens_of(folder: Path) -> np.ndarray:
    """The tokens of a store, read from its files without the package."""
    index = read_index(folder)
    parts = []
    for shard in index["shards"]:
        content = (folder / shard["name"]).read_bytes()
        size = shard["num_tokens"] * np.dtype(index["dtype"]).itemsize
        parts.append(np.frombuffer(content[:size], f"<u{size // shard['num_tokens']}"))
    return np.concatenate(parts)


def test_a_store_has_all_tokens_of_the_text_whatever_the_tasks(
    store, texts, ids, prepare, tmp_path
):
    assert (tokens_of(store) == ids).all()
    status, out, err = prepare(texts, tmp_path / "one")
    assert (status, err) == (0, "")
    assert (tokens_of(tmp_path / "one") == ids).all()
    assert f"Total: {len(ids):,} tokens" in out
    sizes = [shard["num_tokens"] for shard in read_index(tmp_path / "one")["shards"]]
    assert sizes == [3000] * (len(ids) // 3000) + [len(ids) % 3000]


def test_the_index_says_what_the_text_is(store, texts, ids):
    index = read_index(store)
    size = sum(len(path.read_text(encoding="utf-8")) for path in texts.iterdir())
    wanted = {"num_characters": size, "num_bytes": len(ids) - 4, "num_tokens": len(ids)}
    wanted |= {"added_line_ends": 0, "num_documents": 0, "file_ends": 4}
    assert {name: index["info"][name] for name in wanted} == wanted
    assert (index["format"], index["version"]) == ("lit_gpt token store", 1)
    assert (index["dtype"], index["block_tokens"]) == ("uint16", 500)
    text = "\n\n".join(path.read_text("utf-8") for path in sorted(texts.iterdir()))
    assert Tokenizer.from_dict(index["tokenizer_state"]).decode(ids) == text


def test_a_shard_has_a_checksum_of_each_page(texts, ids, prepare, tmp_path):
    prepare(texts, tmp_path / "store", "--shard_tokens=100000")
    (shard,) = read_index(tmp_path / "store")["shards"]
    content = (tmp_path / "store" / shard["name"]).read_bytes()
    pages = [ids[at : at + PAGE].astype("<u2").tobytes() for at in range(0, len(ids), PAGE)]
    trailer = b"".join(zlib.crc32(page).to_bytes(4, "little") for page in pages)
    assert len(pages) == 3
    assert content == b"".join(pages) + trailer
    assert shard["checksum"] == zlib.crc32(trailer)


def test_documents_end_with_a_token_and_a_large_vocabulary_takes_32_bits(prepare, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one two"}\n{"text": "three"}\n')
    (tmp_path / "b.txt").write_text("plain")  # in a task of its own, and a document too
    for task in (0, 1):
        assert (
            prepare(
                tmp_path / "[ab].*",
                tmp_path / "s",
                f"--task={task}/2",
                "--data.tokenizer=o200k_base",
            )[0]
            == 0
        )
    index = read_index(tmp_path / "s")
    tokenizer = Tokenizer.from_dict(index["tokenizer_state"])
    assert (index["dtype"], index["info"]["num_documents"]) == ("uint32", 3)
    end = tokenizer.end_of_text
    ends = [tokenizer.decode([i]) if i != end else "<end>" for i in tokens_of(tmp_path / "s")]
    assert "".join(ends) == "one two<end>three<end>plain<end>"


@pytest.mark.parametrize("option", ["bpe:300", "chars"])
def test_a_vocabulary_made_from_the_text_is_the_same_in_all_tasks(
    option, texts, ids, prepare, tmp_path
):
    for task in (1, 0):
        assert (
            prepare(texts, tmp_path / "s", f"--task={task}/2", f"--data.tokenizer={option}")[0] == 0
        )
    index = read_index(tmp_path / "s")
    tokenizer = Tokenizer.from_dict(index["tokenizer_state"])
    assert tokenizer.vocab_size == (300 if option == "bpe:300" else 257 + len("一只猫坐在垫子上"))
    text = load_bytes(BYTES).with_end_of_text().decode_bytes(ids)
    assert tokenizer.decode_bytes(tokens_of(tmp_path / "s")) == text


def test_processes_of_a_launcher_divide_the_work(texts, prepare, tmp_path, monkeypatch):
    """As those of `torchrun --nproc_per_node=2` and of srun: neither encodes everything."""
    assert prepare(texts, tmp_path / "one")[0] == 0
    torchrun = {"TORCHELASTIC_RUN_ID": "none", "LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "2"}
    srun = {"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "SLURM_STEP_ID": "0"}
    for name, rank, started in (("t", "RANK", torchrun), ("s", "SLURM_PROCID", srun)):
        with monkeypatch.context() as environment:
            for number in ("1", "0"):
                for key, value in {**started, rank: number}.items():
                    environment.setenv(key, value)
                assert not (tmp_path / name / "index.json").exists()
                assert prepare(texts, tmp_path / name)[0] == 0
        shards = read_index(tmp_path / name)["shards"]
        assert {shard["name"][:13] for shard in shards} == {"shards/000000", "shards/000001"}
        assert np.array_equal(tokens_of(tmp_path / name), tokens_of(tmp_path / "one"))


def test_a_vocabulary_does_not_see_the_last_tenth(prepare, tmp_path):
    (tmp_path / "text.txt").write_text("ab" * 900 + "é" * 100)  # the last 200 of 2,000 bytes
    prepare(tmp_path / "text.txt", tmp_path / "s", "--data.tokenizer=chars")
    assert Tokenizer.from_dict(read_index(tmp_path / "s")["tokenizer_state"]).vocab_size == 257


def test_a_vocabulary_takes_the_beginnings_of_large_files(prepare, tmp_path, monkeypatch):
    """Of two texts, half of the limit each; nothing else of them is read for it."""
    (tmp_path / "texts").mkdir()
    for name, text in {"a": "é" * 40 + "ü" * 400_000, "b": "ñ" * 40 + "ø" * 100_000}.items():
        (tmp_path / "texts" / f"{name}.txt").write_text(text)
    monkeypatch.setattr("lit_gpt.text.bpe.SAMPLE", 160)
    read = []
    digest = Reader._read_bytes
    monkeypatch.setattr(
        Reader, "_read_bytes", lambda *args: (read.append(len(c)) or c for c in digest(*args))
    )
    files = TextFiles(str(tmp_path / "texts"))
    tokenizer = load_tokenizer("chars", files, sizes_of(files))
    assert [token.decode() for token in tokenizer.tokens[256:-1]] == ["é", "ñ"]
    assert len(read) == 2


def test_a_finished_store_is_not_written_again(texts, prepare, tmp_path):
    assert prepare(texts, tmp_path / "s")[0] == 0
    before = (tmp_path / "s" / "index.json").stat().st_mtime_ns
    status, _, err = prepare(texts, tmp_path / "s")
    assert status == 2
    assert err == (
        f"error: --out {str(tmp_path / 's')!r}: there is a finished token store already; "
        "name another place\n"
    )
    assert (tmp_path / "s" / "index.json").stat().st_mtime_ns == before


def test_tasks_in_any_order_and_done_twice_give_one_store(texts, store, prepare, tmp_path):
    """Task 1 runs before task 0; then the job is requeued after its end."""
    place = tmp_path / "s"
    assert (
        "1 of 2 tasks are done; the last one writes the index"
        in prepare(texts, place, "--task=1/2")[1]
    )
    assert "Task 1 of 2 was done before" in prepare(texts, place, "--task=1/2")[1]
    assert not (place / "index.json").exists()
    assert "Total: " in prepare(texts, place, "--task=0/2")[1]
    content = (place / "index.json").read_bytes()
    status, out, err = prepare(texts, place, "--task=0/2")
    assert (status, err) == (0, "")
    assert "Task 0 of 2 was done before" in out
    assert (place / "index.json").read_bytes() == content
    assert (tokens_of(place) == tokens_of(store)).all()


def test_a_task_whose_index_was_not_written_writes_it(texts, prepare, tmp_path):
    """Killed between its mark and the index."""
    prepare(texts, tmp_path / "s", "--task=0/2")
    prepare(texts, tmp_path / "s", "--task=1/2")
    content = (tmp_path / "s" / "index.json").read_bytes()
    (tmp_path / "s" / "index.json").unlink()
    assert prepare(texts, tmp_path / "s", "--task=0/2")[0] == 0
    assert (tmp_path / "s" / "index.json").read_bytes() == content


def test_a_killed_task_is_done_again(texts, ids, prepare, tmp_path):
    argv = [f"--data.path={texts}", f"--out={tmp_path / 's'}", "--shard_tokens=100"]
    argv += ["--data.tokenizer=bytes", "--block_tokens=500"]
    script = str(ROOT / "scripts" / "prepare.py")
    process = subprocess.Popen([sys.executable, script, *argv], stdout=subprocess.PIPE)
    first = process.stdout.readline()
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert first == b"shards/000000-000000.bin: 100 tokens\n"
    assert not (tmp_path / "s" / "index.json").exists()
    assert prepare(texts, tmp_path / "s", "--shard_tokens=100")[0] == 0
    assert (tokens_of(tmp_path / "s") == ids).all()


def test_a_damaged_mark_is_written_again_and_a_damaged_plan_is_one_line(texts, prepare, tmp_path):
    place = tmp_path / "s"
    prepare(texts, place, "--task=0/2")
    mark = place / "tasks" / "000000-of-000002.json"
    content = mark.read_bytes()
    mark.write_bytes(content[:50])
    assert "2 tasks are done" in prepare(texts, place, "--task=0/2")[1]
    assert mark.read_bytes() == content
    (place / "plan.json").write_text("{}")
    status, _, err = prepare(texts, place, "--task=1/2")
    assert (status, err) == (
        2,
        f"error: --out {str(place)!r}: its plan.json is damaged; name another place\n",
    )


def test_a_task_with_other_options_is_refused(texts, prepare, tmp_path):
    prepare(texts, tmp_path / "s", "--task=0/2")
    status, _, err = prepare(texts, tmp_path / "s", "--task=1/2", "--shard_tokens=2000")
    assert status == 2
    assert "begun here with other options or another text (shard_tokens)" in err
    assert "(tasks)" in prepare(texts, tmp_path / "s", "--task=1/3")[2]
    other = tmp_path / "texts"
    other.mkdir()
    for path in texts.iterdir():
        (other / path.name).write_text(path.read_text() + "more")
    assert "(text)" in prepare(other, tmp_path / "s", "--task=1/2")[2]
    assert (
        "(tokenizer_option)"
        in prepare(texts, tmp_path / "s", "--task=1/2", "--data.tokenizer=chars")[2]
    )


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (["--task=3/3"], "--task '3/3': must be a number, a slash and how many tasks there are"),
        (["--task=x"], "the tasks of 64 are 0/64 to 63/64"),
        (["--task=0/6"], "more tasks than files (5): a file is encoded by one task"),
        (["--shard_tokens=0"], "--shard_tokens 0: must be at least 1"),
        (["--data.text_field=text"], "--data.text_field 'text': is for .json(l)"),
        (["--data.tokenizer=nothing"], "--data.tokenizer 'nothing': unknown tokenizer"),
    ],
)
def test_what_prepare_refuses(options, error, texts, prepare, tmp_path):
    status, _, err = prepare(texts, tmp_path / "s", *options)
    assert status == 2
    assert error in err
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "s" / "index.json").exists()


@pytest.mark.parametrize("out", ["", " "])
def test_a_store_needs_a_place(out, texts, prepare, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, _, err = prepare(texts, out)
    assert (status, err) == (2, f"error: --out {out!r}: names no place; name a folder\n")
    assert not [*tmp_path.iterdir()]


def test_the_root_folder_and_an_address_without_a_bucket_are_named_whole(texts, prepare):
    assert Objects("/").place == "/"
    assert Objects("/tmp//").place == "/tmp"
    assert prepare(texts, "s3://")[2] == (
        "error: --out 's3://': s3://: not an address of object storage, such as "
        "s3://bucket/prefix; try again later, or check the network, the address and the "
        "credentials\n"
    )


def test_a_place_that_cannot_be_written_is_one_line_about_the_file_system(
    texts, prepare, tmp_path, monkeypatch
):
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "store"):
        status, _, err = prepare(texts, place)
        reason = "File exists" if place.name == "file" else "Not a directory"
        assert (status, err) == (2, f"error: --out {str(place)!r}: {place}: {reason}\n")
    full = OSError("Generic LocalFileSystem error: ...: No space left on device (os error 28)")
    monkeypatch.setattr("obstore.put", Mock(side_effect=full))
    with pytest.raises(UserError, match=r"/a: No space left on device$"):
        Objects(str(tmp_path / "store"), "out").put("a", b"")
    denied = PermissionDeniedError("Permission denied (os error 13)")
    monkeypatch.setattr("obstore.put", Mock(side_effect=denied))
    with pytest.raises(UserError, match=r"/a: access is denied$"):
        Objects(str(tmp_path / "store"), "out").put("a", b"")


def test_an_unfinished_store_is_not_read_as_text(texts, prepare, capfd, tmp_path):
    place = tmp_path / "s"
    assert prepare(texts, place, "--task=1/2")[0] == 0
    assert main(["train", f"--data.path={place}", f"--data.cache={tmp_path}"]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(
        f"error: --data.path {str(place)!r}: has no index.json, so it is not a token store, or "
        "not a finished one; write one with `lit-gpt prepare`, or wait for its last task"
    )


def test_a_store_is_no_text(store, prepare, tmp_path):
    status, _, err = prepare(store, tmp_path / "s")
    assert status == 2
    assert "names no text files, but a token store" in err
    assert "names no text files" in prepare("s3://bucket/texts", tmp_path / "s")[2]


def test_files_are_shared_by_their_sizes():
    sizes = [(Path(str(i)), size) for i, size in enumerate([10, 10, 80, 50, 50, 0])]
    shares = [share(sizes, task, 2) for task in range(2)]
    assert [[path.name for path in part] for part in shares] == [["0", "1", "2"], ["3", "4", "5"]]
    many = [(Path(str(i)), 1 + i % 7) for i in range(1000)]
    shares = [share(many, task, 64) for task in range(64)]
    assert [path for part in shares for path in part] == [path for path, _ in many]
    assert max(map(len, shares)) < 2 * min(map(len, shares))


def test_prepare_does_not_load_pytorch(texts, tmp_path):
    code = (
        "import sys; from lit_gpt.__main__ import main; "
        f"assert main(['prepare', '--data.path={texts}', '--out={tmp_path / 's'}', "
        "'--data.tokenizer=bytes']) == 0; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)


def test_option_names():
    assert prepare_command.option_name("text_field") == "--data.text_field"
    assert prepare_command.option_name("out") == "--out"


def test_without_obstore_the_error_says_what_to_install(monkeypatch, tmp_path):
    """As after `pip install lit_gpt`, without the extra."""
    monkeypatch.setitem(sys.modules, "obstore", None)
    monkeypatch.setitem(sys.modules, "obstore.store", None)
    monkeypatch.setitem(sys.modules, "obstore.exceptions", None)
    for use in (lambda o: o.find("a"), lambda o: o.put("a", b""), lambda o: o.names("a")):
        with pytest.raises(UserError, match="needs the package obstore"):
            use(Objects(str(tmp_path), field="out"))
