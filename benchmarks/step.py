"""Where a step's time goes, and how far it is from what the machine's matrix products allow."""

from __future__ import annotations

import tempfile
import time
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from rich.table import Table
from torch import nn

from benchmarks.limits import product_rate, shape_rate
from benchmarks.measure import (
    ROOT,
    Options,
    at_least_one,
    flops_per_token,
    places,
    read_text,
    save,
    show,
)
from lit_gpt.errors import UserError
from lit_gpt.module import LitGPT, next_token_loss
from lit_gpt.training.train import build_run
from lit_gpt.training.warning_filters import silence_warnings

PARTS = ("data", "forward", "backward", "optimizer")


@dataclass(frozen=True)
class Size:
    """A row of the table.

    Args:
        argv: options of train.py.
        group: steps timed together.
        vocab_size: None: the text's.
    """

    argv: list[str]
    group: int = 20
    vocab_size: int | None = None


def config(name: str) -> str:
    return f"--config={ROOT / 'configs' / name}"


# One window a step and an update after each, so that a laptop makes a few of them.
LAPTOP = ["--data.batch_size=1", "--trainer.accumulate_grad_batches=1", "--model.compile=false"]
SIZES = {
    "classic": Size([]),
    "modern": Size([config("modern.yaml")]),
    "124M": Size([config("gpt2_124m.yaml"), *LAPTOP], group=1, vocab_size=50_304),
}


@dataclass
class StepShares:
    """What a step takes inside the Trainer, and what of it in each part.

    Args:
        seconds: of a step.
        shares: of its parts, and of Lightning: all else inside the Trainer. They add up to 1.
        tokens: per step.
        gflop: of forward and backward.
        gflops: reached by the whole step, in 10^9 operations a second.
        utilization: of the largest rate of this machine's matrix products.
        gflops_of_shapes: what the model's own matrix products reach alone, forward and backward.
    """

    name: str
    seconds: float
    shares: dict[str, float]
    tokens: int
    gflop: float
    gflops: float
    utilization: float
    gflops_of_shapes: float


@dataclass
class Times:
    """Seconds per step: inside the Trainer, and of each part of a bare one; one value a group."""

    inside: list[float] = field(default_factory=list)
    parts: dict[str, list[float]] = field(default_factory=lambda: {part: [] for part in PARTS})

    def medians(self) -> tuple[float, dict[str, float]]:
        """Without the first group, which warms up."""
        return median(self.inside[1:]), {part: median(s[1:]) for part, s in self.parts.items()}


