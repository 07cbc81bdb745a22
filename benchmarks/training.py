"""Benchmarks of training: against plain loops, and the Trainer's own share of a step."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from statistics import median
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from benchmarks.measure import (
    ROOT,
    Options,
    Side,
    at_least_one,
    in_turn,
    places,
    read_text,
    report,
    run_script,
    run_training,
)
from lit_gpt.module import next_token_loss
from lit_gpt.optim import build_optimizer
from lit_gpt.training.train import build_run
from lit_gpt.training.warning_filters import silence_warnings


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


class BesideTheTrainer(Callback):
    """After every `group` steps, makes as many bare ones on the same batches with a twin model."""

    def __init__(self, group: int = 20) -> None:
        self.group = group
        self.inside: list[float] = []  # seconds per step
        self.bare: list[float] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        hparams = pl_module.hparams
        self.twin = deepcopy(pl_module.gpt)
        self.optimizer = build_optimizer(
            self.twin,
            hparams.learning_rate,
            hparams.weight_decay,
            hparams.betas,
            kind=hparams.optimizer,
        )
        self.batches = trainer.datamodule.train_dataloader()
        self.since = time.perf_counter()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        done = batch_idx + 1
        if done % self.group:
            return
        self.inside.append((time.perf_counter() - self.since) / self.group)
        batches = [self.batches[i] for i in range(done - self.group, done)]
        start = time.perf_counter()
        for x, y in batches:
            loss = next_token_loss(self.twin, x, y)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
        self.since = time.perf_counter()
        self.bare.append((self.since - start) / self.group)


def overhead(options: Options) -> None:
    """A step of the default job inside the Trainer against a bare one.

    Args:
        options: shared by all benchmarks.
    """
    silence_warnings()
    at_least_one(repeats=options.repeats)
    steps = 100 * options.repeats
    timing = BesideTheTrainer()
    with tempfile.TemporaryDirectory() as folder:
        argv = [
            *places(folder),
            f"--data.path={options.path}",
            "--trainer.accelerator=cpu",
            "--samples.num_tokens=0",
            f"--trainer.max_steps={steps}",
            f"--trainer.val_check_interval={steps}",
        ]
        run = build_run(argv, callbacks=[timing])
        run.trainer.fit(run.model, datamodule=run.data)
    bare, inside = (1e3 * median(seconds[1:]) for seconds in (timing.bare, timing.inside))
    rows = [
        Side("bare forward, backward, step", bare, "ms/step"),
        Side("inside the Trainer", inside, "ms/step", bare / inside),
    ]
    report("overhead", rows, options.out, f"The Trainer adds {inside / bare - 1:.1%} to a step.")
