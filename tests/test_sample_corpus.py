"""The sample corpus: what its generator writes, without repeats, its end like the rest."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter

from tests.conftest import ROOT

CORPUS = ROOT / "data" / "订单商品名称.csv"


def test_it_is_what_its_generator_writes(tmp_path):
    script = ROOT / "data" / "make_sample_corpus.py"
    subprocess.run([sys.executable, script, "--out", tmp_path / "again.csv"], check=True)
    assert (tmp_path / "again.csv").read_bytes() == CORPUS.read_bytes()


def test_no_two_lines_are_the_same_or_differ_in_numbers_alone():
    lines = CORPUS.read_text(encoding="utf-8").splitlines()
    assert len({re.sub(r"[0-9.]+", "#", line) for line in lines}) == len(lines) > 15_000


def test_its_end_is_like_the_rest():
    """The characters of the last tenth are distributed as in any tenth: total variation < 0.07."""
    text = CORPUS.read_text(encoding="utf-8")
    cut = len(text) * 9 // 10
    rest = Counter(text[:cut])
    end = Counter(text[cut:])
    distance = sum(abs(rest[c] / cut - end[c] / (len(text) - cut)) for c in rest | end) / 2
    assert distance < 0.07
