"""Benchmark of the promise of several devices: how far the losses are from one process's."""

from __future__ import annotations

import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.table import Table

from benchmarks.measure import Options, at_least_one, run_training, save, show
from lit_gpt.errors import UserError
from lit_gpt.reports.history import History, read_history

STEP = 8  # windows, over all processes, in two batches
SHAPE = (
    *("--model.d_model=32", "--model.num_blocks=2", "--model.num_heads=2", "--model.dropout=0"),
    *("--model.learning_rate=3e-3", "--data.context_length=32", "--data.order=shuffled"),
    *("--trainer.accelerator=cpu", "--trainer.accumulate_grad_batches=2"),
    *("--trainer.gradient_clip_val=1.0", "--trainer.log_every_n_steps=1"),
    *("--trainer.limit_val_batches=12", "--final.max_tokens=4000", "--samples.num_tokens=0"),
    "--trainer.enable_progress_bar=False",
)


@dataclass
class Distance:
    """The largest differences of one run's losses from those of one process, in nats/token.

    Args:
        optimizer: adamw or muon.
        processes: of the run's parts; each but the first resumes the one before.
        steps: optimizer steps of the whole run.
        training: of any step's training loss.
        evaluation: of any evaluation's training or validation loss.
        final: of the loss over the validation split.
    """

    optimizer: str
    processes: tuple[int, ...]
    steps: int
    training: float
    evaluation: float
    final: float


def train(optimizer: str, processes: tuple[int, ...], steps: int, path: str) -> History:
    """Trains an equal part of the steps on each number of processes."""
    with tempfile.TemporaryDirectory() as folder:
        for part, number in enumerate(processes, 1):
            argv = [*SHAPE, f"--model.optimizer={optimizer}", f"--data.path={path}"]
            argv += [f"--data.batch_size={STEP // 2 // number}"]
            argv += [f"--trainer.val_check_interval={steps // 6}"]
            argv += [f"--trainer.max_steps={steps * part // len(processes)}"]
            if number > 1:
                argv += [f"--trainer.devices={number}", "--trainer.strategy=ddp"]
            if part > 1:
                argv += ["--ckpt_path=last"]
            run_training(folder, *argv)
        return read_history(Path(folder) / "version_0")


def furthest(found: History, expected: History, *names: str) -> float:
    """The largest difference between the same points of two runs' curves."""
    pairs = [
        (dict(found.curves[name])[step], value)
        for name in names
        for step, value in expected.curves[name]
    ]
    return max(abs(a - b) for a, b in pairs)


def devices(options: Options, steps: int = 60) -> None:
    """The same run on 1, 2 and 4 processes, and on 2, then 1, then 4.

    Args:
        options: shared by all benchmarks.
        steps: of each run, a multiple of 6.
    """
    at_least_one(steps=steps)
    if steps % 6:
        raise UserError("must be a multiple of 6", field="steps", value=steps)
    table = Table(title=f"Largest difference from one process over {steps} steps, nats/token")
    for name in ("optimizer", "processes", "training loss", "evaluations", "final loss"):
        table.add_column(name, justify="left" if name in ("optimizer", "processes") else "right")
    rows: list[Distance] = []
    for optimizer in ("adamw", "muon"):
        one = train(optimizer, (1,), steps, options.path)
        assert one.final is not None
        for processes in ((2,), (4,), (2, 1, 4)):
            found = train(optimizer, processes, steps, options.path)
            assert found.final is not None
            rows.append(
                Distance(
                    optimizer,
                    processes,
                    steps,
                    furthest(found, one, "train/loss"),
                    furthest(found, one, "train/eval_loss", "val/loss"),
                    abs(found.final.loss - one.final.loss),
                )
            )
            row = rows[-1]
            numbers = (f"{x:.1e}" for x in (row.training, row.evaluation, row.final))
            table.add_row(optimizer, ", then ".join(map(str, processes)), *numbers)
    save("devices", [asdict(row) for row in rows], options.out)
    show(table)
