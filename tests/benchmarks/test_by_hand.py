"""benchmarks/run.py by_hand: what is given is trained, and both are judged by the same text."""

from __future__ import annotations

import json

import pytest

from tests.benchmarks.test_benchmarks import here


@pytest.mark.slow
def test_both_ways_are_trained_and_judged(tmp_path, text_file):
    options = ("--seconds", 30, "--repeats", 1, "--given", "bytes", "--out", tmp_path)
    assert here("by_hand", "--path", text_file, *options) == 0
    auto, given = json.loads((tmp_path / "by_hand.json").read_text())["rows"]
    assert auto["given"] == "nothing"
    assert given["chosen"] == "bytes, 128 x 4, 8 windows"
    assert all(1 < row["seconds"] < 32 and 0 < row["bits_per_byte"] < 8 for row in (auto, given))
