"""benchmarks/run.py race: the same bytes, the clock, who reached what when, the picture."""

from __future__ import annotations

import json
import math
import time
import xml.etree.ElementTree
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks import race, racers, reference_charlm
from benchmarks.checkout import Lines, plan_iterations
from benchmarks.race import (
    NAMES,
    Result,
    compare,
    draw,
    first_below,
    middle,
    run_checkout,
    write_texts,
)
from benchmarks.racers import RACERS
from benchmarks.racing import MARGIN, Snapshots
from lit_gpt.reports.history import read_history
from tests.benchmarks.test_benchmarks import here
from tests.conftest import SMALL, WORDS, command_line

SLOW = pytest.mark.slow
OURS = {  # lit_gpt's side: a tiny model
    name: value
    for name, value in SMALL.items()
    if name not in ("trainer.accelerator", "trainer.limit_val_batches")
}


@pytest.fixture
def folder(text_file: Path, tmp_path: Path) -> Path:
    """What a side gets."""
    folder = tmp_path / "side"
    folder.mkdir()
    write_texts(text_file.read_bytes(), folder)
    return folder


@pytest.fixture
def long_text(tmp_path: Path) -> Path:
    path = tmp_path / "long.txt"
    rng = np.random.default_rng(0)
    path.write_text(" ".join(rng.choice(WORDS.split(), 6000)), encoding="utf-8")
    return path


@pytest.mark.parametrize("start", ["", "a", "ab"])
def test_no_character_is_cut(start, tmp_path):
    text = (start + 100 * "猫").encode()
    write_texts(text, tmp_path)
    train, val = ((tmp_path / f"{split}.txt").read_bytes() for split in ("train", "val"))
    assert train + val == text
    assert 0 <= len(train) - int(0.9 * len(text)) < 3
    assert set(val.decode()) == {"猫"}


def test_when_a_line_is_first_at_a_level():
    curve = [(1.0, 4.0), (3.0, 3.0), (4.0, 3.5), (6.0, 2.5)]
    assert first_below(curve, 5.0) == 1.0
    assert first_below(curve, 3.5) == 2.0  # halfway to the second point
    assert first_below(curve, 3.0) == 3.0
    assert first_below(curve, 2.75) == 5.5
    assert first_below(curve, 2.0) is None
    assert first_below([], 2.0) is None


def test_each_is_compared_with_all_others():
    slow = Result("slow", 10.0, 5, 3.0, [(2.0, 5.0), (10.0, 3.0)])
    fast = Result("fast", 10.0, 9, 2.0, [(4.0, 4.0), (6.0, 2.0)])
    compare([slow, fast])
    assert slow.reached == {"fast": None}
    assert fast.reached == {"slow": 5.0}
    other = Result("slow", 9.0, 4, 2.5, [])
    assert middle([slow, other, fast]) is other
    assert middle([slow, fast]) is fast


def test_snapshots_are_ever_less_often_and_end_with_the_time(tmp_path):
    model = torch.nn.Linear(2, 1)
    snapshots = Snapshots(tmp_path / "new", MARGIN + 0.4, time.time())
    made = []
    for step in snapshots.steps(model):
        made.append(step)
        time.sleep(0.01)
    assert made == list(range(len(made)))
    assert 0.4 <= snapshots.now < 5
    files = sorted((tmp_path / "new").iterdir())
    assert [files[0].stem, files[-1].stem] == [f"{0:09}", f"{len(made):09}"]
    seconds = [torch.load(file, weights_only=True)["seconds"] for file in files]
    between = [b / a for a, b in pairwise(seconds[:-1])]
    assert all(growth >= 1.2 for growth in between)
    assert 3 <= len(files) <= 30
    late = Snapshots(tmp_path / "late", 1.0, time.time() - 60)
    assert list(late.steps(model)) == [0]  # one step, however late


@pytest.mark.parametrize("side", [side for side in RACERS if side not in ("lit_gpt", "trainer")])
def test_the_whole_validation_text_counts_in_bits_per_byte(side, folder):
    """With all weights zero, each token but the first costs log2 of the vocabulary's size."""
    racer = RACERS[side](folder)
    for weight in racer.model.parameters():
        weight.data.zero_()
    text = (folder / "val.txt").read_bytes().decode()
    assert int(racer.lengths[racer.val].sum()) == len(text.encode())
    first = int(racer.lengths[racer.val[0]])
    bits = math.log2(len(racer.lengths)) * (len(racer.val) - 1)
    expected = bits / (len(text.encode()) - first)
    assert racer.bits_per_byte() == pytest.approx(expected, rel=1e-5)
    if side == "nanogpt":  # the characters of both texts
        assert len(racer.val) == len(text)
        assert len(racer.lengths) == len(set(text + (folder / "train.txt").read_text("utf-8")))


