"""Benchmarks of training: against plain loops, and the Trainer's own share of a step."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median

from benchmarks.measure import (
    ROOT,
    Options,
    Side,
    at_least_one,
    in_turn,
    read_text,
    report,
    run_script,
    run_training,
)
from benchmarks.step import time_steps


def compare(
    name: str, options: Options, steps: int | None, reference: str, runs: dict[str, list[str]]
) -> None:
    """Whole processes, start-up included: a reference script, and train.py with some options.

    Args:
        name: of the benchmark.
        options: shared by all benchmarks.
        steps: of all sides; None: each side's own.
        reference: the script.
        runs: options of train.py by the name of the side.
    """
    at_least_one(steps=steps)
    read_text(options.path)  # fail before the long runs
    path = str(Path(options.path).resolve())

    def run_reference() -> tuple[float, float]:
        length = ["--steps", str(steps)] if steps else []
        process = run_script(reference, "--path", path, *length)
        return process.seconds, process.result()["loss"]

    def run_train(*argv: str) -> tuple[float, float]:
        length = [f"--trainer.max_steps={steps}"] if steps else []
        with tempfile.TemporaryDirectory() as folder:  # so that each run encodes the text
            process, loss = run_training(folder, f"--data.path={path}", *argv, *length)
        return process.seconds, loss

    sides: dict[str, Callable[[], tuple[float, float]]] = {f"python {reference}": run_reference}
    for label, argv in runs.items():
        sides[label] = lambda argv=argv: run_train(*argv)
    results = in_turn(sides, options.repeats)
    seconds = {side: median(s for s, _ in found) for side, found in results.items()}
    first = next(iter(seconds.values()))
    rows = [
        Side(side, s, "seconds", first / s, loss=median(loss for _, loss in results[side]))
        for side, s in seconds.items()
    ]
    report(name, rows, options.out)


def loop(options: Options, steps: int | None = None) -> None:
    """The default job and configs/modern.yaml against the classic loop in plain PyTorch.

    Args:
        options: shared by all benchmarks.
        steps: instead of the usual number.
    """
    modern = f"--config={ROOT / 'configs' / 'modern.yaml'}"
    runs = {"train.py": [], "train.py --config configs/modern.yaml": [modern]}
    compare("loop", options, steps, "benchmarks/reference_loop.py", runs)


def charlm(options: Options, steps: int | None = None) -> None:
    """A byte-level model, also with 300 of its 2,000 steps, against nanoGPT's recipe.

    Args:
        options: shared by all benchmarks.
        steps: instead of the usual number.
    """
    config = f"--config={ROOT / 'configs' / 'charlm.yaml'}"
    name = "train.py --config configs/charlm.yaml"
    runs = {name: [config], f"{name}, 300 steps": [config, "--trainer.max_steps=300"]}
    compare("charlm", options, steps, "benchmarks/reference_charlm.py", runs)


def overhead(options: Options) -> None:
    """A step of the default job inside the Trainer against a bare one.

    Args:
        options: shared by all benchmarks.
    """
    at_least_one(repeats=options.repeats)
    argv = [f"--data.path={options.path}", "--trainer.accelerator=cpu"]
    times, _ = time_steps(argv, group=20, groups=5 * options.repeats)
    whole, parts = times.medians()
    inside = 1e3 * whole
    bare = 1e3 * (sum(parts.values()) - parts["data"])
    rows = [
        Side("bare forward, backward, step", bare, "ms/step"),
        Side("inside the Trainer", inside, "ms/step", bare / inside),
    ]
    report("overhead", rows, options.out, f"The Trainer adds {inside / bare - 1:.1%} to a step.")
