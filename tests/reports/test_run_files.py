"""A stranger's run folder: read, or refused in one line, in bounded memory and time."""

from __future__ import annotations

import json
import os
import struct
import time
from pathlib import Path

import pytest
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter, masked_crc32c

from lit_gpt.errors import UserError
from lit_gpt.reports.history import History, read_run
from lit_gpt.reports.report import read_options, write_report
from lit_gpt.reports.run_files import load_options
from tests.conftest import limited_memory

LAUGHS = "a0: &a0 [x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 20)
)
DICTS = "a0: &a0 {x: 1}\n" + "".join(
    f"a{i}: &a{i} {{{', '.join(f'k{j}: *a{i - 1}' for j in range(9))}}}\n" for i in range(1, 20)
)
MERGES = "a0: &a0 {x: 1}\n" + "".join(
    f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}\n" for i in range(1, 20)
)


@pytest.fixture
def folder(tmp_path) -> Path:
    """A run's folder that has nothing but a history."""
    history = History({"val/loss": [(0, 7.0), (50, 5.5)]})
    history.save(tmp_path)
    return tmp_path


@pytest.fixture(autouse=True)
def bounded():
    """Half a gigabyte more than now, and half a minute."""
    start = time.perf_counter()
    with limited_memory(500_000_000):
        yield
    assert time.perf_counter() - start < 30


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (LAUGHS, "too many values"),
        (DICTS, "too many values"),
        (MERGES, "could not determine a constructor for the tag 'tag:yaml.org,2002:merge'"),
        ("a: &a [*a]", "too many values"),
        ("a: &a {b: *a}", "too many values"),
        ("a: " + "9" * 5000, "a number of 5,000 characters"),
        ("a: " + "59:" * 50_000 + "59", "a number of 150,002 characters"),
        ("a: 0x" + "f" * 5000, "a number of 5,002 characters"),
        ("a: !!float " + "9" * 5000, "a number of 5,000 characters"),
        ("[" * 5000, "maximum recursion depth exceeded"),
        ("? " + "k" * 2000 + "\n: {b: 1}", "the name of a value is too long"),
        ("a: " + "x" * 1_000_000, "larger than 1 MB"),
        ("- 1", "no attribute 'items'"),
        ("? [1]\n: 2", "found unhashable key"),
        ("a: !!python/object/apply:os.system [touch sprung]", "could not determine a constructor"),
    ],
    ids=lambda text: text[:20],
)
def test_a_hostile_config_is_one_line(folder, content, reason):
    (folder / "config.yaml").write_text(content, encoding="utf-8")
    with pytest.raises(
        UserError, match=r"cannot read .*config\.yaml \(.*repair or delete"
    ) as error:
        read_options(folder)
    assert reason in str(error.value.__cause__)
    assert len(str(error.value)) < 500


def test_aliases_and_long_texts_are_read():
    text = f'a: &a [1, x]\nb: {{c: *a}}\nd: {"9" * 4}\ne: "{"9" * 5000}"\n'
    assert load_options(text) == {"a": '[1, "x"]', "b.c": '[1, "x"]', "d": "9999", "e": "9" * 5000}


def test_a_number_of_steps_of_5000_digits(folder, capsys):
    (folder / "config.yaml").write_text(f"trainer: {{max_steps: '{'9' * 5000}'}}", encoding="utf-8")
    write_report([str(folder)])
    assert "Step 50<" in (folder / "report.html").read_text(encoding="utf-8")


def put(kind: str, path: Path) -> None:
    """Makes something that is not a file of a run at this place."""
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "nowhere":
        path.symlink_to(path.with_name("nothing"))
    elif kind == "large":
        with path.open("wb") as file:
            file.truncate(1 << 40)
    else:
        path.write_bytes(b"\xff" * 1000)


