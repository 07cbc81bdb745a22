"""--find_lr: Lightning's learning-rate range test, what it suggests, and its plot."""

from __future__ import annotations

import io
import math
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr
from pathlib import Path
from typing import Any

from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.tuner.tuning import Tuner
from lightning.pytorch.utilities import rank_zero_only
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from lit_gpt.command import stop_at_once
from lit_gpt.distributed import fsdp2
from lit_gpt.distributed.launch import command_line
from lit_gpt.errors import UserError
from lit_gpt.module import LitGPT
from lit_gpt.reports.charts import Chart, Series
from lit_gpt.reports.html import charts_page
from lit_gpt.storage import atomic_write_text
from lit_gpt.training.options import SaveConfig, TrainOptions
from lit_gpt.training.run_folder import claim_run
from lit_gpt.training.summary import shorten
from lit_gpt.training.train import Run, build_run

NUM_STEPS = 200  # enough for the smoothed loss, over about 50 steps, to follow
BETA = 0.98  # of Lightning's smoothing
SKIPPED = 10  # steps at the start, which are too noisy to read


def find_learning_rate(options: TrainOptions) -> None:
    """Prints a learning rate for the model and this text, and saves the plot in a run's folder."""
    config = options.config
    if config.ckpt_path:
        raise UserError("only works for a new run", field="find_lr", hint="leave out `ckpt_path`")
    if config.trainer.fast_dev_run:
        hint = "leave out `fast_dev_run`"
        raise UserError("needs more than one step", field="find_lr", hint=hint)
    if config.trainer.strategy == fsdp2.NAME:  # Lightning's test saves and restores whole weights
        hint = "find it on one device, with a smaller model if need be"
        raise UserError("can't be used with fsdp2", field="find_lr", hint=hint)
    with tempfile.TemporaryDirectory() as scratch:
        rates, losses = range_test(build_run(options, scratch=Path(scratch)))
    report_rates(options, rates, losses)


@rank_zero_only
def report_rates(options: TrainOptions, rates: list[float], losses: list[float]) -> None:
    root = Path(options.config.trainer.default_root_dir or ".")
    folder = root / claim_run(root)
    SaveConfig(options.parser, options.config).save_to(folder)
    best = suggestion(rates, losses)
    print(f"Learning rates tried: {rates[0]:.2g} to {rates[-1]:.2g}, in {len(rates)} steps")
    plot = folder / "lr_find.html"
    try:
        save_plot(rates, losses, best, plot)
        print(f"Plot: {shorten(plot)}")
    except OSError as error:  # the suggestion is worth more
        print(f"Could not write {shorten(plot)}: {error.strerror}")
    if best is None:
        print("No suggestion: the loss never falls. Look at the plot, and at the other options")
        return
    argv = ["--config", shorten(folder / "config.yaml"), f"--model.learning_rate={best:.2g}"]
    print(f"Suggestion: {command_line('train', *argv)}")


def range_test(
    run: Run, min_rate: float = 1e-6, max_rate: float = 1.0
) -> tuple[list[float], list[float]]:
    """Learning rates tried, rising, and the smoothed loss at each, in nats/token.

    The run's schedule plays no part, and there is no guard: the loss explodes at the end.
    """
    # Without our names and checks, in the run's scratch folder: the weights to restore at the end.
    run.trainer.strategy.checkpoint_io = TorchCheckpointIO()
    run.data.trainer = run.trainer
    run.model.gpt.spell(run.data.tokenizer)
    has_bar = sys.stderr.isatty()  # elsewhere Lightning would draw it too
    hidden = nullcontext() if has_bar else redirect_stderr(io.StringIO())
    with stop_at_once(), hidden, tables_at_their_rate(run.model):
        # Without the data module, whose validation would be evaluated.
        found = Tuner(run.trainer).lr_find(
            run.model,
            train_dataloaders=run.data.train_dataloader(),
            min_lr=min_rate,
            max_lr=max_rate,
            num_training=NUM_STEPS,
            update_attr=False,
        )
    assert found is not None
    rates = found.results["lr"]
    losses = found.results["loss"]
    # Its mean of the newest losses counts one step too many, so that it starts at half the loss.
    unbiased = [loss * (1 - BETA ** (n + 1)) / (1 - BETA**n) for n, loss in enumerate(losses, 1)]
    return rates[: len(losses)], unbiased


@contextmanager
def tables_at_their_rate(model: LitGPT) -> Iterator[None]:
    """Has tables learn at `table_rate` times the rate that is tried: Lightning sets one for all."""
    table = model.gpt.embedding.weight

    def set_rate(optimizer: Optimizer, *args: Any) -> None:
        first, *others = optimizer.param_groups
        for group in others:
            if any(weight is table for weight in group["params"]):
                group["lr"] = model.hparams.table_rate * first["lr"]

    hook = register_optimizer_step_pre_hook(set_rate)
    try:
        yield
    finally:
        hook.remove()


def suggestion(rates: list[float], losses: list[float]) -> float | None:
    """Where the loss falls fastest with the logarithm of the learning rate (Smith 2017).

    Lightning's own suggestion takes the slope over the learning rate itself, which is steepest
    where the rates are smallest: five times lower for this model. None: it never falls.
    """
    places = [n for n in range(SKIPPED, len(losses) - 1) if math.isfinite(losses[n + 1])]
    slopes = {n: losses[n + 1] - losses[n - 1] for n in places}  # the rates rise by one factor
    steepest = min(slopes, key=slopes.__getitem__, default=None)
    return rates[steepest] if steepest is not None and slopes[steepest] < 0 else None


def save_plot(rates: list[float], losses: list[float], best: float | None, path: Path) -> None:
    """Writes a page with the loss at each learning rate and the suggestion."""
    finite = [(r, x) for r, x in zip(rates, losses, strict=True) if math.isfinite(x)]
    points = finite[SKIPPED:]
    lowest = min((loss for _, loss in points), default=0.0)
    highest = 1.1 * points[0][1] if points else 1.0  # a loss that explodes may leave the chart
    line = Series("training loss", points)
    subtitle = "The loss never falls."
    if best is not None:
        mark = (best, dict(finite)[best])
        line = Series("training loss", points, mark=mark, note=f"suggestion: {best:.2g}")
        subtitle = f"Suggested learning rate: {best:.2g}, where the loss falls fastest."
    chart = Chart(
        "Training loss, nats/token (smoothed)",
        [line],
        x_name="learning rate",
        log_x=True,
        y_range=(lowest - 0.05 * (highest - lowest), highest),
        main=True,
    )
    title = "Learning-rate range test"
    page = charts_page("charts.html", title=title, subtitle=subtitle, charts=[chart])
    atomic_write_text(path, page)