@pytest.mark.parametrize("side", ["nanogpt", "trainer_1e-3", pytest.param("loop", marks=SLOW)])
def test_a_side_learns_until_its_time_is_up(side, folder, capsys):
    racer = RACERS[side](folder)
    snapshots = Snapshots(folder / "snapshots", MARGIN + 2, time.time())
    racer.train(snapshots, [])
    assert snapshots.now >= 2
    curve = racer.curve()
    assert len(curve) == len(list((folder / "snapshots").iterdir()))
    assert curve == sorted(curve)
    assert racer.num_steps >= 1
    assert curve[-1][1] < curve[0][1]


def test_the_recipes_schedule_ends_with_the_time(folder, monkeypatch):
    """100 steps of warm-up, then half a cosine to a tenth on the clock."""
    given = []
    monkeypatch.setattr(reference_charlm, "train", lambda *args: given.append(args[3]))
    snapshots = Snapshots(folder / "snapshots", 100 + MARGIN, time.time())
    RACERS["nanogpt"](folder).train(snapshots, [])
    (factor,) = given
    assert factor(0) == 0.01
    assert factor(99) == 1.0
    assert factor(100) == pytest.approx(1, abs=1e-3)
    snapshots.start -= 50
    assert factor(500) == pytest.approx(0.55, abs=0.01)
    snapshots.start -= 50
    assert factor(900) == pytest.approx(0.1, abs=0.001)


def test_lit_gpt_is_judged_by_the_whole_text_whatever_its_final_loss_covers(
    long_text, tmp_path, monkeypatch
):
    def run_here(script, *argv):
        assert racers.main(*argv) == 0
        return SimpleNamespace(seconds=9.0)

    monkeypatch.setattr(race, "run_script", run_here)
    found = []
    for name, tokens in (("whole", "null"), ("part", "40")):
        (tmp_path / name).mkdir()
        write_texts(long_text.read_bytes(), tmp_path / name)
        argv = [*command_line(OURS), f"--final.max_tokens={tokens}"]
        found.append(race.run_side("lit_gpt", tmp_path / name, 60, "cpu", argv).bits_per_byte)
    final = read_history(tmp_path / "whole" / "version_0").final
    assert found == [pytest.approx(final.bits_per_byte, rel=1e-4)] * 2


def test_a_race_is_run_and_drawn(tmp_path, long_text, capsys):
    """Two sides as processes."""
    ours = " ".join(command_line(OURS))
    argv = ("--path", long_text, "--seconds", 1, "--sides", "nanogpt,lit_gpt", "--out", tmp_path)
    assert here("race", *argv, "--ours", ours) == 0
    out = capsys.readouterr().out
    content = json.loads((tmp_path / "race.json").read_text())
    rows = {row["name"]: row for row in content["rows"]}
    assert list(rows) == [NAMES["nanogpt"], "lit_gpt"]
    reference, mine = rows.values()
    assert mine["steps"] == SMALL["trainer.max_steps"]
    assert mine["curve"][-1] == [mine["seconds"], mine["bits_per_byte"]]
    assert mine["curve"][-2][1] == mine["bits_per_byte"]
    assert reference["steps"] == 1  # its second was over when it began
    assert reference["curve"][-2][1] == reference["bits_per_byte"]
    assert mine["reached"] == {NAMES["nanogpt"]: pytest.approx(mine["curve"][0][0])}
    for row in rows.values():
        assert f"{row['name']}: {row['bits_per_byte']:.3f} after {row['seconds']:.1f} s" in out
        assert row["curve"] == sorted(row["curve"])
    assert ours.split()[0] in content["note"]
    assert xml.etree.ElementTree.parse(tmp_path / "race.svg").getroot().tag.endswith("svg")


def test_the_picture_has_a_line_for_each_side(tmp_path):
    results = [
        Result("lit_gpt", 10.0, 5, 3.0, [(2.0, 5.0), (10.0, 3.0)]),
        Result("other", 10.0, 9, 4.0, [(4.0, 4.5), (6.0, 4.0)], estimated=True),
    ]
    for suffix in ("svg", "png"):
        draw(results, tmp_path / f"race.{suffix}")
        assert (tmp_path / f"race.{suffix}").stat().st_size > 5000


