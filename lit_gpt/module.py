"""Owns training: LitGPT, the LightningModule with the loss, the steps and the metrics."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any, Literal

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor
from torch.nn import LinearCrossEntropyOptions
from torch.nn import functional as F
from torchmetrics import MeanMetric, SumMetric

from lit_gpt.callbacks.nonfinite import Reading, StepWatch, check_weights
from lit_gpt.errors import UserError
from lit_gpt.model import GPT, GPTConfig
from lit_gpt.optim import OptimizerKind, Schedule, build_optimizer, learning_rate_factor
from lit_gpt.training.init_from import load_weights

SPLITS = ("train", "val")  # the order of TextDataModule's evaluation loaders
MAX_LOGITS = 1 << 28  # 1 GiB of them as float32; below, whole logits are quicker


@dataclass(frozen=True)
class Evaluation:
    loss: float  # nats a token
    bits_per_byte: float
    num_tokens: int  # targets counted

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss)


def next_token_loss(model: GPT, x: Tensor, y: Tensor) -> Tensor:
    """Mean cross-entropy in nats a token; x and y (B, T).

    Where all logits together would be huge, a part of the rows at a time (torch's
    linear_cross_entropy): never held as a whole, their gradient neither.
    """
    features, y = model.features(x).flatten(0, 1), y.flatten()  # (B * T, C)
    num_rows, vocab_size = len(y), len(model.head.weight)
    if num_rows * vocab_size <= MAX_LOGITS:
        return F.cross_entropy(model.head(features).float(), y)
    options = LinearCrossEntropyOptions(batch_chunk_size=max(1, MAX_LOGITS // 4 // vocab_size))
    return F.linear_cross_entropy(features, model.head.weight, y, options=options)


class LitGPT(pl.LightningModule):
    """Trains a GPT to tell the next token.

    Args:
        learning_rate: at its peak.
        optimizer: adamw, or muon: Muon for the blocks' matrices, AdamW for the rest.
        weight_decay: of matrices and tables; biases and norms don't decay.
        betas: AdamW's decay rates of the two moments; the first is Muon's momentum too.
        schedule: of the learning rate after the warm-up: constant, or in a line or half a cosine
            down to min_learning_rate at max_steps.
        warmup_steps: steps over which the learning rate rises.
        min_learning_rate: where linear and cosine end.
        seed: of dropout's masks, together with step and rank.
        compile: whether torch.compile makes the blocks' code; reduce-overhead: with CUDA graphs.
        skip_bad_steps: how many updates, where loss or gradient is no finite number, are left out
            before the run stops; 0: it stops at the first.
        init_from: checkpoint, or local folder of a GPT-2 or Qwen3 (config.json, model.safetensors,
            tokenizer.json), whose weights a new run starts from, to be tuned on another text; the
            fields of GPTConfig are then its, and its tokenizer is data.tokenizer.
        gpt: the fields of GPTConfig.

    Raises:
        UserError: values out of range.
    """

    def __init__(
        self,
        learning_rate: float = 1e-3,
        optimizer: OptimizerKind = "adamw",
        weight_decay: float = 0.01,
        betas: tuple[float, float] = (0.9, 0.999),
        schedule: Schedule = "constant",
        warmup_steps: int = 0,
        min_learning_rate: float = 0.0,
        seed: int = 1337,
        compile: bool | Literal["reduce-overhead", "max-autotune"] = False,
        skip_bad_steps: int = 0,
        init_from: str | None = None,
        **gpt: Any,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self._check()
        self.gpt = GPT(GPTConfig(**gpt))
        if compile:
            for block in self.gpt.blocks:  # the method leaves the names of the weights as they are
                block.compile(mode=None if compile is True else compile)
        metrics = (MeanMetric(nan_strategy="disable") for _ in SPLITS)  # a NaN is to be seen
        self.losses = torch.nn.ModuleList(metrics)
        self.val_tokens, self.val_bytes = SumMetric(), SumMetric()  # of the validation targets
        self.token_lengths: Tensor | None = None
        self.watch = StepWatch(skip_bad_steps)
        self.curves: dict[str, float] = {}  # the newest value of each
        self.initialized = init_from is None  # a continued run, too, brings its weights

    def _check(self) -> None:
        h = self.hparams
        if not 0 < h.learning_rate < math.inf:
            raise UserError(f"--model.learning_rate must be above 0, not {h.learning_rate}")
        if not 0 <= h.weight_decay < math.inf:
            raise UserError(f"--model.weight_decay must be 0 or more, not {h.weight_decay}")
        if not all(0 <= beta < 1 for beta in h.betas):
            raise UserError(f"--model.betas must both be in [0, 1), not {list(h.betas)}")
        for name in ("warmup_steps", "skip_bad_steps"):
            if h[name] < 0:
                raise UserError(f"--model.{name} must be 0 or more, not {h[name]}")
        if not 0 <= h.min_learning_rate <= h.learning_rate:
            raise UserError(
                f"--model.min_learning_rate must be between 0 and --model.learning_rate "
                f"({h.learning_rate}), not {h.min_learning_rate}"
            )

    def setup(self, stage: str) -> None:
        if not self.initialized:
            load_weights(self.gpt, self.hparams.init_from)
        self.initialized = True
        if data := getattr(self.trainer, "datamodule", None):
            self.token_lengths = torch.from_numpy(data.tokenizer.token_lengths())

    def forward(self, ids: Tensor) -> Tensor:
        """Ids (B, T) to logits (B, T, V)."""
        return self.gpt(ids)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        # Dropout becomes a pure function of where the run is, so that a resumed run draws the
        # same masks, whatever drew random numbers before, and each rank draws its own.
        part = batch_idx % self.trainer.accumulate_grad_batches
        where = (self.hparams.seed, self.global_step, part, self.global_rank)
        seed = int(np.random.SeedSequence(where).generate_state(1, np.uint64)[0])
        # torch.manual_seed looks through all kinds of devices each time: half a millisecond.
        torch.default_generator.manual_seed(seed)
        if self.device.type != "cpu":
            getattr(torch, self.device.type).manual_seed(seed)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = next_token_loss(self.gpt, *batch)
        parts = self.trainer.accumulate_grad_batches
        before = self.train_loss if batch_idx % parts else 0.0
        self.train_loss = before + loss.detach() / parts  # of the step: the mean of its batches
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        step, rate = self.global_step + 1, optimizer.param_groups[0]["lr"]
        gradients = (p.grad for p in self.parameters() if p.grad is not None)
        reading = Reading(step, rate, self.train_loss, gradients, self.watched())
        may_update = self.watch.may_update(reading)
        if self.is_logged(step):
            curves = {"train/loss": reading.loss, "gradient_norm": reading.gradient_norm}
            self.add_to_curves(curves | {"learning_rate": rate}, step)
        if not may_update:
            self.add_to_curves({"skipped_steps": self.watch.skipped}, step)
            self.print(f"No update at {reading} ({self.watch.skipped} of {self.watch.allowed})")
            for weight in self.parameters():
                weight.grad = None  # the optimizer passes over it, moments and decay included

    def watched(self) -> tuple[str, ...]:
        """What must be finite at each step; all ranks must find the same."""
        if self.trainer.precision == "16-mixed":  # its scaler deals with infinite gradients
            return ("loss",)
        if self.trainer.world_size > 1:  # each has a loss of its own; its NaN is in the norm
            return ("gradient_norm",)
        # The norm costs time. Without it a bad gradient shows in the next loss.
        return ("loss", "gradient_norm") if self.watch.allowed else ("loss",)

    def is_logged(self, step: int) -> bool:
        every = self.trainer.log_every_n_steps
        return every > 0 and step % every == 0

    def add_to_curves(self, values: dict[str, Any], step: int) -> None:
        """Gives the loggers values of one step; self.log would take a millisecond for each."""
        values = {name: float(value) for name, value in values.items()}
        self.curves |= values
        for logger in self.trainer.loggers:
            logger.log_metrics(values, step)
            logger.save()

    def on_validation_start(self) -> None:
        self.watch.check()

    def validation_step(
        self, batch: tuple[Tensor, Tensor], batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        x, y = batch
        self.losses[dataloader_idx].update(next_token_loss(self.gpt, x, y), weight=y.numel())
        if SPLITS[dataloader_idx] == "val" and self.token_lengths is not None:
            self.val_tokens.update(y.numel())
            self.val_bytes.update(self.token_lengths.to(y.device)[y].sum())

    def on_validation_epoch_end(self) -> None:
        train_loss, val_loss = (metric.compute() for metric in self.losses)
        if not torch.isfinite(train_loss + val_loss):
            raise UserError(
                f"the loss is not a number any more at step {self.global_step}: lower "
                "--model.learning_rate; the checkpoints are of the evaluations before"
            )
        self.log("step", float(self.global_step))
        self.log("train/eval_loss", train_loss)
        self.log("val/loss", val_loss)
        self.log("val/perplexity", val_loss.exp())
        if self.token_lengths is not None:
            bytes_per_token = self.val_bytes.compute() / self.val_tokens.compute()
            self.log("val/bits_per_byte", val_loss / math.log(2) / bytes_per_token)
        for metric in (*self.losses, self.val_bytes, self.val_tokens):
            metric.reset()

    @torch.inference_mode()
    def full_loss(self, batches: Iterable[tuple[Tensor, Tensor]]) -> Evaluation:
        """Loss over all of `batches`, shared out to the ranks, with the trainer's precision."""
        self.eval()
        trainer, sums = self.trainer, torch.zeros(3, dtype=torch.float64)  # nats, tokens, bytes
        for x, y in islice(batches, self.global_rank, None, trainer.world_size):
            with trainer.precision_plugin.forward_context():
                loss = next_token_loss(self.gpt, x.to(self.device), y.to(self.device)).item()
            sums += torch.tensor([loss * y.numel(), y.numel(), self.token_lengths[y].sum()])
        if trainer.world_size > 1:
            sums = trainer.strategy.reduce(sums.to(self.device), reduce_op="sum")
        nats, tokens, num_bytes = sums.tolist()
        return Evaluation(nats / tokens, nats / math.log(2) / num_bytes, int(tokens))

    def configure_optimizers(self) -> dict[str, Any]:
        h, max_steps = self.hparams, self.trainer.max_steps
        # Lightning clips under a float16 gradient scaler only where the optimizer is not fused.
        fused = self.trainer.precision != "16-mixed"
        optimizer = build_optimizer(
            self.gpt, h.learning_rate, h.weight_decay, h.betas, fused, h.optimizer
        )
        share = h.min_learning_rate / h.learning_rate
        if h.schedule == "constant" and h.warmup_steps == 0:
            return {"optimizer": optimizer}
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer,
            lambda step: learning_rate_factor(step, max_steps, h.warmup_steps, h.schedule, share),
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds what makes a checkpoint enough: the whole GPTConfig and, as text, the tokenizer."""
        self.watch.check()
        check_weights(list(self.parameters()), self.global_step)
        checkpoint["skipped_steps"] = self.watch.skipped
        checkpoint["gpt"] = asdict(self.gpt.config)
        if data := getattr(self.trainer, "datamodule", None):
            checkpoint["tokenizer"] = data.tokenizer.to_dict()
            checkpoint["corpus"] = asdict(data.corpus.info)
        names = ("accumulate_grad_batches", "gradient_clip_val", "precision")
        checkpoint["trainer"] = {name: getattr(self.trainer, name) for name in names}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.watch.skipped = checkpoint.get("skipped_steps", 0)
