"""Runs to be killed: their settings, the moments of the kills, and what they leave behind.

Everything is real: processes of scripts/train.py, SIGKILL, then `--ckpt_path=last`.
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

from lit_gpt.checkpoint import Checkpoint
from lit_gpt.generation.language_model import newest_checkpoint
from lit_gpt.storage import TEMPORARY
from tests.conftest import ROOT, command_line
from tests.kill_test.recorder import read_record

STEPS = 200  # of a run
INTERVAL = 5  # steps between evaluations
OPTIONS = {  # a small model with dropout, a schedule and clipping, so that all state matters
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
    "replanned": {"model.schedule": "linear"},
}
REPLANNED = 50  # steps that were planned at first and are not made
# What a kill is meant to hit, and up to how many seconds after its sign the kill comes: about as
# long as it takes on a small machine. The sign of starting is such a time itself.
KINDS = {
    "starting": 0.0,
    "tokenizing": 0.1,
    "training": 0.02,
    "evaluating": 0.03,
    "saving best.ckpt": 0.006,
    "saving last.ckpt": 0.006,
}
POLL = 0.0003  # seconds between two looks for a sign
PATIENCE = 60.0  # seconds that a process may take to end after another of its group was killed


@dataclass(frozen=True)
class Kill:
    """When to kill which process.

    Args:
        kind: one of KINDS.
        step: the earliest step, so that the kills move through the run.
        delay: a share of the kind's seconds.
        rank: the only process to kill; None: all.
    """

    kind: str
    step: int
    delay: float
    rank: int | None = None


def schedule(kills: int, seed: int | str, steps: int, ranks: int = 1) -> list[Kill]:
    """The kills of a run, each kind once per round in random order; a function of its arguments."""
    rng = random.Random(f"{seed} {kills} {steps} {ranks}")
    result: list[Kill] = []
    while len(result) < kills:
        for kind in rng.sample(list(KINDS), len(KINDS)):
            share = (len(result) + rng.random()) / kills
            step = int(share * max(1, steps - 2 * INTERVAL))  # later, the run could end before
            rank = [None, *range(ranks)][len(result) % (ranks + 1)]
            is_alone = ranks == 1 or kind in ("starting", "tokenizing")  # other ranks start later
            result.append(Kill(kind, step, rng.random(), None if is_alone else rank))
    return result[:kills]


class Run:
    """A run in its own folder, continued by one process after another until it is complete."""

    def __init__(self, folder: Path, text: str, setting: str, steps: int) -> None:
        self.folder = folder
        self.steps = steps
        self.attempts = 0
        self.ranks = SETTINGS[setting].get("trainer.devices", 1)
        self.logs = folder / "logs"
        self.cache = folder / "cache"
        self.options = OPTIONS | SETTINGS[setting]
        self.options |= {"data.path": text, "data.cache": self.cache}
        self.options |= {"trainer.default_root_dir": self.logs, "trainer.max_steps": steps}
        self.options_of_plan: dict[str, Any] = {}  # which only the checkpoints have later
        if setting == "replanned":
            first = [0, steps + REPLANNED]
            self.options_of_plan["model.horizons"] = [first, [steps // 3, steps]]

    def start(self) -> None:
        """Continues from last.ckpt; starts afresh if there is none yet."""
        self.attempts += 1
        self.since = time.monotonic()
        self.record = self.folder / f"record-{self.attempts}"
        self.first_step = self.steps_saved()
        self.before = self.temporary_files()
        options = self.options | {"trainer.callbacks.folder": self.record}
        if self.first_step:
            options["ckpt_path"] = "last"
            if self.options_of_plan:
                options["trainer.max_steps"] = self.steps + REPLANNED
        else:
            options |= self.options_of_plan
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])  # finds the recorder
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "scripts" / "train.py"), *command_line(options)],
            stdout=subprocess.PIPE,  # its end shows that the whole group is gone
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,  # a group that can be killed as one
            env={"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": path},
        )

    def finish(self, seconds: float | None = None) -> str:
        """Waits until all processes of the group are gone; returns what they printed."""
        if not self.process.stdout.closed:
            self.output = self.process.communicate(timeout=seconds)[0]
        return self.output

    def kill_all(self) -> None:
        with suppress(ProcessLookupError, PermissionError):  # nobody left
            os.killpg(self.process.pid, signal.SIGKILL)
        self.finish()

    def checkpoint(self, name: str) -> Path | None:
        return newest_checkpoint(self.logs, name)

    def steps_saved(self) -> int:
        path = self.checkpoint("last")
        return Checkpoint.read(path).global_step if path else 0

    def temporary_files(self) -> set[Path]:
        """Checkpoints and token caches that are being written or were left by a kill."""
        saved = self.logs.glob("*/checkpoints/*")
        checkpoints = (path for path in saved if path.name not in ("best.ckpt", "last.ckpt"))
        return {*checkpoints, *self.cache.glob(f"{TEMPORARY}*")}

    def new_files(self) -> list[str]:
        """Names of the newest attempt's temporary files."""
        return sorted(path.name for path in self.temporary_files() - self.before)

    def records(self) -> list[list[str]]:
        """What each rank of the newest attempt has recorded."""
        return [read_record(self.record / f"rank-{rank}.txt") for rank in range(self.ranks)]

    def newest(self) -> tuple[str, int]:
        """The event and the step of rank 0's last line."""
        lines = self.records()[0]
        event, step, *_ = lines[-1].split() if lines else ("", -1)
        return event, int(step)

    def has_sign(self, kill: Kill, seconds_to_start: float) -> bool:
        """Whether what the kill is meant to hit has begun."""
        if kill.kind == "starting":
            seconds = time.monotonic() - self.since
            return seconds >= kill.delay * seconds_to_start or self.record.exists()
        if kill.kind == "tokenizing":
            return bool(self.new_files())
        event, step = self.newest()
        if kill.kind.startswith("saving"):
            name = kill.kind.split()[1]
            return step >= kill.step and any(name in file for file in self.new_files())
        return step >= kill.step and event == {"training": "batch"}.get(kill.kind, kill.kind)

    def kill(self, kill: Kill, seconds_to_start: float) -> str | None:
        """Starts a process and kills it; returns what it was doing, or None if it ended before.

        Args:
            seconds_to_start: for how long a process counts as starting.
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
        if kill.rank is not None:
            return self._kill_rank(kill.rank)
        self.kill_all()
        return self.interrupted() if self.process.returncode == -signal.SIGKILL else None

    def _kill_rank(self, rank: int) -> str | None:
        """Kills one process of two, and the other if it doesn't end by itself."""
        pid = (self.record / f"rank-{rank}.txt").read_text().split()[1]
        try:
            os.kill(int(pid), signal.SIGKILL)
        except ProcessLookupError:
            return None
        killed = time.monotonic()
        try:
            self.finish(PATIENCE)
            other = f"the other ended after {time.monotonic() - killed:.1f} s"
        except subprocess.TimeoutExpired:
            other = f"the other hung for {PATIENCE:.0f} s and was killed"
            self.kill_all()
        return f"{self.interrupted()}, only rank {rank}, {other}"

    def interrupted(self) -> str:
        """What a killed process was doing, judged by what it left behind."""
        files = self.new_files()
        event, step = self.newest()
        if files and files[0].startswith(TEMPORARY):
            return "tokenizing"
        if files:
            return f"saving {files[0].split('.')[1]}.ckpt at step {step}"
        if not event:
            return "starting"
        doing = {"batch": "training", "evaluated": "after evaluating"}.get(event, event)
        return f"{doing} at step {step}"