@pytest.mark.parametrize("name", ["history.json", "config.yaml"])
@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "loop", "nowhere", "large"])
def test_what_is_not_a_file_of_a_run_is_one_line(folder, name, kind, monkeypatch):
    path = folder / name
    path.unlink(missing_ok=True)
    put(kind, path)
    if kind == "nowhere" and name == "config.yaml":
        assert read_options(folder) == {}
        return
    with pytest.raises(UserError, match=rf"{name}") as error:
        read_run(folder) if name == "history.json" else read_options(folder)
    assert len(str(error.value).splitlines()) == 1


def event(step: int, value: float, tag: str = "val/loss") -> bytes:
    summary = Summary(value=[Summary.Value(tag=tag, simple_value=value)])
    return Event(step=step, wall_time=1.7e9, summary=summary).SerializeToString()


def write_events(path: Path, *contents: bytes) -> None:
    with path.open("wb") as file:
        writer = RecordWriter(file)
        for content in contents:
            writer.write(content)


def test_events_are_read_up_to_the_damage(tmp_path):
    first = tmp_path / "events.out.tfevents.1.host"
    write_events(
        first,
        event(0, 7.5),
        event(10, 6.5),
        event(10, 1.5, "other"),
        event(5, 2.5, "x" * 2_000_000),  # a record too large for a curve's
        event(-3, 1.5),
        event(2**62, 1.5),
        event(20, 5.5),
    )
    write_events(tmp_path / "events.out.tfevents.2.host", event(20, 4.5), b"\xff\xff\xff")
    whole = [(0, 7.5), (10, 6.5), (20, 4.5)]
    assert read_run(tmp_path).curves == {"val/loss": whole}
    content = first.read_bytes()
    first.write_bytes(content[:-1])  # its last record ends too early
    (tmp_path / "events.out.tfevents.2.host").unlink()
    assert read_run(tmp_path).curves == {"val/loss": whole[:2]}


@pytest.mark.parametrize("length", [10**6, 3 * 10**9, 2**63, 2**64 - 1])
def test_a_record_longer_than_its_file_takes_no_memory(tmp_path, length):
    path = tmp_path / "events.out.tfevents.1.host"
    write_events(path, event(0, 7.5))
    head = struct.pack("<Q", length)
    with path.open("ab") as file:
        file.write(head + struct.pack("<I", masked_crc32c(head)) + event(10, 6.5))
    assert read_run(tmp_path).curves == {"val/loss": [(0, 7.5)]}


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "rubbish"])
def test_events_that_are_none(tmp_path, kind):
    path = tmp_path / "events.out.tfevents.1.host"
    put(kind, path)
    with pytest.raises(UserError, match=r"has no history\.json and no curves"):
        read_run(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"final": {"loss": 1, "bits_per_byte": 1, "num_tokens": 10**4000}},
        {"final": {"loss": 1, "bits_per_byte": 1, "num_tokens": 1, "of_tokens": -1}},
        {"final": 3},
        {"curves": {"time": [[0, float("nan")]]}},
        {"curves": {"val/loss": [[float("inf"), 1]]}},
        {"samples": [[0, 3]]},
        {"card": [[1, 2, 3]]},
        {"prompts": 3},
        {"sessions": [{"step": 0, "time": 1e12, "command": "", "versions": {}}]},
    ],
    ids=str,
)
def test_a_history_of_impossible_values_is_one_line(folder, change):
    content = json.loads((folder / "history.json").read_text(encoding="utf-8")) | change
    (folder / "history.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(UserError, match=r"history\.json is damaged or not the history of a run"):
        write_report([str(folder)])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e308, -1e308])
def test_any_number_may_be_a_loss(folder, value, capsys):
    curves = {name: [[0, value], [5, value]] for name in ("val/loss", "tokens_per_second", "time")}
    curves |= {"time": [[0, 0.5]], "val/bits_per_byte": [[0, value]]}
    final = {"loss": value, "bits_per_byte": value, "num_tokens": 5}
    content = json.loads((folder / "history.json").read_text(encoding="utf-8"))
    content |= {"curves": curves, "final": final}
    (folder / "history.json").write_text(json.dumps(content), encoding="utf-8")
    write_report([str(folder)])
    assert "Final validation loss" in (folder / "report.html").read_text(encoding="utf-8")
