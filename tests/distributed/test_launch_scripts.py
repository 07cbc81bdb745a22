"""The scripts in configs/torchrun and configs/slurm: launchers note how they are called."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lit_gpt.distributed.launch import Launch, find_launch
from lit_gpt.training.options import TrainOptions
from tests.conftest import ROOT, SMALL, command_line, write_text
from tests.distributed.test_launch import free_port, with_environment

SCRIPTS = sorted((ROOT / "configs").glob("*/*.sh"))
SLURM = [path for path in SCRIPTS if path.parent.name == "slurm"]
MORE = ["--data.path=my own.txt", "--model.d_model=96"]
pytestmark = pytest.mark.skipif(not shutil.which("bash"), reason="needs bash")


def called(script: Path, folder: Path, **env: str) -> list[str]:
    """The command line that the script starts, launcher first."""
    (folder / ".venv" / "bin").mkdir(parents=True)
    (folder / ".venv" / "bin" / "activate").write_text("export ACTIVATED=1\n")
    for name in ("torchrun", "srun"):
        stub = folder / name
        stub.write_text(f'#!/bin/bash\nprintf "%s\\0" {name} "$ACTIVATED" "$@" > {folder}/called\n')
        stub.chmod(0o755)
    env = {"PATH": f"{folder}:{os.environ['PATH']}", "ACTIVATED": "", **env}
    subprocess.run(["bash", str(script), *MORE], check=True, cwd=folder, env=env)
    words = (folder / "called").read_text().split("\0")[:-1]
    assert words.pop(1) == ("1" if words[0] == "srun" else "")
    return words


def directives(script: Path) -> dict[str, str]:
    return dict(re.findall(r"^#SBATCH --([\w-]+)=?(\S*)$", script.read_text(), re.MULTILINE))


def test_there_are_scripts():
    assert [f"{p.parent.name}/{p.stem}" for p in SCRIPTS] == [
        f"{launcher}/{nodes}"
        for launcher in ("slurm", "torchrun")
        for nodes in ("one_node", "several_nodes")
    ]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_the_command_of_a_script(script, tmp_path, monkeypatch):
    env = {"NODES": "2", "HOST": "node-a", "SLURM_CPUS_PER_TASK": "8"}
    words = called(script, tmp_path, **env)
    at = words.index("train")
    shown = {
        "torchrun/one_node": "torchrun --standalone --nproc_per_node=gpu -m lit_gpt",
        "torchrun/several_nodes": "torchrun --nnodes=2 --nproc_per_node=gpu --rdzv_backend=c10d "
        "--rdzv_endpoint=node-a:29400 --rdzv_id=lit_gpt -m lit_gpt",
        "slurm/one_node": "srun --cpus-per-task=8 --kill-on-bad-exit=1 lit-gpt",
    }
    shown["slurm/several_nodes"] = shown["slurm/one_node"]
    assert " ".join(words[:at]) == shown[f"{script.parent.name}/{script.stem}"]
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("sys.argv", ["lit-gpt"])
    config = TrainOptions(words[at + 1 :]).config
    assert config.data.path == "my own.txt"  # what follows wins
    assert (config.model.d_model, config.model.num_blocks) == (96, 12)


@pytest.mark.parametrize("script", SLURM, ids=lambda p: p.stem)
def test_what_slurm_is_asked_for(script, monkeypatch):
    asked = directives(script)
    assert asked["ntasks-per-node"] == asked["gpus-per-node"]
    assert {"requeue", "signal", "time", "open-mode", "output"} <= asked.keys()
    number, seconds = re.fullmatch(r"(\w+)@(\d+)", asked["signal"]).groups()
    assert number == "USR1"  # the one that a run takes for the warning
    assert int(seconds) >= 60
    tasks, nodes = int(asked["ntasks-per-node"]), int(asked["nodes"])
    names = {"NTASKS": tasks * nodes, "NNODES": nodes, "NTASKS_PER_NODE": tasks, "STEP_ID": 0}
    names |= {"PROCID": 1, "LOCALID": 1, "JOB_NAME": asked["job-name"]}
    with_environment(monkeypatch, {f"SLURM_{name}": str(value) for name, value in names.items()})
    assert find_launch() == Launch("srun", 1, 1, tasks, nodes)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_the_shell_understands_a_script(script):
    assert subprocess.run(["bash", "-n", script]).returncode == 0
    checker = shutil.which("shellcheck") or str(Path(sys.executable).with_name("shellcheck"))
    if not Path(checker).is_file():
        pytest.skip("needs shellcheck")
    found = subprocess.run([checker, script], capture_output=True, text=True)
    assert (found.returncode, found.stdout) == (0, "")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["one_node", "several_nodes"])
def test_the_scripts_of_torchrun_train(name, tmp_path):
    options = SMALL | {"trainer.max_steps": 2, "model.compile": "false", "data.batch_size": 2}
    options |= {"data.path": write_text(tmp_path / "text.txt"), "data.cache": tmp_path / "cache"}
    options |= {"trainer.default_root_dir": tmp_path / "logs", "model.schedule": "constant"}
    env = {"NODES": "2", "HOST": "127.0.0.1", "PORT": str(free_port()), "PROCESSES": "2"}
    env["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    if name == "several_nodes":
        env["PROCESSES"] = "1"
    command = ["bash", f"configs/torchrun/{name}.sh", *command_line(options)]
    started = [
        subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, **env}, text=True, stdout=-1, stderr=-1
        )
        for _ in range(2 if name == "several_nodes" else 1)
    ]
    ends = [process.communicate(timeout=300) for process in started]
    assert {process.returncode for process in started} == {0}, ends
    assert "".join(out for out, _ in ends).count("Step: 2,") == 1
