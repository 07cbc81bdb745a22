"""Owns what happens around the steps: console, samples, overfit notice, the last evaluation."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback, Checkpoint, ProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lit_gpt.data import TextDataModule
from lit_gpt.sampling import generate, stream_text
from lit_gpt.stopping import GracefulStop, agreed


class Throughput(Callback):
    """Logs tokens_per_second of training, all devices together, evaluations left out."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.tokens, self.since = 0, time.monotonic()
        self.rate: float | None = None  # the newest
        self.paused: float | None = None

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.paused = time.monotonic()

    def on_train_batch_start(self, *args: Any) -> None:
        if self.paused is not None:  # samples and checkpoints are not training either
            self.since += time.monotonic() - self.paused
            self.paused = None

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, i: int
    ) -> None:
        self.tokens += batch[0].numel() * trainer.world_size
        if pl_module.is_logged(trainer.global_step):  # which counts the step that just ended
            now = time.monotonic()
            self.rate = self.tokens / (now - self.since)
            pl_module.add_to_curves({"tokens_per_second": self.rate}, trainer.global_step)
            self.tokens, self.since = 0, now


class Bar(ProgressBar):
    """One line with step, loss and tokens a second; none where the output is no terminal."""

    def __init__(self, throughput: Throughput) -> None:
        super().__init__()
        self.throughput = throughput
        self.console = Console(highlight=False)
        self.enabled = self.console.is_terminal
        self.progress: Progress | None = None
        self.last_refresh = 0.0

    def disable(self) -> None:
        self.enabled = False

    def print(self, *args: Any, **kwargs: Any) -> None:
        self.console.print(*args, markup=False, soft_wrap=True)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self.enabled:
            return
        columns = ("loss {task.fields[loss]}", "{task.fields[rate]} tokens/s")
        self.progress = Progress(
            TextColumn("Training"),
            BarColumn(),
            MofNCompleteColumn(),
            *map(TextColumn, columns),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
        )
        total = trainer.max_steps if trainer.max_steps > 0 else None
        self.progress.add_task("", total=total, loss="-", rate="-", completed=trainer.global_step)
        self.progress.start()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any
    ) -> None:
        # Reading the loss waits for the device, so it is done five times a second, not each step.
        if self.progress and time.monotonic() - self.last_refresh > 0.2:
            self.last_refresh = time.monotonic()
            fields = {"loss": f"{pl_module.train_loss.item():.3f}"}
            if self.throughput.rate:
                fields["rate"] = f"{self.throughput.rate:,.0f}"
            self.progress.update(self.progress.task_ids[0], completed=trainer.global_step, **fields)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if self.progress:
            self.progress.stop()
            self.progress = None


class StepLines(Callback):
    """Says the losses of each evaluation, and once when the model begins to overfit.

    Args:
        patience: how many evaluations in a row may end above the best validation loss, while the
            training loss falls, before it is called overfitting.
    """

    def __init__(self, patience: int = 3) -> None:
        self.patience = patience
        self.best = {"val": float("inf"), "train": 0.0, "step": 0}
        self.worse, self.said = 0, False

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        train = trainer.callback_metrics["train/eval_loss"].item()
        val = trainer.callback_metrics["val/loss"].item()
        step = trainer.global_step
        self.print(trainer, f"Step: {step}, Training Loss: {train:.3f}, Validation Loss: {val:.3f}")
        if val < self.best["val"]:
            self.best, self.worse = {"val": val, "train": train, "step": step}, 0
            return
        self.worse += 1
        if self.worse >= self.patience and train < self.best["train"] and not self.said:
            self.said = True
            self.print(
                trainer,
                f"The model is overfitting: the validation loss was best at step "
                f"{self.best['step']} ({self.best['val']:.3f}) and has been higher for "
                f"{self.worse} evaluations, while the training loss still falls. best.ckpt keeps "
                "the best model; more text, more dropout or a smaller model would help.",
            )

    @rank_zero_only
    def print(self, trainer: pl.Trainer, line: str) -> None:
        (trainer.progress_bar_callback.print if trainer.progress_bar_callback else print)(line)

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "worse": self.worse, "said": self.said}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best, self.worse, self.said = (state_dict[k] for k in ("best", "worse", "said"))


