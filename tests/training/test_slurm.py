"""On SLURM: a warning saves and requeues, a requeued job goes on. scontrol is a script here."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest
import torch

from lit_gpt.checkpoint import read_checkpoint
from lit_gpt.training import slurm as slurm_module

LONG = {"trainer.max_steps": 400, "trainer.val_check_interval": 50, "model.dropout": 0.2}
LONG |= {"samples.num_tokens": 0}
TASK = {"NTASKS": "1", "NTASKS_PER_NODE": "1", "NNODES": "1", "JOB_NAME": "train"}
TASK |= {"PROCID": "0", "LOCALID": "0", "NODEID": "0", "NODELIST": "127.0.0.1"}


@pytest.fixture
def slurm(tmp_path):
    """The environment of a task that srun started, with an scontrol that notes what it is told."""
    folder = tmp_path / "bin"
    folder.mkdir()
    scontrol = folder / "scontrol"
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path / "told"}\n')
    scontrol.chmod(0o755)

    def environment(job: str = "123", restarts: int = 0, **more: str) -> dict[str, str]:
        names = {**TASK, "JOB_ID": job, **({"RESTART_COUNT": str(restarts)} if restarts else {})}
        path = {"PATH": f"{folder}:{os.environ['PATH']}"}
        return path | {f"SLURM_{name}": value for name, value in (names | more).items()}

    return environment


def steps_in(out: list[str]) -> list[str]:
    return [line for line in out if line.startswith(("Step: ", "Final"))]


def last_of(run: Path) -> dict:
    return read_checkpoint(run / "checkpoints" / "last.ckpt")


def test_a_warned_job_is_requeued_and_goes_on(start, train, slurm, tmp_path):
    lines = train(**LONG, **{"trainer.default_root_dir": tmp_path / "whole"}).out.splitlines()
    running = start(env=slurm(), **LONG)
    running.until("Step: 50,")
    running.send(signal.SIGUSR1)
    code, first, err = running.end()
    assert (code, err) == (0, "")
    assert (tmp_path / "told").read_text() == "requeue 123\n"
    assert first[-1].split() == ["Requeuing:", "scontrol", "requeue", "123"]
    run = tmp_path / "logs" / "version_0"
    step = last_of(run)["global_step"]
    assert f"Stopped by SIGUSR1 after step {step}" in first

    code, second, err = start(env=slurm(restarts=1), **LONG).end()
    assert (code, err) == (0, "")
    assert second[0].startswith("SLURM requeued this job: resuming ")
    assert second[0].endswith(f"version_0/checkpoints/last.ckpt at step {step}")
    assert steps_in(first) + steps_in(second) == steps_in(lines)
    whole, weights = (last_of(r)["state_dict"] for r in (tmp_path / "whole" / "version_0", run))
    assert all(torch.equal(whole[name], weights[name]) for name in whole)

    assert [path.name for path in run.parent.iterdir()] == ["version_0"]


@pytest.mark.slow
def test_a_killed_job_goes_on_and_only_that_one(start, slurm, tmp_path):
    running = start(env=slurm(), **LONG)
    running.until("Step: 100,")
    running.process.kill()
    running.end()
    shutil.copy(
        tmp_path / "logs/version_0/checkpoints/last.ckpt", tmp_path / "logs/hpc_ckpt_1.ckpt"
    )

    def begins(env: dict[str, str], **options) -> str:
        code, out, err = start(env=env, **(LONG | options)).end()
        assert (code, err) == (0, "")
        return steps_in(out)[0].partition(",")[0]

    short = {"trainer.max_time": "00:00:00:00"}
    assert begins(slurm("124", restarts=1), **short) == "Step: 0"  # another job
    assert begins(slurm("123", restarts=1), **short) == "Step: 0"  # another command line
    assert begins(slurm("123"), **short) == "Step: 0"  # not requeued
    assert begins(slurm("123", restarts=1)) in ("Step: 100", "Step: 150")
    code, out, err = start(env=slurm(restarts=2), **LONG).end()
    assert (code, err) == (0, "")
    assert out[0].endswith("version_0/checkpoints/last.ckpt at step 400")
    assert out[1:] == ["Nothing is left to do: --trainer.max_steps is 400"]
    assert len(list((tmp_path / "logs").glob("version_*"))) == 4


def test_a_requeued_job_that_has_done_its_epochs_has_nothing_left_to_do(
    train, slurm, tmp_path, monkeypatch
):
    """Though their number of steps is known only once the text is read."""
    options = {"trainer.max_epochs": 2, "trainer.limit_train_batches": 3}
    for name, value in slurm().items():
        monkeypatch.setenv(name, value)
    assert train("--trainer.max_steps=-1", **options).evaluated[-1] == 6
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    done = train("--trainer.max_steps=-1", **options)
    assert (done.status, done.err, done.steps) == (0, "", [])
    assert done.out.splitlines()[1:] == ["Nothing is left to do: --trainer.max_epochs is 2"]
    path = tmp_path / "logs" / "version_0" / "checkpoints" / "last.ckpt"
    asked = train("--trainer.max_steps=-1", f"--ckpt_path={path}", **options)
    assert asked.status == 2  # not this job's command line
    assert "raise it" in asked.err


def test_a_task_of_an_array_and_an_scontrol_that_fails(slurm, tmp_path, monkeypatch, capsys):
    for name, value in slurm("9", ARRAY_JOB_ID="7", ARRAY_TASK_ID="3").items():
        monkeypatch.setenv(name, value)
    slurm_module.requeue()
    assert (tmp_path / "told").read_text() == "requeue 7_3\n"
    assert capsys.readouterr().out.split() == ["Requeuing:", "scontrol", "requeue", "7_3"]
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.write_text("#!/bin/sh\necho Invalid job >&2\nexit 1\n")
    slurm_module.requeue()
    said = capsys.readouterr().out.splitlines()[1]
    assert said == "Not requeued (Invalid job): continue with the command above"
    scontrol.unlink()
    slurm_module.requeue()
    said = capsys.readouterr().out.splitlines()[1]
    assert said == "Not requeued (No such file or directory): continue with the command above"


@pytest.mark.slow
def test_that_slurm_ends_a_warned_job_too_does_not_hurry_it(start, slurm, tmp_path):
    running = start(env=slurm(), **LONG)
    running.until("Step: 50,")
    running.send(signal.SIGUSR1, signal.SIGTERM)
    code, _, err = running.end()
    assert (code, err) == (0, "")
    assert (tmp_path / "told").read_text() == "requeue 123\n"


def test_off_slurm_there_is_no_note(train, tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    train()
    assert list((tmp_path / "logs").rglob("slurm_job")) == []
