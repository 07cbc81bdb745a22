"""Runs that torchrun or srun starts are those that Lightning starts; SLURM is set by hand here."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lit_gpt.__main__ import COMMANDS, main
from lit_gpt.checkpoint import read_checkpoint
from lit_gpt.distributed import launch
from tests.conftest import ROOT, SMALL, command_line, write_text

TRAIN = str(ROOT / "scripts" / "train.py")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
RUN = SMALL | {"trainer.max_steps": 4, "model.dropout": 0.1, "samples.num_tokens": 0}
TORCH_ENV = {  # of process 3 of 4, as torchrun sets them
    "TORCHELASTIC_RUN_ID": "none",
    "TORCHELASTIC_RESTART_COUNT": "0",
    **{"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"},
    **{"GROUP_RANK": "1", "GROUP_WORLD_SIZE": "2", "MASTER_ADDR": "node-a", "MASTER_PORT": "29501"},
}
SLURM_ENV = {  # the same by srun
    **{"JOB_ID": "71", "JOB_NAME": "train", "STEP_ID": "0", "NTASKS": "4", "NNODES": "2"},
    **{"NTASKS_PER_NODE": "2", "PROCID": "3", "LOCALID": "1", "NODEID": "1"},
    "NODELIST": "node-a,node-b",
}


STARTED: list[subprocess.Popen] = []


def slurm(**changes: str) -> dict[str, str]:
    return {f"SLURM_{name}": value for name, value in (SLURM_ENV | changes).items()}


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def begin(commands: list[list[str]], env: dict[str, str] | None = None) -> list[subprocess.Popen]:
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    started = [
        subprocess.Popen(c, env={**os.environ, **(env or {})}, start_new_session=True, **pipe)
        for c in commands
    ]
    STARTED.extend(started)
    return started


@pytest.fixture(autouse=True)
def _no_process_is_left():
    """Of a test that failed: torchrun passes SIGTERM on to its processes."""
    yield
    while STARTED:
        STARTED.pop().terminate()


def lightning(argv: list[str]) -> list[subprocess.Popen]:
    return begin([[sys.executable, TRAIN, *argv, "--trainer.devices=2", "--trainer.strategy=ddp"]])


def one_node(argv: list[str]) -> list[subprocess.Popen]:
    return begin([[*TORCHRUN, "--nproc_per_node=2", TRAIN, *argv]])


def two_nodes(argv: list[str]) -> list[subprocess.Popen]:
    place = ["--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{free_port()}"]
    command = [*TORCHRUN, "--nnodes=2", "--nproc_per_node=1", *place, "-m", "lit_gpt", "train"]
    return begin([[*command, *argv]] * 2)


def two_tasks(argv: list[str]) -> list[subprocess.Popen]:
    """Of srun, on one node each."""
    port = {"MASTER_PORT": str(free_port())}
    tasks = []
    for rank in ("0", "1"):
        own = {"NTASKS": "2", "NTASKS_PER_NODE": "1", "PROCID": rank, "NODEID": rank}
        own |= {"LOCALID": "0", "NODELIST": "127.0.0.1"}
        tasks += begin([[sys.executable, TRAIN, *argv]], slurm(**own) | port)
    return tasks


LAUNCHERS: dict[str, Callable] = {
    "lightning": lightning,
    "torchrun": one_node,
    "two nodes": two_nodes,
    "srun": two_tasks,
}


class Started:
    """A run's folder, and what its processes printed together."""

    def __init__(self, name: str, folder: Path, **options: object) -> None:
        self.root = folder
        options = RUN | {"trainer.default_root_dir": folder} | options
        argv = command_line(options)
        argv.sort(key=lambda word: not word.startswith("--config="))  # later options win
        self.processes = LAUNCHERS[name](argv)

    def end(self) -> tuple[set[int], list[str], str]:
        ends = [process.communicate(timeout=240) for process in self.processes]
        out = "".join(out for out, _ in ends)
        return {p.returncode for p in self.processes}, out.splitlines(), "".join(e for _, e in ends)

    @property
    def curves(self) -> dict:
        text = (self.root / "version_0" / "history.json").read_text(encoding="utf-8")
        found = json.loads(text)["curves"]
        return {n: v for n, v in found.items() if n not in ("time", "tokens_per_second")}

    @property
    def last(self) -> Path:
        return self.root / "version_0" / "checkpoints" / "last.ckpt"


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("text")
    return {"data.path": write_text(folder / "text.txt"), "data.cache": folder / "cache"}


