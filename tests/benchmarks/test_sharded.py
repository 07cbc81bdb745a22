"""benchmarks/run.py sharded: the numbers of activation checkpointing and of Muon over shards."""

from __future__ import annotations

import json
import sys

import pytest

from benchmarks import sharded
from tests.distributed.ranks import together

SMALL = sharded.SHAPE | {"d_model": 16, "num_blocks": 4}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_less_is_kept_for_the_same_losses(monkeypatch):
    monkeypatch.setattr(sharded, "SHAPE", SMALL)
    monkeypatch.setattr(sharded, "WINDOWS", 2)
    plain, less = (sharded.measure_activations(flag) for flag in (False, True))
    assert less["losses"] == plain["losses"]
    assert less["kept"] < plain["kept"] / 2
    assert min(plain["peak"], less["peak"]) > 1e8


def print_muon() -> int:
    import os

    sharded.SHAPE = SMALL
    sharded.MATRICES = [(6, 4)]
    print(json.dumps(sharded.measure_muon(int(os.environ["RANK"]), 2)))
    return 0


def test_both_ways_of_muon_are_timed(tmp_path):
    assert together(print_muon, 2, tmp_path) == [0, 0]
    found = json.loads((tmp_path / "out0.txt").read_text())
    assert found["processes"] == 2
    assert min(found["exchanged"], found["sent"], found["gathered"]) > 0
