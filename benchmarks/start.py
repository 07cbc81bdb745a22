"""How long a run takes to start: its imports, its options, and the way to its first step."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from typing import Any

from lightning.pytorch.callbacks import Callback
from rich.table import Table

from benchmarks.measure import ROOT, Options, in_turn, places, save, show

IMPORTS = ("torch", "torch._dynamo", "lightning.pytorch")


class FirstStep(Callback):
    """Ends the process right before the first training step."""

    def on_train_batch_start(self, *_: Any) -> None:
        os._exit(0)


@dataclass
class Start:
    """A row: seconds of a process from its start to its end, and those of its processors."""

    name: str
    seconds: float
    cpu_seconds: float


def run_process(*argv: str) -> tuple[float, float]:
    """Runs Python; gives its seconds, and the seconds of processors that it took."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *argv], stdout=subprocess.DEVNULL, cwd=ROOT, env=environment
    )
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, f"{argv} failed"
    return time.perf_counter() - start, usage.ru_utime + usage.ru_stime


def start(options: Options) -> None:
    """Imports, then the training command up to its options and up to its first step."""
    with tempfile.TemporaryDirectory() as folder:
        script = [
            str(ROOT / "scripts" / "train.py"),
            *places(folder),
            f"--data.path={options.path}",
        ]
        sides = {f"import {name}": ["-c", f"import {name}"] for name in IMPORTS}
        sides["train.py --print_config"] = [*script, "--print_config"]
        first = "--trainer.callbacks=benchmarks.start.FirstStep"
        sides["train.py, to its first step"] = [*script, first]
        run_process(*script, first)  # encodes the text, and warms up the disk
        calls = {name: lambda argv=argv: run_process(*argv) for name, argv in sides.items()}
        results = in_turn(calls, options.repeats)
    rows = [
        Start(name, *(statistics.median(column) for column in zip(*pairs, strict=True)))
        for name, pairs in results.items()
    ]
    table = Table("start", "seconds", "of processors")
    for row in rows:
        table.add_row(row.name, f"{row.seconds:.2f}", f"{row.cpu_seconds:.2f}")
    show(table)
    save("start", [asdict(row) for row in rows], options.out)