TRAIN = """
import pickle, sys, time
import numpy as np, torch
options = dict(word[2:].split("=") for word in sys.argv[2:])
assert sys.argv[1] == "config/train_shakespeare_char.py" and options["device"] == "cpu"
data = options["dataset"]
size = pickle.load(open(f"{data}/meta.pkl", "rb"))["vocab_size"]
assert np.fromfile(f"{data}/train.bin", "uint16").max() < size
count, every = int(options["max_iters"]), int(options["eval_interval"])
assert options["lr_decay_iters"] == options["max_iters"]
for i in range(count + 1):
    if i % every == 0:
        print(f"step {i}: train loss 4.1, val loss {4 - i / count:.4f}")
        sizes = {"vocab_size": size, "block_size": 8}
        weights = {"table.weight": torch.zeros(size, size)}
        content = {"model": weights, "model_args": sizes, "iter_num": i}
        torch.save(content, f"{options['out_dir']}/ckpt.pt")
    print(f"iter {i}: loss 4.0000, time 20.00ms, mfu -100.00%")
"""
MODEL = """
from dataclasses import dataclass
import torch
from torch import nn
from torch.nn import functional as F
@dataclass
class GPTConfig:
    vocab_size: int
    block_size: int
class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        print("number of parameters: 0.00M")
        self.table = nn.Embedding(config.vocab_size, config.vocab_size)
    def forward(self, x, y):
        logits = self.table(x)
        return logits, F.cross_entropy(logits.flatten(0, 1), y.flatten())
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A stand-in with nanoGPT's files, options, lines and checkpoint."""
    folder = tmp_path / "nanoGPT"
    (folder / "config").mkdir(parents=True)
    (folder / "train.py").write_text(TRAIN)
    (folder / "model.py").write_text(MODEL)
    for name in ("configurator.py", "config/train_shakespeare_char.py"):
        (folder / name).touch()
    return folder


def test_a_checkout_of_nanogpt_races_too(checkout, long_text, tmp_path, capsys):
    before = sorted(checkout.rglob("*"))
    folder = tmp_path / "side"
    folder.mkdir()
    write_texts(long_text.read_bytes(), folder)
    result = run_checkout(folder, 30, "cpu", str(checkout))
    assert "number of parameters" not in capsys.readouterr().out
    assert result.estimated
    assert 500 < result.steps < 30 / 0.02
    val = (folder / "val.txt").read_text(encoding="utf-8")
    bits = len(val) / len(val.encode()) / math.log(2)  # per byte for each nat per character
    characters = len(set(long_text.read_text(encoding="utf-8")))
    assert result.bits_per_byte == pytest.approx(math.log(characters) * bits, rel=1e-3)
    assert result.curve[0][1] == pytest.approx(4 * bits)
    assert result.curve[-2][1] == pytest.approx(3 * bits)
    assert result.curve[-1] == (result.seconds, result.bits_per_byte)
    assert sorted(p for p in checkout.rglob("*") if "__pycache__" not in str(p)) == before


def test_what_a_checkout_says_when_it_fails_is_shown(checkout, long_text, capsys):
    (checkout / "train.py").write_text("raise ValueError('no such luck')")
    argv = ("--path", long_text, "--nanogpt", checkout, "--sides", "lit_gpt")
    assert here("race", *argv) == 2
    assert "status 1: ['ValueError: no such luck']" in capsys.readouterr().err


def test_iterations_are_planned_to_fit():
    """Start-up 3 s, evaluations of 1 s, iterations of 20 ms."""
    timed = Lines(3 + 2 * 1 + 51 * 0.02, [], [1020.0, *(50 * [20.0])])
    iterations, every = plan_iterations(timed, 60)
    # 60 - 3 - 1 at the start; 9 evaluations leave 47 s, 2,350 iterations.
    assert (iterations, every) == (2349, 261)
    assert 59 < 3 + 1 + 9 * 1 + iterations * 0.02 <= 60
    assert plan_iterations(timed, 1) == (1, 1)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--seconds", "0"], "--seconds 0.0: must be at least 1"),
        (["--seconds", "nan"], "--seconds 'nan': must be a number"),
        (["--path", "nowhere.txt"], "--path 'nowhere.txt': no text file"),
        (["--path", __file__, "--nanogpt", "data"], "--nanogpt 'data': not a checkout of nanoGPT"),
        (["--sides", "lit_gpt,me"], "--sides 'lit_gpt,me': must be some of nanogpt,loop,"),
        (["--repeats", "0"], "--repeats 0: must be at least 1"),
        (["--path", "benchmarks/run.py"], "too short"),
        (["--accelerator", "mps"], "--accelerator 'mps': this machine has no such device"),
    ],
)
def test_wrong_input_is_one_line(args, message, capsys):
    assert here("race", *args) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert len(error.splitlines()) == 1


def test_wrong_options_of_lit_gpt_are_its_own_message(long_text, capfd):
    argv = (
        "--path",
        long_text,
        "--seconds",
        1,
        "--sides",
        "lit_gpt",
        "--ours=--model.style=baroque",
    )
    assert here("race", *argv) == 2
    assert "error: --model.style" in capfd.readouterr().err


def test_a_text_that_is_not_utf_8_is_refused(tmp_path, capsys):
    (tmp_path / "text").write_bytes(b"\xff" * 30_000)
    assert here("race", "--path", tmp_path / "text") == 2
    assert "not UTF-8" in capsys.readouterr().err