class Samples(Callback):
    """Lets the model go on from a few fixed prompts at each evaluation and logs the text.

    Args:
        prompts: texts to go on from; None: the beginnings of three lines of the validation text.
        num_tokens: how many tokens each sample goes on for; 0: no samples.
    """

    def __init__(self, prompts: list[str] | None = None, num_tokens: int = 32) -> None:
        self.prompts, self.num_tokens = prompts, num_tokens
        self.beginnings: list[str] = []  # the prompts as text
        self.texts: list[str] = []  # of the newest evaluation
        self.written: list[list[int]] = []  # their ids after the prompts

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.num_tokens > 0 and trainer.is_global_zero and trainer.datamodule is not None:
            with torch.compiler.set_stance("force_eager"):  # each length would be compiled
                self.texts, self.written = self.write(pl_module.gpt, trainer.datamodule)
            for logger in trainer.loggers:
                log_samples(logger, self.texts, trainer.global_step)

    def write(
        self, model: torch.nn.Module, data: TextDataModule
    ) -> tuple[list[str], list[list[int]]]:
        tokenizer = data.tokenizer
        prompts = line_starts(data)
        if self.prompts:
            prompts = [tokenizer.encode(text or "\n") for text in self.prompts]
        self.beginnings = [tokenizer.decode(prompt).rstrip("\ufffd") for prompt in prompts]
        groups = defaultdict(list)  # prompts of one length are written together
        for i, prompt in enumerate(prompts):
            groups[len(prompt)].append(i)
        written: list[list[int]] = [[] for _ in prompts]
        for members in groups.values():
            ids = torch.from_numpy(np.array([prompts[i] for i in members]).astype(np.int64))
            on_device = ids.to(model.embedding.weight.device)
            new = list(generate(model, on_device, self.num_tokens, tokenizer=tokenizer))
            for i, row in zip(members, torch.stack(new, dim=1).tolist(), strict=True):
                written[i] = row
        rows = ([*prompt, *new] for prompt, new in zip(prompts, written, strict=True))
        return ["".join(stream_text(tokenizer, row)) for row in rows], written


def line_starts(data: TextDataModule, count: int = 3, length: int = 4) -> list[np.ndarray]:
    """The first `length` tokens of lines spread over the validation split."""
    tokens, starts = data.val_tokens, []
    ends_line = np.array([token.endswith(b"\n") for token in data.tokenizer.tokens])
    for i in range(count):
        start = i * len(tokens) // count
        ends = np.flatnonzero(ends_line[tokens[start : start + 500]])  # within reach, if any
        if len(ends) and start + ends[0] + 1 + length <= len(tokens):
            start += ends[0] + 1
        starts.append(tokens[start : start + length])
    return starts


def log_samples(logger: Any, texts: list[str], step: int) -> None:
    """Text to a logger that can show it: TensorBoard or, by `log_text`, Weights & Biases."""
    if isinstance(logger, TensorBoardLogger):
        fenced = "\n\n".join(f"```\n{text}\n```" for text in texts)  # shown as it is, not Markdown
        logger.experiment.add_text("samples", fenced, step)
    elif hasattr(logger, "log_text"):
        logger.log_text("samples", columns=["text"], data=[[text] for text in texts], step=step)


class FinalEvaluation(Checkpoint):
    """The loss over the whole validation split, once, at the end of a run that wasn't stopped.

    A Checkpoint only so that Lightning calls it after those that save the last step.
    """

    def __init__(self, stop: GracefulStop) -> None:
        self.stop, self.result = stop, None

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.datamodule is not None and not self.stop.reason:
            batches = trainer.datamodule.whole_val_split()
            result = pl_module.full_loss(self.until_stopped(batches))
            self.stop.reason = agreed(trainer, self.stop.signal)
            self.result = None if self.stop.reason else result

    def until_stopped(self, batches: Iterable[Any]) -> Iterator[Any]:
        for batch in batches:
            yield batch  # at least one: a mean of none is no number
            if self.stop.signal:
                return
