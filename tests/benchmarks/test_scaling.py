"""benchmarks/run.py scaling: long texts and many files."""

import json
import sys
from pathlib import Path

import pytest

from benchmarks import run as benchmark
from benchmarks import scaling
from lit_gpt.command import run as run_command
from lit_gpt.text.vocabularies import load_tokenizer
from tests.conftest import ROOT

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def here(*args: object) -> int:
    return run_command(lambda: benchmark.main([str(arg) for arg in args]))


def test_a_text_and_files_are_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(scaling, "SETTLED", 0.0)
    text = "农夫山泉 550ml\n" * 100
    path = tmp_path / "text.txt"
    path.write_text(text, encoding="utf-8", newline="")
    options = ["--path", path, "--out", tmp_path, "--megabytes", "0.001", "--number", 2]
    monkeypatch.setattr(scaling, "at_least_one", lambda **_: None)
    assert here("scaling", "text", *options) == 0, capsys.readouterr().err
    (row,) = json.loads((tmp_path / "scaling.json").read_text())["rows"]
    written = text.encode()[:1000].decode("utf-8", "ignore")
    assert row["tokens"] == len(load_tokenizer("cl100k_base").encode(written))
    assert row["version"] == str(ROOT)
    assert row["peak_mb"] > row["imports_mb"] > 100
    assert row["cpu"] > row["again"] > 0


def test_files_are_whole_characters_from_all_over_the_text(tmp_path):
    text = "".join(f"{i:03}é" for i in range(1000))
    scaling._write_files(tmp_path / "files", text.encode(), 3)
    files = [path.read_bytes().decode() for path in sorted((tmp_path / "files").rglob("*.txt"))]
    assert len(files) == 3
    assert all(file in text and 998 <= len(file.encode()) <= 1000 for file in files)
    assert [text.index(file) for file in files] == [0, 577, 1154]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["everything"], "parts 'everything'"),
        (["text", "--megabytes=a"], "--megabytes 'a': must be numbers, with commas between them"),
        (["text", "--megabytes=0,5"], "must be at least 1"),
        (["files", "--number=0"], "must be at least 1"),
    ],
)
def test_odd_options_are_one_line(options, message, capsys, tmp_path):
    assert here("scaling", *options, f"--out={tmp_path}") == 2
    err = capsys.readouterr().err
    assert message in err
    assert len(err.splitlines()) == 1
    assert not any(Path(tmp_path).iterdir())
