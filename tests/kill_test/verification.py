"""The kill test: a run that is killed again and again equals the uninterrupted one bit for bit."""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from lit_gpt.errors import UserError
from tests.conftest import ROOT, command_line
from tests.kill_test.killed_run import POLL, SETTINGS, STEPS, Run, schedule
from tests.kill_test.recorder import compare_checkpoints, compare_records


@dataclass
class Outcome:
    """The results of one setting's kills."""

    setting: str
    kills: int  # planned
    seen: int = 0
    passed: int = 0
    batches: int = 0
    evaluations: int = 0
    left_behind: int = 0  # temporary files
    hits: Counter[str] = field(default_factory=Counter)  # what the killed processes were doing
    problems: list[str] = field(default_factory=list)

    def judge(self, hits: list[str], problem: str | None, verdict: str) -> None:
        """Counts and prints kills by what came after them."""
        if problem:
            self.problems.append(problem)
        for hit in hits:
            self.seen += 1
            self.passed += problem is None
            self.hits[hit.partition(" at step")[0]] += 1
            print(f"kill {self.seen} of {self.kills}: {hit}; {problem or verdict}", flush=True)
        if problem and not hits:
            print(f"without a kill: {problem}", flush=True)


@dataclass
class Verification:
    """Kills runs of one setting and compares them with an uninterrupted one."""

    setting: str
    kills: int
    seed: int
    text: str
    folder: Path  # of the runs, which stay there
    steps: int = STEPS

    def run(self) -> Outcome:
        """Trains without interruption, then makes all the planned kills.

        Raises:
            UserError: the text can't be used.
        """
        self.outcome = Outcome(self.setting, self.kills)
        self.whole = Run(self.folder / "whole", self.text, self.setting, self.steps)
        seed = f"{self.seed} {self.setting}"
        self.queue = schedule(self.kills, seed, self.steps, self.whole.ranks)
        self.run_whole()
        runs = 0
        while self.queue:
            runs += 1
            run = Run(self.folder / f"killed-{runs}", self.text, self.setting, self.steps)
            self.kill_until_complete(run)
            self.outcome.left_behind += len(run.temporary_files())
        return self.outcome

    def run_whole(self) -> None:
        self.whole.start()
        try:
            while self.whole.process.poll() is None and not self.whole.record.exists():
                time.sleep(POLL)
            self.seconds_to_start = time.monotonic() - self.whole.since
            output = self.whole.finish()
        finally:
            self.whole.kill_all()
        if self.whole.process.returncode:
            raise UserError(f"the uninterrupted run failed: {output}", field="path")
        self.expected = self.whole.records()

    def kill_until_complete(self, run: Run) -> None:
        """Continues and kills a run until it is complete; lets it finish if no kills are left."""
        pending: list[str] = []  # kills after which nothing has been computed yet
        is_complete = False
        while not is_complete:
            problem, hit = self.attempt(run)
            is_complete = hit is None or run.steps_saved() >= run.steps
            if is_complete and not problem:
                problem = self.compare_ends(run)
            counts = Counter(line.split()[0] for lines in run.records() for line in lines)
            if not problem:
                self.outcome.batches += counts["batch"]
                self.outcome.evaluations += counts["evaluated"]
            hits = [hit] if hit else []  # judged by what comes next, if anything does
            if is_complete:
                pending += hits
                hits = []
            if counts or is_complete or problem:
                verdict = (
                    f"continued from step {run.first_step}, batches equal: {counts['batch']}, "
                    f"evaluations equal: {counts['evaluated']}"
                )
                self.outcome.judge(pending, problem, verdict)
                pending = []
            pending += hits

    def attempt(self, run: Run) -> tuple[str | None, str | None]:
        """One process: what was wrong with it, and what it was doing when it was killed."""
        kill = next(iter(self.queue), None)
        hit = None
        try:
            if kill:
                hit = run.kill(kill, self.seconds_to_start)
            else:
                run.start()
            output = run.finish()
        finally:
            run.kill_all()
        if hit:
            self.queue.pop(0)
        elif kill:  # it missed: try again, at a moment that can't be missed
            assert kill.kind != "training", "the run ended before it could be killed"
            self.queue[0] = replace(kill, kind="training")
        if not hit and run.process.returncode:
            return output.strip().splitlines()[-1], hit
        for found, whole in zip(run.records(), self.expected, strict=True):
            if found and int(found[0].split()[1]) != run.first_step:
                return f"began with {found[0]!r} after step {run.first_step}", hit
            if problem := compare_records(found, whole):
                return problem, hit
        return None, hit

    def compare_ends(self, run: Run) -> str | None:
        """The first difference in the checkpoints of a complete run."""
        for name in ("last", "best"):
            found = run.checkpoint(name) or run.logs / f"{name}.ckpt"
            if problem := compare_checkpoints(found, self.whole.checkpoint(name)):
                return problem
        return None


def print_table(outcomes: list[Outcome]) -> None:
    columns = ("setting", "kills passed", "batches equal", "evaluations equal", "left behind")
    table = Table(*columns, "killed while")
    for outcome in outcomes:
        table.add_row(
            outcome.setting,
            f"{outcome.passed} of {outcome.kills}",
            f"{outcome.batches:,}",
            f"{outcome.evaluations:,}",
            str(outcome.left_behind),
            ", ".join(f"{hit} {n}" for hit, n in sorted(outcome.hits.items())),
        )
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def verify(
    kills: int = 20,
    seed: int = 0,
    settings: tuple[str, ...] = (),
    path: str = str(ROOT / "data" / "订单商品名称.csv"),
) -> int:
    """Kills training runs at random moments and compares them with uninterrupted ones.

    Args:
        kills: for each setting.
        seed: of the moments.
        settings: which to try; all if none is named.
        path: a text file.

    Returns:
        1 if any kill made a difference: the runs are kept. Otherwise 0.
    """
    if kills < 1:
        raise UserError("must be at least 1", field="kills", value=kills)
    for name in settings:
        if name not in SETTINGS:
            choices = ", ".join(SETTINGS)
            raise UserError("no such setting", field="settings", value=name, hint=f"use {choices}")
    outcomes = []
    folder = Path(tempfile.mkdtemp(prefix="verify-resume-"))
    try:
        for name in settings or SETTINGS:
            print(f"{name}: {' '.join(command_line(SETTINGS[name])) or 'defaults'}", flush=True)
            outcomes.append(Verification(name, kills, seed, path, folder / name).run())
        print_table(outcomes)
    finally:
        has_failed = any(outcome.problems for outcome in outcomes)
        if not has_failed:
            shutil.rmtree(folder, ignore_errors=True)
    if has_failed:
        print(f"The runs are in {folder}")
    return int(has_failed)
