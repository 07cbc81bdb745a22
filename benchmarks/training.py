"""Owns the benchmarks of training: against a plain loop, and the Trainer's own share of a step."""

from __future__ import annotations

import tempfile
import time
from argparse import Namespace
from copy import deepcopy
from statistics import median
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from benchmarks.measure import ROOT, Side, in_turn, report, run_script, text_of
from lit_gpt.module import next_token_loss
from lit_gpt.optim import build_optimizer
from lit_gpt.training.train import TrainingCLI, quieten


def train_options(options: Namespace, folder: str, *more: str) -> list[str]:
    """Of a run that encodes the text anew, as a first run does, and leaves nothing behind."""
    places = (f"--trainer.default_root_dir={folder}", f"--data.cache={folder}/cache")
    return [f"--data.path={options.path}", *places, *more]


def compare(name: str, options: Namespace, reference: str, runs: dict[str, list[str]]) -> None:
    """Whole processes, start-up included: the reference script and train.py with some options."""

    def train(*more: str) -> tuple[float, float]:
        with tempfile.TemporaryDirectory() as folder:
            return run_script("scripts/train.py", *train_options(options, folder, *more, *length))

    text_of(options.path)  # before the long runs
    length = [f"--trainer.max_steps={options.steps}"] if options.steps else []
    same = ["--path", options.path, *(["--steps", str(options.steps)] if options.steps else [])]
    sides = {f"python {reference}": lambda: run_script(reference, *same)}
    for label, more in runs.items():
        sides[label] = lambda more=more: train(*more)
    results = in_turn(sides, options.repeats)
    seconds = {side: median([s for s, _ in runs]) for side, runs in results.items()}
    first = next(iter(seconds.values()))
    rows = [
        Side(side, s, "seconds", first / s, loss=median([loss for _, loss in results[side]]))
        for side, s in seconds.items()
    ]
    report(name, rows, options.out)


def loop(options: Namespace) -> None:
    """The default job and configs/modern.yaml against the classic loop in plain PyTorch."""
    modern = f"--config={ROOT / 'configs' / 'modern.yaml'}"
    runs = {"train.py": [], "train.py --config configs/modern.yaml": [modern]}
    compare("loop", options, "benchmarks/reference_loop.py", runs)


def charlm(options: Namespace) -> None:
    """configs/charlm.yaml, also with 300 of its 2,000 steps, against nanoGPT's recipe."""
    config = f"--config={ROOT / 'configs' / 'charlm.yaml'}"
    name = "train.py --config configs/charlm.yaml"
    runs = {name: [config], f"{name}, 300 steps": [config, "--trainer.max_steps=300"]}
    compare("charlm", options, "benchmarks/reference_charlm.py", runs)


class BesideTheTrainer(Callback):
    """After every `group` steps does as many bare ones, on the same batches, with a twin model."""

    def __init__(self, group: int = 20) -> None:
        self.group = group
        self.inside, self.bare = [], []  # seconds a step

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        h, self.twin = pl_module.hparams, deepcopy(pl_module.gpt)
        self.optimizer = build_optimizer(
            self.twin, h.learning_rate, h.weight_decay, h.betas, kind=h.optimizer
        )
        self.batches = trainer.datamodule.train_dataloader()
        self.since = time.perf_counter()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, i: int
    ) -> None:
        if (i + 1) % self.group:
            return
        self.inside.append((time.perf_counter() - self.since) / self.group)
        batches = [self.batches[j] for j in range(i + 1 - self.group, i + 1)]
        start = time.perf_counter()
        for x, y in batches:
            loss = next_token_loss(self.twin, x, y)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
        self.since = time.perf_counter()
        self.bare.append((self.since - start) / self.group)


def overhead(options: Namespace) -> None:
    """A step of the default job inside the Trainer against the same step in a bare loop."""
    quieten()
    with tempfile.TemporaryDirectory() as folder:
        steps = 100 * options.repeats
        fixed = ("--trainer.accelerator=cpu", "--samples.num_tokens=0")
        length = (f"--trainer.max_steps={steps}", f"--trainer.val_check_interval={steps}")
        cli = TrainingCLI(train_options(options, folder, *fixed, *length))
        timing = BesideTheTrainer()
        cli.trainer.callbacks.append(timing)
        cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    bare, inside = (1e3 * median(seconds[1:]) for seconds in (timing.bare, timing.inside))
    rows = [
        Side("bare forward, backward, step", bare, "ms a step"),
        Side("inside the Trainer", inside, "ms a step", bare / inside),
    ]
    report("overhead", rows, options.out, f"The Trainer adds {inside / bare - 1:.1%} to a step.")
