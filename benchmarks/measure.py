"""Owns side-by-side measurements: sides timed in turn, medians, a table and the same as JSON."""

from __future__ import annotations

import json
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

import torch
from rich.console import Console
from rich.table import Table

from lit_gpt.errors import UserError

T = TypeVar("T")
ROOT = Path(__file__).parent.parent


@dataclass
class Side:
    """One row: what was measured, and how often as good as the first row (above 1: better)."""

    name: str
    value: float
    unit: str
    ratio: float = 1.0
    loss: float | None = None  # nats a token
    peak_mb: float | None = None
    share: float | None = None  # of the card's peak


def in_turn(sides: dict[str, Callable[[], T]], repeats: int) -> dict[str, list[T]]:
    """Calls each side `repeats` times, one after the other and round again: machines drift."""
    if repeats < 1:
        raise UserError(f"--repeats must be at least 1, not {repeats}")
    results: dict[str, list[T]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, side in sides.items():
            results[name].append(side())
    return results


def report(name: str, rows: list[Side], folder: str, note: str = "") -> None:
    """Prints the rows as a table and writes them to `folder`/`name`.json."""
    columns = {
        "loss": ("loss, nats a token", "{:.4f}"),
        "peak_mb": ("peak memory, MB", "{:,.0f}"),
        "share": ("share of the peak", "{:.1%}"),
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
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    if note:
        print(note)
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        path = Path(folder) / f"{name}.json"
        machine = {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "machine": platform.machine(),
            "threads": torch.get_num_threads(),
        }
        content = {"machine": machine, "rows": [asdict(row) for row in rows], "note": note}
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"cannot write to {folder}: {error.strerror}; name another folder with --out"
        ) from error
    print(f"Written to {path}")


def text_of(path: str) -> bytes:
    """What is in the one text file that a benchmark reads.

    Raises:
        UserError: no such file, or an empty one.
    """
    if Path(path).is_file() and (text := Path(path).read_bytes()):
        return text
    raise UserError(f"no text file at {path!r}: give --path one that has text")


def run_script(script: str, *options: str) -> tuple[float, float]:
    """Runs a script of this project as a process; its seconds and its final validation loss."""
    start = time.perf_counter()
    command = [sys.executable, str(ROOT / script), *options]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    seconds = time.perf_counter() - start
    if result.returncode == 2:  # the user's options
        raise UserError(result.stderr.strip().splitlines()[-1].removeprefix("error: "))
    assert result.returncode == 0, result.stderr
    return seconds, float(re.search(r"Final validation loss: ([\d.]+)", result.stdout)[1])