@pytest.fixture(scope="module")
def whole(text, tmp_path_factory) -> Started:
    """The run by Lightning's own launcher."""
    started = Started("lightning", tmp_path_factory.mktemp("whole"), **text)
    assert started.end()[0] == {0}
    return started


def same_weights(one: Path, other: Path) -> bool:
    a, b = (read_checkpoint(path)["state_dict"] for path in (one, other))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("name", ["torchrun", "two nodes", "srun"])
def test_each_launcher_gives_the_same_run(name, text, whole, tmp_path):
    """Nothing is said of devices: the launcher knows them. Each line is printed once."""
    run = Started(name, tmp_path / "logs", **text)
    codes, out, err = run.end()
    assert codes == {0}, err
    assert run.curves == whole.curves
    assert {"train/loss", "val/loss", "gradient_norm"} <= run.curves.keys()
    assert same_weights(run.last, whole.last)
    assert read_checkpoint(run.last)["trainer"]["world_size"] == 2
    assert [line.split(",")[0] for line in out if line.startswith("Step: ")] == [
        *("Step: 0", "Step: 2", "Step: 4")
    ]
    assert sum(line.startswith("Parameters: ") for line in out) == 1
    assert [p.name for p in run.root.glob("version_*")] == ["version_0"]
    (again,) = (line for line in out if line.startswith("Continue: "))
    shown = {"torchrun": "--nproc_per_node=2 ", "srun": "srun python "}.get(name, "--nnodes=2 ")
    assert shown in again
    assert "warn" not in err.lower(), err


def test_of_all_processes_one_prints_the_error(text, tmp_path):
    started = Started("torchrun", tmp_path, **text, **{"model.d_model": 15})
    _, out, err = started.end()
    assert out == []
    assert err.count("error: --model.d_model 15: must be divisible by") == 1
    assert err.startswith("error: ")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["torchrun", "two nodes", "srun"])
def test_each_launcher_resumes(name, text, whole, tmp_path):
    """From the config.yaml of a run on one device: the launcher's number counts."""
    begun = Started(name, tmp_path / "logs", **text, **{"trainer.max_steps": 2})
    assert begun.end()[0] == {0}
    config = begun.root / "version_0" / "config.yaml"
    config.write_text(config.read_text().replace("devices: 2", "devices: 1"))
    run = Started(name, begun.root, **text, **{"config": config, "ckpt_path": "last"})
    codes, _, err = run.end()
    assert codes == {0}, err
    assert run.curves == whole.curves
    assert same_weights(run.last, whole.last)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("name", ["torchrun", "srun"])
def test_a_signal_saves_and_stops_all(name, number, text, tmp_path):
    started = Started(
        name, tmp_path, **text, **{"trainer.max_steps": 10**6, "trainer.val_check_interval": 20}
    )
    first = started.processes[0].stdout
    seen = next(line for line in iter(first.readline, "") if line.startswith("Step: 40,"))
    for process in started.processes:  # srun signals each task
        process.send_signal(number)
    codes, out, err = started.end()
    step = read_checkpoint(started.last)["global_step"]
    assert seen
    assert step >= 40
    assert f"Stopped by {number.name} after step {step}" in out
    # torchrun ends with 1, whatever its processes say.
    assert codes == ({1} if name == "torchrun" else {128 + number})
    assert "error: " not in err


