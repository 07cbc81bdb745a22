"""Owns the benchmark of the plan: what plan.py says of a run beside what the run then takes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from statistics import median

from benchmarks.measure import ROOT, Side, in_turn, report, text_of
from lit_gpt.errors import UserError

UNITS = {"h": 3600, "min": 60, "s": 1, "ms": 1e-3}


def run_measured(script: str, *options: str) -> tuple[float, float, str]:
    """Runs a script of this project as a process: its seconds, peak memory in MB and output."""
    command = [sys.executable, str(ROOT / script), *options]
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=out, stderr=err, cwd=ROOT)
        try:
            _, status, usage = os.wait4(process.pid, 0)  # of this process alone
        except BaseException:
            process.kill()
            raise
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0), err.seek(0)
        output, errors = out.read(), err.read()
    if process.returncode == 2:  # the user's options
        raise UserError(errors.strip().splitlines()[-1].removeprefix("error: "))
    assert process.returncode == 0, errors
    peak = usage.ru_maxrss / (1e6 if sys.platform == "darwin" else 1e6 / 1024)
    return seconds, peak, output


def estimates(output: str) -> tuple[float, float]:
    """The seconds and MB that plan.py printed."""
    text = re.search(r"^Time: about (.*) on this machine", output, re.M)[1]
    seconds = sum(float(n) * UNITS[unit] for n, unit in re.findall(r"([\d.]+) (\w+)", text))
    return seconds, float(
        re.search(r"^Memory: about ([\d,]+) MB", output, re.M)[1].replace(",", "")
    )


def plan(options: Namespace) -> None:
    """plan.py, then train.py with the same options, as a user would run them."""
    text_of(options.path)
    with tempfile.TemporaryDirectory() as folder:
        places = (f"--trainer.default_root_dir={folder}", f"--data.cache={folder}/cache")
        same = [f"--config={options.config}"] if options.config else []
        same += [f"--data.path={options.path}", *places]
        same += [f"--trainer.max_steps={options.steps}"] if options.steps else []
        sides = {
            s: (lambda s=s: run_measured(s, *same)) for s in ("scripts/plan.py", "scripts/train.py")
        }
        results = in_turn(sides, options.repeats)
    planned = [estimates(output) for _, _, output in results["scripts/plan.py"]]
    estimated, estimated_mb = (median(values) for values in zip(*planned, strict=True))
    real, real_mb = (
        median(values) for values in list(zip(*results["scripts/train.py"], strict=True))[:2]
    )
    rows = [
        Side("train.py, as it was", real, "seconds", peak_mb=real_mb),
        Side(
            "plan.py's estimate of it", estimated, "seconds", estimated / real, None, estimated_mb
        ),
    ]
    own = median([seconds for seconds, _, _ in results["scripts/plan.py"]])
    note = (
        f"Estimated by real: time {estimated / real:.2f}, memory {estimated_mb / real_mb:.2f}; "
        f"plan.py itself took {own:.1f} s."
    )
    report("plan", rows, options.out, note)
