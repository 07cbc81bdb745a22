"""Side-by-side measurements: sides timed in turn, medians, a table and the same as JSON."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.table import Table

from benchmarks.machine import machine
from lit_gpt.errors import UserError, check_least
from lit_gpt.model import GPT, GPTConfig
from lit_gpt.reports.history import read_history

T = TypeVar("T")
ROOT = Path(__file__).resolve().parents[1]
SAMPLE = str(ROOT / "data" / "订单商品名称.csv")


@dataclass(frozen=True)
class Options:
    """The options that all benchmarks share.

    Args:
        repeats: how often each side is measured.
        out: folder for the results as JSON.
        path: a text file.
    """

    repeats: int = 3
    out: str = "logs/benchmark"
    path: str = SAMPLE


@dataclass
class Side:
    """One row of a table.

    Args:
        name: what was measured.
        value: the median.
        unit: of the value.
        ratio: to the first row; above 1 is better.
        loss: nats/token.
        peak_mb: peak memory.
        share: of the GPU's peak speed.
    """

    name: str
    value: float
    unit: str
    ratio: float = 1.0
    loss: float | None = None
    peak_mb: float | None = None
    share: float | None = None


@dataclass
class Process:
    """What a process took: seconds, peak memory in MB (None: unknown), and what it printed.

    On Linux the peak is at least that of the process that started it.
    """

    seconds: float
    peak_mb: float | None
    output: str

    def result(self) -> dict[str, Any]:
        """The last line of its output, which is JSON."""
        return json.loads(self.output.splitlines()[-1])


def flops_per_token(config: GPTConfig, model: GPT) -> float:
    """Operations of forward and backward: PaLM's formula (Chowdhery et al. 2022, appendix B).

    6 for each weight that multiplies (an untied embedding and pairs don't), and 12 C T per block
    for attention.
    """
    multiplying = sum(p.numel() for p in model.parameters())
    if not config.tie_embeddings:
        multiplying -= model.embedding.weight.numel()
    if model.pairs is not None:
        multiplying -= sum(p.numel() for p in model.pairs.parameters())
    return 6 * multiplying + 12 * config.num_blocks * config.d_model * config.context_length


def at_least_one(**options: float | None) -> None:
    check_least(1, **options)


def in_turn(sides: dict[str, Callable[[], T]], repeats: int) -> dict[str, list[T]]:
    """Calls the sides one after the other, `repeats` rounds, since the speed of machines drifts."""
    at_least_one(repeats=repeats)
    results: dict[str, list[T]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, side in sides.items():
            results[name].append(side())
    return results


def show(table: Table) -> None:
    Console(width=None if sys.stdout.isatty() else 140).print(table)


def save(name: str, rows: list[dict[str, Any]], folder: str, note: str = "") -> None:
    """Prints the note and the machine, and writes them and the rows to `folder`/`name`.json."""
    if note:
        print(note)
    on = machine()
    print(", ".join(f"{name} {value}" for name, value in on.items()))
    path = Path(folder, f"{name}.json")
    content = {"machine": on, "rows": rows, "note": note}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"can't be written ({error.strerror})",
            field="out",
            value=folder,
            hint="name another folder",
        ) from error
    print(f"Written to {path}")


def report(name: str, rows: list[Side], folder: str, note: str = "") -> None:
    """Prints the rows and the machine, and writes both to `folder`/`name`.json."""
    columns = {
        "loss": ("loss, nats/token", "{:.4f}"),
        "peak_mb": ("peak memory, MB", "{:,.0f}"),
        "share": ("share of peak speed", "{:.1%}"),
    }
    shown = [c for c in columns if any(getattr(row, c) is not None for row in rows)]
    table = Table(name, rows[0].unit, "ratio", *(columns[c][0] for c in shown))
    for row in rows:
        cells = ((columns[c][1], getattr(row, c)) for c in shown)
        table.add_row(
            row.name,
            f"{row.value:,.4g}" if row.value < 1000 else f"{row.value:,.0f}",
            f"{row.ratio:.2f}",
            *("" if cell is None else form.format(cell) for form, cell in cells),
        )
    show(table)
    save(name, [asdict(row) for row in rows], folder, note)


def read_text(path: str) -> bytes:
    """The content of the one text file that a benchmark reads.

    Raises:
        UserError: no such file, or an empty one.
    """
    if Path(path).is_file() and (text := Path(path).read_bytes()):
        return text
    raise UserError("no text file", field="path", value=path, hint="name one that has text")


def run_script(script: str, *argv: str) -> Process:
    """Runs a script of this repository as a process, start-up included.

    If it refuses its options, its message becomes this process's.
    """
    command = [sys.executable, str(ROOT / script), *argv]
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=out, stderr=err)
        peak_mb = None
        try:
            if sys.platform == "win32":
                process.wait()
            else:  # the peak memory of this process alone
                _, status, usage = os.wait4(process.pid, 0)
                process.returncode = os.waitstatus_to_exitcode(status)
                peak_mb = usage.ru_maxrss / (1e6 if sys.platform == "darwin" else 1e6 / 1024)
        except BaseException:
            process.kill()
            raise
        seconds = time.perf_counter() - start
        out.seek(0)
        err.seek(0)
        if process.returncode == 2:
            print(err.read().strip(), file=sys.stderr)
            raise SystemExit(2)
        assert process.returncode == 0, err.read()
        return Process(seconds, peak_mb, out.read())


def places(folder: str) -> list[str]:
    """Options with which train.py leaves all its files in `folder`."""
    return [f"--trainer.default_root_dir={folder}", f"--data.cache={folder}/cache"]


def run_training(folder: str, *argv: str) -> tuple[Process, float]:
    """Runs train.py with all its files in `folder`; also returns its final loss, nats/token."""
    process = run_script("scripts/train.py", *places(folder), *argv)
    newest = max(Path(folder).glob("version_*"), key=lambda run: run.stat().st_mtime)
    final = read_history(newest).final
    assert final is not None, f"the run in {newest} did not end"
    return process, final.loss
