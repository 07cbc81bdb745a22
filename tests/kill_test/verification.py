"""Owns the kill test: a run killed again and again is, bit for bit, the uninterrupted run."""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from argparse import Namespace
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from lit_gpt.errors import UserError
from tests.kill_test.killed_run import POLL, SETTINGS, STEPS, Run, schedule
from tests.kill_test.recorder import compare_checkpoints, compare_records


@dataclass
class Outcome:
    """What came of the kills of one setting."""

    setting: str
    kills: int  # planned
    seen: int = 0
    passed: int = 0
    batches: int = 0
    evaluations: int = 0
    left_behind: int = 0  # temporary files
    hits: Counter = field(default_factory=Counter)  # what the processes were doing
    problems: list[str] = field(default_factory=list)

    def judge(self, hits: list[str], problem: str | None, verdict: str) -> None:
        """Counts kills by what came after them, and says it."""
        self.problems += [problem] if problem else []
        for hit in hits:
            self.seen += 1
            self.passed += problem is None
            self.hits[hit.partition(" at step")[0]] += 1
            print(f"kill {self.seen} of {self.kills}: {hit}; {problem or verdict}", flush=True)
        if problem and not hits:
            print(f"without a kill: {problem}", flush=True)


@dataclass
class Verification:
    """Kills runs of one setting and compares them with the uninterrupted one."""

    setting: str
    kills: int
    seed: int
    path: str
    folder: Path
    steps: int = STEPS

    def run(self) -> Outcome:
        """Runs whole, then kills all planned; each folder of a run stays for a look at it.

        Raises:
            UserError: the text can't be used.
        """
        self.outcome = Outcome(self.setting, self.kills)
        self.whole = Run(self.folder / "whole", self.path, self.setting, self.steps)
        self.queue = schedule(
            self.kills, f"{self.seed} {self.setting}", self.steps, self.whole.ranks
        )
        self.whole.start()
        try:
            while self.whole.process.poll() is None and not self.whole.record.exists():
                time.sleep(POLL)
            self.seconds_to_start = time.monotonic() - self.whole.since
            output = self.whole.finish()
        finally:
            self.whole.kill_all()
        if self.whole.process.returncode == 2:
            raise UserError(output.strip().splitlines()[-1].removeprefix("error: "))
        assert self.whole.process.returncode == 0, output
        self.expected = self.whole.records()
        runs = 0
        while self.queue:
            runs += 1
            run = Run(self.folder / f"killed-{runs}", self.path, self.setting, self.steps)
            self.kill_again_and_again(run)
            self.outcome.left_behind += len(run.temporary_files())
        return self.outcome

    def kill_again_and_again(self, run: Run) -> None:
        """Until the run is complete, or none of the planned kills is left; then lets it finish."""
        pending: list[str] = []  # kills after which nothing was computed yet
        complete = False
        while not complete:
            problem, hit = self.attempt(run)
            complete = hit is None or run.steps_saved() >= run.steps
            if complete and not problem:
                problem = self.compare_ends(run)
            counts = Counter(line.split()[0] for lines in run.records() for line in lines)
            batches, evaluations = counts["batch"], counts["evaluated"]
            if not problem:
                self.outcome.batches += batches
                self.outcome.evaluations += evaluations
            after = [hit] if hit else []  # what comes next judges it, if anything does
            if complete:
                pending, after = pending + after, []
            if counts or complete or problem:
                equal = f"batches equal: {batches}, evaluations equal: {evaluations}"
                verdict = f"went on from step {run.first_step}, {equal}"
                self.outcome.judge(pending, problem, verdict)
                pending = []
            pending += after

    def compare_ends(self, run: Run) -> str | None:
        """What differs in the checkpoints of a complete run."""
        for name in ("last", "best"):
            found, whole = run.checkpoint(name), self.whole.checkpoint(name)
            if problem := compare_checkpoints(found or run.logs / f"{name}.ckpt", whole):
                return problem
        return None

    def attempt(self, run: Run) -> tuple[str | None, str | None]:
        """One process: what was wrong with it, and what it was doing when it was killed."""
        kill, hit = next(iter(self.queue), None), None
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
        elif kill:  # it was missed: the same again, at a moment that can't be
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


def report(outcomes: list[Outcome]) -> None:
    columns = ("setting", "kills passed", "batches equal", "evaluations equal", "left behind")
    table = Table(*columns, "killed while")
    for outcome in outcomes:
        hits = ", ".join(f"{hit} {n}" for hit, n in sorted(outcome.hits.items()))
        table.add_row(
            outcome.setting,
            f"{outcome.passed} of {outcome.kills}",
            f"{outcome.batches:,}",
            f"{outcome.evaluations:,}",
            str(outcome.left_behind),
            hits,
        )
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def main(options: Namespace) -> int:
    """All settings asked for; 0 where every kill passed, else 1, and the runs are kept."""
    outcomes = []
    folder = Path(tempfile.mkdtemp(prefix="verify-resume-"))
    try:
        for name in options.settings:
            changes = " ".join(f"--{k}={v}" for k, v in SETTINGS[name].items())
            print(f"{name}: {changes or 'the defaults'}", flush=True)
            arguments = (name, options.kills, options.seed, options.path, folder / name)
            outcomes.append(Verification(*arguments).run())
        report(outcomes)
    finally:
        failed = any(outcome.problems for outcome in outcomes)
        if not failed:
            shutil.rmtree(folder, ignore_errors=True)
    if failed:
        print(f"The runs are in {folder}")
    return int(failed)