@pytest.mark.slow
def test_tasks_that_are_warned_requeue_their_job_once(text, tmp_path, monkeypatch):
    """All tasks get the signal, the first one calls scontrol, and the requeued job resumes."""
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path / "told"}\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{scontrol.parent}:{os.environ['PATH']}")
    options = {"trainer.max_steps": 300, "trainer.val_check_interval": 20}
    started = Started("srun", tmp_path / "logs", **text, **options)
    first = started.processes[0].stdout
    assert any(line.startswith("Step: 40,") for line in iter(first.readline, ""))
    for process in started.processes:
        process.send_signal(signal.SIGUSR1)
    codes, out, err = started.end()
    assert (codes, err) == ({0}, "")
    assert (tmp_path / "told").read_text() == "requeue 71\n"
    step = read_checkpoint(started.last)["global_step"]
    assert f"Stopped by SIGUSR1 after step {step}" in out
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    again = Started("srun", tmp_path / "logs", **text, **options)
    codes, out, err = again.end()
    assert (codes, err) == ({0}, "")
    assert out[0].startswith("SLURM requeued this job: resuming ")
    assert out[0].endswith(f"last.ckpt at step {step}")
    assert read_checkpoint(again.last)["global_step"] == 300
    assert [p.name for p in again.root.glob("version_*")] == ["version_0"]


@pytest.mark.slow
def test_a_process_that_is_killed_is_said_in_one_line(text, tmp_path):
    started = Started("srun", tmp_path, **text, **{"trainer.max_steps": 10**6})
    first, second = started.processes
    for line in iter(first.stdout.readline, ""):
        if line.startswith("Step: 4,"):
            break
    second.kill()
    code, err = first.wait(timeout=60), first.stderr.read()
    assert code == 2
    assert err == "error: another process of this run has ended; its own error says why\n"
    second.communicate()


def with_environment(monkeypatch, env: dict[str, str]) -> None:
    for name in [n for n in os.environ if n.startswith(("SLURM_", "TORCHELASTIC_"))]:
        monkeypatch.delenv(name)
    for name, value in env.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(("env", "name"), [(TORCH_ENV, "torchrun"), (slurm(), "srun")])
def test_what_a_launcher_says(env, name, monkeypatch):
    with_environment(monkeypatch, env)
    found = launch.find_launch()
    assert found == launch.Launch(name, rank=3, local_rank=1, devices=2, num_nodes=2)
    assert found.world_size == 4


def test_torchrun_inside_of_a_slurm_job_wins(monkeypatch):
    with_environment(monkeypatch, slurm(NTASKS="2", NTASKS_PER_NODE="1") | TORCH_ENV)
    assert launch.find_launch().name == "torchrun"


def test_no_launcher(monkeypatch):
    with_environment(monkeypatch, {})
    assert launch.find_launch() is None
    with_environment(monkeypatch, slurm(JOB_NAME="bash"))
    assert launch.find_launch() is None


@pytest.mark.parametrize(
    ("env", "of_first", "of_others"), [({}, 130, 0), (TORCH_ENV, 130, 130), (slurm(), 130, 130)]
)
def test_the_exit_status_of_each_process(env, of_first, of_others, monkeypatch):
    """Lightning's launcher kills the run if one that it started ends with another than 0."""
    with_environment(monkeypatch, env)
    assert launch.status_of(130, is_global_zero=True) == of_first
    assert launch.status_of(130, is_global_zero=False) == of_others


@pytest.mark.parametrize(
    ("env", "argv", "problem"),
    [
        (
            TORCH_ENV,
            ["--trainer.devices=4"],
            "--trainer.devices 4: torchrun started 2 processes on each of 2 nodes; leave it out, "
            "or start with --nproc_per_node=4",
        ),
        (
            slurm(),
            ["--trainer.num_nodes", "1"],
            "--trainer.num_nodes 1: srun started 2 processes on each of 2 nodes; leave it out, or "
            "start with --nodes=1",
        ),
        (
            TORCH_ENV,
            ["--trainer.strategy=single_device"],
            "--trainer.strategy 'single_device': is for one device, and torchrun started 2 "
            "processes on each of 2 nodes; leave it out",
        ),
        (
            TORCH_ENV | {"LOCAL_WORLD_SIZE": "3"},
            [],
            "torchrun started different numbers of processes on its nodes; give each the same "
            "--nproc_per_node",
        ),
        (
            {n: v for n, v in slurm().items() if n != "SLURM_NTASKS_PER_NODE"},
            [],
            "srun started 4 tasks on 2 nodes, and each needs equally many; give "
            "--ntasks-per-node instead of --ntasks",
        ),
        (
            {n: v for n, v in slurm().items() if n != "SLURM_STEP_ID"},
            [],
            "SLURM has 4 tasks for this job, and srun starts them; put srun before the command",
        ),
        (
            TORCH_ENV,
            ["--budget=10m"],
            "--budget: plans for one device, and torchrun started 2 processes on each of 2 nodes; "
            "start it without torchrun",
        ),
    ],
)
def test_options_that_contradict_the_launcher(train, monkeypatch, env, argv, problem):
    with_environment(monkeypatch, env)
    result = train(*argv)
    assert (result.status, result.out, result.err) == (2, "", f"error: {problem}\n")


