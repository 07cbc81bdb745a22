"""benchmarks/run.py store: each block is requested once, whatever the number of ranks."""

from __future__ import annotations

import json

import pytest

from benchmarks import token_store
from benchmarks.measure import Options


@pytest.mark.slow
def test_requests_and_the_sequence(tmp_path):
    token_store.token_store(Options(out=str(tmp_path)), megabytes=8)
    rows = json.loads((tmp_path / "store.json").read_text())["rows"]
    assert [row["ranks"] for row in rows] == [1, 2, 3, 4, 1]
    assert all(row["same sequence"] for row in rows)
    assert all(8 <= row["requests per shard"] < 14 for row in rows[:4])
    assert rows[4]["requests per shard"] > 100
