"""The kill test: that it kills at the planned moments, and would find a single wrong bit."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lit_gpt.command import call, run
from tests.conftest import ROOT
from tests.kill_test import killed_run, verification
from tests.kill_test.killed_run import INTERVAL, KINDS, SETTINGS, Kill, Run, schedule
from tests.kill_test.recorder import compare_checkpoints, compare_records, is_equal, read_record
from tests.kill_test.verification import Outcome, Verification, verify

WHOLE = ["evaluating 0", "evaluated 0 0x1.8p+1 0x1.9p+1"]
WHOLE += ["batch 0 0 0x1.8p+1", "batch 0 1 0x1.7p+1", "batch 1 0 0x1.6p+1"]


def flip_a_bit(tensor: torch.Tensor) -> None:
    tensor.view(torch.int32).view(-1)[-1] ^= 1


def test_the_moments_are_a_function_of_the_seed():
    kills = schedule(20, 7, 200)
    assert kills == schedule(20, 7, 200)
    assert kills != schedule(20, 8, 200)
    for i in range(0, 18, len(KINDS)):
        assert {kill.kind for kill in kills[i : i + len(KINDS)]} == set(KINDS)
    steps = [kill.step for kill in kills]
    assert steps == sorted(steps)
    assert steps[0] < 10
    assert 170 < steps[-1] < 200 - 2 * INTERVAL
    assert {kill.rank for kill in kills} == {None}
    assert len(schedule(1, 0, 200)) == 1


def test_of_two_processes_each_is_killed_alone_at_times():
    kills = schedule(60, 0, 200, ranks=2)
    assert {kill.rank for kill in kills} == {None, 0, 1}
    together = [kill for kill in kills if kill.kind in ("starting", "tokenizing")]
    assert {kill.rank for kill in together} == {None}


@pytest.mark.parametrize("setting", SETTINGS)
def test_settings_are_what_their_names_say(setting, tmp_path):
    options = Run(tmp_path, "text", setting, 10).options
    assert ("muon" in setting) == (options.get("model.optimizer") == "muon")
    accumulate = options.get("trainer.accumulate_grad_batches", 1)
    assert accumulate == (4 if "accumulate" in setting else 1)
    assert ("ddp" in setting) == (options.get("trainer.devices") == 2)


def test_a_recorder_writes_what_was_computed(train, tmp_path):
    folder = tmp_path / "record"
    options = {"trainer.accumulate_grad_batches": 2, "trainer.max_steps": 3}
    result = train(
        "--trainer.callbacks=tests.kill_test.recorder.Recorder",
        f"--trainer.callbacks.folder={folder}",
        **options,
    )
    assert result.status == 0, result.err
    path = folder / "rank-0.txt"
    assert path.read_text().startswith(f"pid {os.getpid()}\n")
    lines = read_record(path)
    places = ["evaluating 0", "evaluated 0", "batch 0 0", "batch 0 1", "batch 1 0", "batch 1 1"]
    places += ["evaluating 2", "evaluated 2", "batch 2 0", "batch 2 1", "evaluating 3"]
    assert [" ".join(line.split()[: 3 if "batch" in line else 2]) for line in lines] == [
        *places,
        "evaluated 3",
    ]
    train_loss, val_loss = map(float.fromhex, lines[-1].split()[2:])
    assert result.steps[-1] == (
        f"Step: 3, Training Loss: {train_loss:.3f}, Validation Loss: {val_loss:.3f}"
    )
    with path.open("a") as file:
        file.write("batch 3 0 0x1.7")  # killed while it was written
    assert read_record(path) == lines
    assert read_record(folder / "rank-1.txt") == []


def test_a_stretch_of_the_uninterrupted_run_is_equal():
    for start in range(len(WHOLE)):
        for end in range(start, len(WHOLE) + 1):
            assert compare_records(WHOLE[start:end], WHOLE) is None


@pytest.mark.parametrize(
    ("found", "tampered", "expected"),
    [
        ([*WHOLE[2:4], "batch 1 0 0x1.6000000000001p+1"], "batch 1 0 0x1.6000000000001p+1", 4),
        (["batch 0 0 0x1.7p+1", WHOLE[3]], "batch 0 0 0x1.7p+1", 2),
        ([WHOLE[2], WHOLE[4]], WHOLE[4], 3),
        ([WHOLE[3], WHOLE[3]], WHOLE[3], 4),
        (["evaluated 0 0x1.8p+1 nan"], "evaluated 0 0x1.8p+1 nan", 1),
    ],
    ids=["last bit", "first line", "a batch left out", "a batch twice", "evaluation"],
)
def test_a_tampered_record_is_found(found, tampered, expected):
    problem = f"{tampered!r} where the uninterrupted run has {WHOLE[expected]!r}"
    assert compare_records(found, WHOLE) == problem


def test_a_record_of_more_than_the_uninterrupted_run_is_found():
    more = "batch 2 0 0x1.5p+1"
    problem = f"{more!r} where the uninterrupted run has 'ended'"
    assert compare_records([*WHOLE, more], WHOLE) == problem
    assert compare_records([more], WHOLE) == f"{more!r} is not in the uninterrupted run"


@pytest.mark.parametrize(
    ("found", "whole", "equal"),
    [
        ("x", "x", True),
        (2.0, 2.5, False),
        (1, 1.0, False),
        (torch.tensor([1.0]), torch.tensor([1.0]), True),
        (torch.tensor([math.nan]), torch.tensor([math.nan]), True),
        (torch.tensor([1.0]), torch.tensor([1.0000001]), False),
        (torch.tensor([0.0]), torch.tensor([-0.0]), False),
        (torch.zeros(2), torch.zeros(2, dtype=torch.int32), False),
        (torch.zeros(2), torch.zeros(1, 2), False),
        (torch.zeros(1), 0.0, False),
        (0.0, torch.zeros(1), False),
    ],
)
def test_only_the_very_same_values_are_equal(found, whole, equal):
    assert is_equal(found, whole) == equal


def test_a_tampered_checkpoint_is_found(train, tmp_path):
    result = train(**{"model.optimizer": "muon", "model.schedule": "cosine"})
    whole = Path(result.run.trainer.log_dir) / "checkpoints" / "last.ckpt"
    assert compare_checkpoints(whole, whole) is None
    weight, found = "gpt.blocks.1.attention.qkv.weight", tmp_path / "found.ckpt"
    for tamper, place in {
        lambda c: flip_a_bit(c["state_dict"][weight]): f"weights: {weight.removeprefix('gpt.')}",
        lambda c: flip_a_bit(
            c["optimizer_states"][0]["state"][weight]["momentum_buffer"]
        ): f"optimizer: state: {weight}: momentum_buffer",
        lambda c: c["lr_schedulers"][0].update(last_epoch=5): "schedules: 0: last_epoch",
        lambda c: c["lr_schedulers"][0].pop("last_epoch"): "schedules: 0: last_epoch",
        lambda c: c.update(global_step=5): "step",
    }.items():
        content = torch.load(whole, weights_only=True)
        tamper(content)
        torch.save(content, found)
        problem = compare_checkpoints(found, whole)
        assert problem == f"not as in the uninterrupted run: found.ckpt: {place}"
    assert compare_checkpoints(tmp_path / "gone.ckpt", whole) == "there is no gone.ckpt"


def test_a_problem_is_no_pass(capsys):
    outcome = Outcome("adamw", 3)
    outcome.judge(["starting", "training at step 5"], None, "3 batches equal")
    outcome.judge(["training at step 9"], "a bit differs", "3 batches equal")
    outcome.judge([], "a bit differs", "")
    assert (outcome.seen, outcome.passed, len(outcome.problems)) == (3, 2, 2)
    assert outcome.hits == {"starting": 1, "training": 2}
    assert capsys.readouterr().out.splitlines() == [
        "kill 1 of 3: starting; 3 batches equal",
        "kill 2 of 3: training at step 5; 3 batches equal",
        "kill 3 of 3: training at step 9; a bit differs",
        "without a kill: a bit differs",
    ]


def test_a_run_killed_twice_is_the_uninterrupted_run(text_file, tmp_path, capsys):
    outcome = Verification("muon-accumulate", 2, 5, str(text_file), tmp_path, steps=20).run()
    assert (outcome.passed, outcome.problems) == (2, [])
    assert outcome.hits.total() == 2
    assert outcome.batches >= 80  # of 20 steps, each computed at least once
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["kill 1 of 2", "kill 2 of 2"]
    records = sorted((tmp_path / "killed-1").glob("record-*"))
    assert len(records) == 3  # killed, killed, finished
    ends = [read_record(path / "rank-0.txt")[-1:] for path in records]
    assert ends[-1] == read_record(tmp_path / "whole" / "record-1" / "rank-0.txt")[-1:]


DRIFT = '''
import torch
from tests.kill_test.recorder import Recorder

class Drift(Recorder):
    """A resume that gets one bit of one weight wrong."""

    def on_train_start(self, trainer, pl_module):
        if trainer.global_step > 0:
            weight = pl_module.gpt.head.weight.data.view(torch.int32)
            weight[0, 0] ^= 1
'''


@pytest.mark.slow
def test_a_resume_with_one_wrong_bit_fails(text_file, tmp_path, monkeypatch, capsys):
    (tmp_path / "drift.py").write_text(DRIFT)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(ROOT)]))
    options = killed_run.OPTIONS | {"trainer.callbacks": "drift.Drift"}
    monkeypatch.setattr(killed_run, "OPTIONS", options)
    monkeypatch.setattr(verification.tempfile, "mkdtemp", lambda prefix: str(tmp_path / prefix))
    monkeypatch.setattr(killed_run, "KINDS", {"training": 0.02})
    assert verify(kills=2, settings=("adamw",), path=str(text_file)) == 1
    out = capsys.readouterr().out
    assert "uninterrupted run" in out
    assert "1 of 2" in out or "0 of 2" in out  # the first kill may come before any checkpoint
    assert f"The runs are in {tmp_path / 'verify-resume-'}" in out


@pytest.mark.slow
def test_a_missed_kill_is_no_kill(text_file, tmp_path, monkeypatch, capsys):
    """The run ended before the sign came: it is killed another time, at another moment."""
    never = Kill("saving another.ckpt", 3, 0.5)
    monkeypatch.setitem(killed_run.KINDS, never.kind, 0.0)
    monkeypatch.setattr(verification, "schedule", lambda *args: [never])
    outcome = Verification("adamw", 1, 0, str(text_file), tmp_path, steps=20).run()
    assert (outcome.passed, outcome.seen, outcome.problems) == (1, 1, [])
    assert len(list((tmp_path / "killed-1").glob("record-*"))) == 1
    assert len(list((tmp_path / "killed-2").glob("record-*"))) == 2
    assert capsys.readouterr().out.startswith("kill 1 of 1: ")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--kills=0"], "--kills 0: must be at least 1"),
        (["--kills=-3"], "--kills -3: must be at least 1"),
        (["--kills=many"], "--kills 'many': must be a whole number"),
        (["--settings=adam"], "--settings 'adam': no such setting; use adamw, muon"),
        pytest.param(
            ["--path=nowhere.txt", "--settings=adamw"],
            "'nowhere.txt': no such file or folder",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_wrong_input_is_one_line(args, message, capsys):
    assert run(lambda: call(verify, args)) == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1
    assert err.startswith("error: ")
    assert message in err


@pytest.mark.kills
@pytest.mark.parametrize("setting", SETTINGS)
def test_twenty_of_twenty_kills_pass(setting):
    script = ROOT / "tests" / "kill_test" / "verify_resume.py"
    command = [sys.executable, str(script), "--kills=20", f"--settings={setting}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "20 of 20" in done.stdout