class BesideTheTrainer(Callback):
    """After every `group` steps, makes as many bare ones on the same batches with a twin model."""

    def __init__(self, group: int = 20) -> None:
        self.group = group
        self.times = Times()

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.device = pl_module.device
        self.twin = deepcopy(pl_module)
        if mode := pl_module.hparams.compile:  # a copy is not compiled
            for block in self.twin.gpt.blocks:
                block.compile(mode=None if mode is True else mode)
        self.twin.trainer = trainer
        made: Any = self.twin.configure_optimizers()
        self.optimizer = made["optimizer"] if isinstance(made, dict) else made
        self.twin.trainer = None
        self.clip = trainer.gradient_clip_val
        self.context = trainer.precision_plugin.forward_context
        self.batches = trainer.datamodule.train_dataloader()
        self.since = self.now()

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def bare_step(self, i: int) -> list[float]:
        """Seconds of each of PARTS, with batch i and without the Trainer."""
        marks = [self.now()]
        x, y = (part.to(self.device) for part in self.batches[i])
        marks.append(self.now())
        with self.context():
            loss = next_token_loss(self.twin.gpt, x, y)
        marks.append(self.now())
        loss.backward()
        marks.append(self.now())
        if self.clip:
            nn.utils.clip_grad_norm_(self.twin.parameters(), self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        marks.append(self.now())
        return [after - before for before, after in pairwise(marks)]

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        done = batch_idx + 1
        if done % self.group:
            return
        self.times.inside.append((self.now() - self.since) / self.group)
        steps = [self.bare_step(i) for i in range(done - self.group, done)]
        for part, seconds in zip(PARTS, zip(*steps, strict=True), strict=True):
            self.times.parts[part].append(sum(seconds) / self.group)
        self.since = self.now()


def time_steps(
    argv: list[str], group: int, groups: int, vocab_size: int | None = None
) -> tuple[Times, LitGPT]:
    """Trains inside a real Trainer, with all callbacks of the training command.

    Args:
        argv: options of train.py.
        group: steps timed together.
        groups: how many of them, and one more to warm up.
        vocab_size: instead of the text's.
    """
    silence_warnings()
    beside = BesideTheTrainer(group)
    steps = group * (groups + 1)
    with tempfile.TemporaryDirectory() as folder:
        length = [f"--trainer.max_steps={steps}", f"--trainer.val_check_interval={steps}"]
        nothing_else = ["--samples.num_tokens=0", "--final.max_tokens=0"]
        nothing_else += ["--trainer.limit_val_batches=0", "--trainer.logger=false"]
        run = build_run([*places(folder), *argv, *length, *nothing_else], callbacks=[beside])
        model = run.model
        if vocab_size:
            model = LitGPT(**{**run.model.hparams, "vocab_size": vocab_size})
        run.trainer.fit(model, datamodule=run.data)
    return beside.times, model


def measure_size(
    name: str, size: Size, argv: list[str], groups: int, limits: dict[torch.dtype, float]
) -> StepShares:
    """Times one row.

    Args:
        argv: further options of train.py.
        limits: the machine's limit for each precision; filled as needed.
    """
    times, model = time_steps([*size.argv, *argv], size.group, groups, size.vocab_size)
    whole, parts = times.medians()
    shares = {part: seconds / whole for part, seconds in parts.items()}
    shares["Lightning"] = 1 - sum(shares.values())
    trainer = model.trainer
    device = trainer.strategy.root_device.type
    dtype = torch.bfloat16 if str(trainer.precision).startswith("bf16") else torch.float32
    if dtype not in limits:
        limits[dtype] = product_rate(dtype, device)
    data = trainer.datamodule.hparams
    tokens = data.batch_size * data.context_length
    flop = flops_per_token(model.gpt.config, model.gpt) * tokens
    shapes = shape_rate(model.gpt, tokens, dtype, device)
    rate = flop / whole
    share = rate / limits[dtype]
    gflops = (flop / 1e9, rate / 1e9)
    return StepShares(name, whole, shares, tokens, *gflops, share, shapes / 1e9)


def table_of(name: str, rows: list[StepShares]) -> Table:
    parts = list(rows[0].shares)
    titles = ("ms/step", *parts, "GFLOP/step", "GFLOP/s", "utilization", "its products alone")
    table = Table(name, *titles)
    for row in rows:
        shares = (f"{row.shares[part]:.1%}" for part in parts)
        rates = (f"{row.gflop:.3g}", f"{row.gflops:.1f}", f"{row.utilization:.1%}")
        alone = f"{row.gflops_of_shapes:.1f}"
        table.add_row(row.name, f"{1e3 * row.seconds:.1f}", *shares, *rates, alone)
    return table


def report_steps(
    name: str, rows: list[StepShares], limits: dict[torch.dtype, float], folder: str
) -> None:
    """The table, the limits and the formula; the same as JSON."""
    show(table_of(name, rows))
    found = [f"{str(t).removeprefix('torch.')} {rate / 1e9:,.1f}" for t, rate in limits.items()]
    note = (
        f"Limit, GFLOP/s of the largest matrix products: {', '.join(found)}. A step has 6 N T + "
        "12 L C T context_length operations (Chowdhery et al. 2022, appendix B: N weights that "
        "multiply, T tokens, L blocks, C d_model); the optimizer's own are not counted."
    )
    save(name, [asdict(row) for row in rows], folder, note)


def step(
    options: Options,
    sizes: str = ",".join(SIZES),
    accelerator: str = "cpu",
    threads: int | None = None,
) -> None:
    """Where a step's time goes, and the share of the machine's limit that it reaches.

    Args:
        options: shared by all benchmarks.
        sizes: which rows: classic, modern, 124M (GPT-2's size, some minutes on a laptop).
        accelerator: as in train.py.
        threads: of the processor; default: as PyTorch chooses.
    """
    at_least_one(repeats=options.repeats, threads=threads)
    read_text(options.path)
    names = sizes.split(",")
    for name in names:
        if name not in SIZES:
            raise UserError(f"must be some of {','.join(SIZES)}", field="sizes", value=sizes)
    if threads:
        torch.set_num_threads(threads)
    argv = [f"--data.path={Path(options.path).resolve()}", f"--trainer.accelerator={accelerator}"]
    limits: dict[torch.dtype, float] = {}
    rows = [measure_size(name, SIZES[name], argv, options.repeats, limits) for name in names]
    report_steps("step", rows, limits, options.out)