@pytest.mark.parametrize("devices", ["2", "auto", "[0,1]", "-1"])
def test_options_that_fit_the_launcher(devices, monkeypatch):
    from lit_gpt.training.options import TrainOptions

    with_environment(monkeypatch, TORCH_ENV)
    monkeypatch.setattr("sys.argv", ["train.py"])
    trainer = TrainOptions([f"--trainer.devices={devices}"]).config.trainer
    assert launch.count_of(trainer.devices) == 2
    assert trainer.num_nodes == 2


@pytest.mark.parametrize("name", sorted({*COMMANDS} - {"train", "prepare"}))
def test_other_commands_run_in_one_process(name, monkeypatch, capfd):
    with_environment(monkeypatch, slurm() | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0"})
    assert main([name]) == 2
    problem = f"lit-gpt {name} runs in one process, and srun started 4; start it without srun"
    assert capfd.readouterr().err == f"error: {problem}\n"


def test_without_a_store_the_first_process_of_a_node_prints(monkeypatch):
    with_environment(monkeypatch, slurm())
    assert not launch.reports_error()
    monkeypatch.setenv("SLURM_LOCALID", "0")
    assert launch.reports_error()


@pytest.mark.parametrize(("rank", "printed"), [("0", 1), ("3", 0)])
def test_tasks_that_cannot_train_together_are_said_once(rank, printed, monkeypatch, capfd):
    env = {n: v for n, v in slurm(PROCID=rank).items() if n != "SLURM_NTASKS_PER_NODE"}
    with_environment(monkeypatch, env)
    monkeypatch.setattr("sys.argv", ["lit-gpt"])
    assert main(["train"]) == 2
    assert capfd.readouterr().err.count("error: srun started 4 tasks on 2 nodes") == printed


@pytest.mark.parametrize(
    ("text", "is_lost"),
    [
        ("[/gloo/transport/tcp/pair.cc:554] Connection closed by peer [127.0.0.1]:42", True),
        ("NCCL error: Connection reset by peer", False),
        ("[/gloo/transport/tcp/pair.cc:554] timed out", False),
    ],
)
def test_what_the_end_of_another_process_looks_like(text, is_lost, monkeypatch):
    monkeypatch.setattr(launch.time, "sleep", lambda seconds: None)
    assert (launch.lost_process(RuntimeError(text)) is not None) == is_lost


def test_with_torchruns_store_the_first_that_asks_prints(monkeypatch):
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True)
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    with_environment(monkeypatch, TORCH_ENV | place)
    assert [launch.reports_error() for _ in range(3)] == [True, False, False]
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")  # all were started again
    assert launch.reports_error()


@pytest.mark.parametrize(
    ("env", "program", "expected"),
    [
        ({}, "lit-gpt", "lit-gpt train --x"),
        (
            TORCH_ENV,
            "train.py",
            "torchrun --nnodes=2 --rdzv_backend=c10d "
            "--rdzv_endpoint=node-a:29400 --nproc_per_node=2 scripts/train.py --x",
        ),
        (
            TORCH_ENV | {"WORLD_SIZE": "2", "GROUP_WORLD_SIZE": "1"},
            "lit-gpt",
            "torchrun --nproc_per_node=2 -m lit_gpt train --x",
        ),
        (slurm(), "train.py", "srun python scripts/train.py --x"),
    ],
)
def test_the_command_that_continues_uses_the_launcher(env, program, expected, monkeypatch):
    with_environment(monkeypatch, env)
    monkeypatch.setattr("sys.argv", [program])
    assert launch.command_line("train", "--x") == expected
