"""Owns runs that are killed: settings, moments of the kills, processes and what they leave behind.

All of it is real: processes of scripts/train.py, SIGKILL, and then --ckpt_path last.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SCRIPT = Path(__file__).parents[2] / "scripts" / "train.py"
STEPS, INTERVAL = 200, 5  # of a run, and between its evaluations
OPTIONS = {  # a small model; dropout, a schedule and clipping, so that all state matters
    "model.d_model": 32,
    "model.num_blocks": 2,
    "model.num_heads": 2,
    "model.dropout": 0.2,
    "model.schedule": "cosine",
    "model.warmup_steps": 10,
    "data.context_length": 32,
    "trainer.accelerator": "cpu",
    "trainer.val_check_interval": INTERVAL,
    "trainer.limit_val_batches": 4,
    "trainer.gradient_clip_val": 1.0,
    "trainer.callbacks": "tests.kill_test.recorder.Recorder",
}
MUON = {"model.optimizer": "muon"}
SHUFFLED = {"data.order": "shuffled"}
ACCUMULATE = {"trainer.accumulate_grad_batches": 4}
DDP = {"trainer.strategy": "ddp", "trainer.devices": 2}
SETTINGS: dict[str, dict[str, Any]] = {
    "adamw": {},
    "muon": MUON | SHUFFLED,
    "adamw-accumulate": ACCUMULATE | SHUFFLED,
    "muon-accumulate": ACCUMULATE | MUON,
    "ddp": DDP,
    "ddp-muon-accumulate": DDP | ACCUMULATE | MUON | SHUFFLED,
}
# Kinds of moments, and up to how many seconds after its sign the kill comes: about as long as what
# it is to hit takes on a small machine. The sign of starting is such a time itself.
KINDS = {
    "starting": 0.0,
    "tokenizing": 0.1,
    "training": 0.02,
    "evaluating": 0.03,
    "saving best.ckpt": 0.006,
    "saving last.ckpt": 0.006,
}
POLL = 0.0003  # seconds between two looks for a sign
PATIENCE = 60.0  # seconds in which a process must end after another one of its group was killed


@dataclass(frozen=True)
class Kill:
    """When to kill, and whom."""

    kind: str  # of KINDS
    step: int  # not before, so that the kills move through the run
    delay: float  # share of the kind's seconds
    rank: int | None = None  # only this process; None: all


def schedule(kills: int, seed: int | str, steps: int, ranks: int = 1) -> list[Kill]:
    """A function of its arguments: the kinds in turn, in a new order each round."""
    rng = random.Random(f"{seed} {kills} {steps} {ranks}")
    result: list[Kill] = []
    while len(result) < kills:
        for kind in rng.sample(list(KINDS), len(KINDS)):
            share = (len(result) + rng.random()) / kills
            step = int(share * max(1, steps - 2 * INTERVAL))  # later, the run could end before
            rank = [None, *range(ranks)][len(result) % (ranks + 1)]
            alone = ranks == 1 or kind in ("starting", "tokenizing")  # the others are not there yet
            result.append(Kill(kind, step, rng.random(), None if alone else rank))
    return result[:kills]


class Run:
    """A run in a folder of its own, by as many processes, one after another, as it takes."""

    def __init__(self, folder: Path, path: str, setting: str, steps: int) -> None:
        self.folder, self.steps, self.attempts = folder, steps, 0
        self.ranks = SETTINGS[setting].get("trainer.devices", 1)
        self.logs, self.cache = folder / "logs", folder / "cache"
        self.options = OPTIONS | SETTINGS[setting]
        self.options |= {"data.path": path, "data.cache": self.cache}
        self.options |= {"trainer.default_root_dir": self.logs, "trainer.max_steps": steps}

    def start(self) -> None:
        """Goes on from last.ckpt; afresh where none was saved yet."""
        self.attempts += 1
        self.since = time.monotonic()
        self.record = self.folder / f"record-{self.attempts}"
        self.first_step, self.before = self.steps_saved(), self.temporary_files()
        options = self.options | {"trainer.callbacks.folder": self.record}
        if self.first_step:
            options["ckpt_path"] = "last"
        self.process = subprocess.Popen(
            [sys.executable, str(SCRIPT), *(f"--{k}={v}" for k, v in options.items())],
            stdout=subprocess.PIPE,  # its end tells that all of the group are gone
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,  # a group that can be killed as one
            env={"OMP_NUM_THREADS": "1", **os.environ},  # as quick as such a small model gets
        )

    def finish(self, seconds: float | None = None) -> str:
        """Waits until all processes of the group are gone; what they printed."""
        if not self.process.stdout.closed:
            self.output = self.process.communicate(timeout=seconds)[0]
        return self.output

    def kill_all(self) -> None:
        with suppress(ProcessLookupError, PermissionError):  # nobody left
            os.killpg(self.process.pid, signal.SIGKILL)
        self.finish()

    def checkpoint(self, name: str) -> Path | None:
        from lit_gpt.checkpoint import newest_checkpoint

        return newest_checkpoint(self.logs, name)

    def steps_saved(self) -> int:
        from lit_gpt.checkpoint import read_checkpoint

        path = self.checkpoint("last")
        return read_checkpoint(path)["global_step"] if path else 0

    def temporary_files(self) -> set[Path]:
        """Of checkpoints and of the token cache, being written or left behind by a kill."""
        saved = self.logs.glob("*/checkpoints/*")
        checkpoints = (path for path in saved if path.name not in ("best.ckpt", "last.ckpt"))
        return {*checkpoints, *self.cache.glob("unfinished-*")}

    def records(self) -> list[list[str]]:
        """What each rank of the newest attempt has computed."""
        from tests.kill_test.recorder import read_record

        return [read_record(self.record / f"rank-{rank}.txt") for rank in range(self.ranks)]

    def newest(self) -> tuple[str, int]:
        """The kind and the step of rank 0's last line."""
        lines = self.records()[0]
        kind, step, *_ = lines[-1].split() if lines else ("", -1)
        return kind, int(step)

    def has_sign(self, kill: Kill, seconds_to_start: float) -> bool:
        """Whether what the kill is to hit has begun."""
        if kill.kind == "starting":
            seconds = time.monotonic() - self.since
            return seconds >= kill.delay * seconds_to_start or self.record.exists()
        new = {path.name for path in self.temporary_files() - self.before}
        if kill.kind == "tokenizing":
            return bool(new)
        kind, step = self.newest()
        if kill.kind.startswith("saving"):
            return step >= kill.step and any(kill.kind.split()[1] in name for name in new)
        return step >= kill.step and kind == {"training": "batch"}.get(kill.kind, kill.kind)

    def kill(self, kill: Kill, seconds_to_start: float) -> str | None:
        """Starts a process and kills it; what it was doing, or None where it ended before.

        Args:
            seconds_to_start: up to when a process counts as starting.
        """
        if kill.kind == "tokenizing":
            for folder in set(self.cache.glob("*")) - self.temporary_files():
                shutil.rmtree(folder)
        self.start()
        while self.process.poll() is None and not self.has_sign(kill, seconds_to_start):
            time.sleep(POLL)
        time.sleep(kill.delay * KINDS[kill.kind])
        if self.process.poll() is not None:
            return None
        if kill.rank is None:
            self.kill_all()
            return self.interrupted() if self.process.returncode == -signal.SIGKILL else None
        pid = (self.record / f"rank-{kill.rank}.txt").read_text().split()[1]
        try:
            os.kill(int(pid), signal.SIGKILL)
        except ProcessLookupError:
            return None
        killed = time.monotonic()
        try:
            self.finish(PATIENCE)
            other = f"the other one ended after {time.monotonic() - killed:.1f} s"
        except subprocess.TimeoutExpired:
            other = f"the other one hung for {PATIENCE:.0f} s and was killed"
            self.kill_all()
        return f"{self.interrupted()}, rank {kill.rank} alone, {other}"

    def interrupted(self) -> str:
        """What a killed process was doing, from what it left behind."""
        new = sorted(path.name for path in self.temporary_files() - self.before)
        kind, step = self.newest()
        if new:
            name = new[0].strip(".").rpartition(".")[0]
            return f"saving {name} at step {step}" if name else "tokenizing"
        doing = {
            "": "starting",
            "batch": "training",
            "evaluating": "evaluating",
            "evaluated": "after evaluating",
        }[kind]
        return f"{doing} at step {step}" if kind else doing
