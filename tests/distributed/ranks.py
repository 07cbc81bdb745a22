"""Processes that train together, forked from one that has imported everything: a second each."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.conftest import SMALL, command_line

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["lit_gpt.training.train", "torch.distributed.checkpoint"])


@dataclass
class Ranks:
    """What the processes of a run ended with, and printed."""

    statuses: list[int | None]  # None: it did not end in time
    out: list[str]
    folder: Path  # of the newest run

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def become(rank: int, size: int, port: int) -> None:
    """Makes this process one of `size` that torchrun started on one node; 1: without torchrun."""
    from lightning.fabric.utilities.rank_zero import rank_zero_only

    if size > 1:
        os.environ |= {
            "TORCHELASTIC_RUN_ID": "none",
            **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
            **{"RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0"},
            **{"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size), "GROUP_WORLD_SIZE": "1"},
        }
    rank_zero_only.rank = rank


def call(work: Callable[..., Any], rank: int, size: int, port: int, out: str, args: Any) -> None:
    file = os.open(out, os.O_CREAT | os.O_WRONLY)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    become(rank, size, port)
    os._exit(work(*args) or 0)


def together(work: Callable[..., Any], size: int, folder: Path, *args: Any) -> list[int | None]:
    """Calls `work` in `size` processes; their exit statuses. What rank 0 prints is in out0.txt."""
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    processes = []
    for rank in range(size):
        out = folder / f"out{rank}.txt"
        out.unlink(missing_ok=True)
        given = (work, rank, size, port, str(out), args)
        processes.append(SERVER.Process(target=call, args=given))
        processes[-1].start()
    for process in processes:
        process.join(120)
    statuses = [process.exitcode for process in processes]
    for process in processes:
        if process.exitcode is None:
            process.kill()
    return statuses


def command(argv: list[str]) -> int:
    import torch

    from lit_gpt import module
    from lit_gpt.command import run
    from lit_gpt.training import train

    module.fastest_dtype = lambda _: torch.float32  # two runs may measure it differently
    sys.argv = ["train.py"]
    try:
        return run(lambda: train.main(argv), train.option_name)
    except SystemExit as stop:
        return int(stop.code or 0)


def train_on(size: int, folder: Path, text: Path, **options: Any) -> Ranks:
    """The training command in `size` processes, with its runs in `folder`."""
    places = {"data.path": text, "data.cache": text.parent / "cache"}
    places |= {"trainer.default_root_dir": folder, "trainer.enable_progress_bar": False}
    fixed = {"data.order": "shuffled", "model.dropout": 0.0, "samples.num_tokens": 2}
    argv = command_line(SMALL | places | fixed | options)
    statuses = together(command, size, folder, argv)
    out = [(folder / f"out{rank}.txt").read_text(encoding="utf-8") for rank in range(size)]
    runs = sorted(folder.glob("version_*"), key=lambda run: int(run.name.partition("_")[2]))
    return Ranks(statuses, out, runs[-1] if runs else folder)
