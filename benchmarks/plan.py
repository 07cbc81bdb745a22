"""The benchmark of the plan: what plan.py predicts for a run beside what the run then takes."""

from __future__ import annotations

import tempfile
from pathlib import Path
from statistics import median

from benchmarks.measure import (
    Options,
    Process,
    Side,
    at_least_one,
    in_turn,
    places,
    read_text,
    report,
    run_script,
    run_training,
)


def plan(options: Options, config: str | None = None, steps: int | None = None) -> None:
    """The time and memory that plan.py predicts against train.py's.

    Args:
        options: shared by all benchmarks.
        config: YAML file of options for both.
        steps: instead of the usual number.
    """
    at_least_one(steps=steps)
    read_text(options.path)
    argv = [f"--config={Path(config).resolve()}"] if config else []
    argv += [f"--data.path={Path(options.path).resolve()}"]
    argv += [f"--trainer.max_steps={steps}"] if steps else []
    with tempfile.TemporaryDirectory() as folder:

        def run_plan() -> Process:
            return run_script("scripts/plan.py", "--json", *places(folder), *argv)

        def run_train() -> Process:
            process, _ = run_training(folder, *argv)
            return process

        results = in_turn({"plan": run_plan, "train": run_train}, options.repeats)
    predictions = [process.result() for process in results["plan"]]
    predicted = median(prediction["seconds"] for prediction in predictions)
    predicted_mb = median(prediction["memory_bytes"] for prediction in predictions) / 1e6 or None
    own = median(process.seconds for process in results["plan"])
    real = median(process.seconds for process in results["train"])
    peaks = [process.peak_mb for process in results["train"] if process.peak_mb]
    real_mb = median(peaks) if peaks else None  # unknown on Windows
    rows = [
        Side("train.py, measured", real, "seconds", peak_mb=real_mb),
        Side(
            "predicted by plan.py",
            predicted,
            "seconds",
            ratio=predicted / real,
            peak_mb=predicted_mb,
        ),
    ]
    ratios = f"time {predicted / real:.2f}"
    if predicted_mb and real_mb:
        ratios += f", memory {predicted_mb / real_mb:.2f}"
    note = f"Predicted / measured: {ratios}; plan.py itself took {own:.1f} s."
    report("plan", rows, options.out, note)
