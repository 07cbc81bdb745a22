"""benchmarks/run.py start: which processes are timed, and where the last of them ends."""

from __future__ import annotations

import json
import os

import pytest

from benchmarks import start
from benchmarks.run import main


def test_the_rows_are_imports_options_and_the_first_step(monkeypatch, text_file, tmp_path):
    seen = []

    def run_process(*argv: str) -> tuple[float, float]:
        seen.append(argv)
        return float(len(seen)), len(seen) / 2

    monkeypatch.setattr(start, "run_process", run_process)
    assert main(["start", f"--path={text_file}", f"--out={tmp_path}", "--repeats=3"]) == 0
    first, *timed = seen
    assert timed == timed[:5] * 3
    assert [argv[-1] for argv in timed[:3]] == [f"import {name}" for name in start.IMPORTS]
    assert timed[3][-1] == "--print_config"
    assert timed[4] == first  # which has the text encoded already
    assert f"--data.path={text_file}" in first
    rows = json.loads((tmp_path / "start.json").read_text())["rows"]
    assert [row["seconds"] for row in rows] == [7, 8, 9, 10, 11]  # each in the second round
    assert [row["cpu_seconds"] for row in rows] == [3.5, 4, 4.5, 5, 5.5]


def test_a_process_is_timed_and_must_succeed():
    seconds, cpu_seconds = start.run_process("-c", "import benchmarks; sum(range(9**7))")
    assert cpu_seconds > 0
    assert seconds > 0
    with pytest.raises(AssertionError, match=r"\('-c', 'exit\(3\)'\) failed"):
        start.run_process("-c", "exit(3)")


def test_the_process_ends_before_the_first_step(train, monkeypatch):
    steps = []
    monkeypatch.setattr(os, "_exit", lambda status: steps.append(status) or exit(status))
    result = train("--trainer.callbacks=benchmarks.start.FirstStep")
    assert result.status == 0
    assert steps == [0]
    assert result.run.trainer.global_step == 0
    assert [line.partition(",")[0] for line in result.steps] == ["Step: 0"]  # that is included
