"""LitGPT, the LightningModule: the loss, the steps, the metrics, the optimizer.

Shapes as in model.py: B batch, T time (tokens), C d_model, V vocabulary; N = B * T.
"""

from __future__ import annotations

import math
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, get_args

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute
from torchmetrics import Metric

from lit_gpt.errors import UserError, check_choice, check_least
from lit_gpt.lora import LoraConfig, LoraLayers, add_adapters, is_adapter
from lit_gpt.model import GPT, GPTConfig
from lit_gpt.optim import (
    EPS,
    OptimizerKind,
    Schedule,
    build_optimizer,
    fastest_dtype,
    learning_rate_factor,
)
from lit_gpt.optimizer_state import save_by_name
from lit_gpt.output_layer import is_half
from lit_gpt.windows import IGNORED

if TYPE_CHECKING:  # the schema of the files: a layer above, and of no use at run time
    from lit_gpt.checkpoint import Contents

SPLITS = ("train", "val")  # the order of TextDataModule's evaluation loaders


def next_token_loss(model: GPT, x: Tensor, y: Tensor) -> Tensor:
    """Mean cross-entropy in nats/token of the targets y given the ids x, both (B, T).

    Of the targets that are not IGNORED, of which there must be one. In float32, or float64 if the
    weights are, whatever the precision of the model.
    """
    return model.head.cross_entropy(model.hidden_states(x).flatten(0, 1), y.flatten())


def total_norm(tensors: list[Tensor]) -> Tensor:
    """The norm of all together, of those sharded over processes too."""
    norm = nn.utils.get_total_norm(tensors)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


def check_precision(precision: str) -> None:
    """Refuses weights in float16: AdamW's epsilon and small updates are zero there."""
    if precision == "16-true":
        problem = "weights in float16 do not train"
        hint = "use bf16-mixed or 16-mixed"
        raise UserError(problem, field="precision", value=precision, hint=hint)


def is_plan(horizons: Any) -> bool:
    """Whether these are the horizons of a run, as LitGPT takes them."""
    step, end = -1, 1  # so that the first step is 0
    try:
        for start, last in horizons:
            is_later = type(start) is type(last) is int and step < start < min(end, last)
            if not is_later:
                return False
            step, end = start, last
    except (TypeError, ValueError):  # no pairs
        return False
    return step >= 0


class LossTotals(Metric):
    """Sums of the losses of batches of any sizes, over all processes; a NaN stays visible.

    In float64 at any precision, unless it is a submodule: Lightning casts those.
    """

    full_state_update = False
    nats: Tensor
    tokens: Tensor
    bytes: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("nats", "tokens", "bytes"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def start(self, device: torch.device) -> None:
        """Sets the sums to zero, on this device if it has float64."""
        self.reset()
        self.to("cpu" if device.type == "mps" else device)

    def update(self, loss: Tensor, y: Tensor, token_lengths: Tensor | None) -> None:
        """Adds a batch: its loss in nats/token, its targets (B, T), bytes of each token (V,).

        Targets that are IGNORED count nothing; nor does a batch without targets.
        """
        if not len(y):
            return
        is_counted = y != IGNORED
        num_counted = is_counted.sum().to(self.device)
        self.nats += loss.to(self.device).double() * num_counted
        self.tokens += num_counted
        if token_lengths is not None:
            lengths = token_lengths.to(y.device)[y.clamp(min=0)] * is_counted
            self.bytes += lengths.sum().to(self.device)

    def compute(self) -> tuple[Tensor, Tensor, Tensor]:
        """Nats/token, bits per byte and the number of tokens."""
        return self.nats / self.tokens, self.nats / math.log(2) / self.bytes, self.tokens


class LitGPT(pl.LightningModule):
    """Trains a GPT to predict the next token.

    Args:
        learning_rate: peak learning rate.
        optimizer: adamw, or muon: Muon for the blocks' matrices, AdamW for the rest.
        weight_decay: of matrices and embedding tables; biases and norms do not decay.
        betas: AdamW's decay rates of the two moments; the first is Muon's momentum too.
        table_rate: how many times learning_rate the tables (embeddings, output layer) learn at.
        table_eps: AdamW's epsilon for these; a large one, such as 1e-4, keeps the rows of rare
            tokens from moving as far as those of frequent ones.
        schedule: of the learning rate after the warm-up: constant, or falling linearly or along
            half a cosine to min_learning_rate at max_steps.
        warmup_steps: steps over which the learning rate rises.
        min_learning_rate: final learning rate of the linear and cosine schedules.
        horizons: [[0, 500], [300, 480]]: the schedule was planned for 500 steps at step 0, and for
            480 from step 300 on; null: for max_steps.
        seed: of the dropout masks, together with step and rank.
        compile: whether torch.compile compiles the blocks; reduce-overhead: with CUDA graphs.
        activation_checkpointing: whether the backward pass computes each block's activations anew
            (Chen et al. 2016): takes less memory, and up to a third more time; same numbers.
        skip_bad_steps: how many updates with a non-finite loss or gradient are skipped before the
            run stops; 0: it stops at the first.
        init_from: checkpoint, Hugging Face folder or GGUF file, whose weights a new run of the
            training command starts from; it sets the fields of GPTConfig and data.tokenizer.
        lora_rank: of the adapters that are trained instead of the weights of init_from (LoRA, Hu et
            al. 2021): thin matrices beside those of the blocks, as small as the rank; 0: none.
        lora_alpha: scales the adapters' output by alpha / rank.
        lora_dropout: in [0, 1), of the adapters' input, in training.
        lora_layers: which layers of the blocks have adapters: attention, feed_forward or all.
        gpt: the fields of GPTConfig.

    Raises:
        UserError: values out of range.
    """

    hparams: Any  # the arguments of __init__, all of plain types: checkpoints hold them
    gpt: GPT

    def __init__(
        self,
        learning_rate: float = 1e-3,
        optimizer: OptimizerKind = "adamw",
        weight_decay: float = 0.01,
        betas: tuple[float, float] = (0.9, 0.999),
        table_rate: float = 1.0,
        table_eps: float = EPS,
        schedule: Schedule = "constant",
        warmup_steps: int = 0,
        min_learning_rate: float = 0.0,
        horizons: list[tuple[int, int]] | None = None,
        seed: int = 1337,
        compile: bool | Literal["reduce-overhead", "max-autotune"] = False,
        activation_checkpointing: bool = False,
        skip_bad_steps: int = 0,
        init_from: str | None = None,
        lora_rank: int = 0,
        lora_alpha: float = 16.0,
        lora_dropout: float = 0.0,
        lora_layers: LoraLayers = "all",
        **gpt: Any,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self._check()
        self.gpt = GPT(GPTConfig(**gpt))
        self.base = ""  # the fingerprint of the weights that adapters go with
        if self.lora:
            add_adapters(self.gpt, self.lora)
            self.strict_loading = False  # checkpoints have the adapters alone
        for block in self.gpt.blocks:
            if activation_checkpointing:
                block.forward = partial(recompute, block.forward, use_reentrant=False)
            if compile:  # the method leaves the names of the weights unchanged
                block.compile(mode=None if compile is True else compile)
        with torch.device("cpu"):  # where the model is made on meta, too: distributed/fsdp2.py
            self._totals = [LossTotals() for _ in SPLITS]  # in a list: no part of the module
        self.token_lengths: Tensor | None = None  # (V,) bytes of each token
        # Of the current step, the mean of its batches so far.
        self.train_loss = torch.zeros((), device="cpu")
        self.curves: dict[str, float] = {}  # newest value of each
        self._gradient_norm: Tensor | None = None

    def _check(self) -> None:
        h = self.hparams
        if not 0 < h.learning_rate < math.inf:
            raise UserError("must be above 0", field="learning_rate", value=h.learning_rate)
        for name in ("table_rate", "table_eps"):
            if not 0 < h[name] < math.inf:
                raise UserError("must be above 0", field=name, value=h[name])
        if not all(0 <= beta < 1 for beta in h.betas):
            raise UserError("must both be in [0, 1)", field="betas", value=list(h.betas))
        check_choice(get_args(OptimizerKind), optimizer=h.optimizer)
        check_choice(get_args(Schedule), schedule=h.schedule)
        names = ("weight_decay", "warmup_steps", "skip_bad_steps")
        check_least(0, **{name: h[name] for name in names})
        if not 0 <= h.min_learning_rate <= h.learning_rate:
            problem = f"must be between 0 and `learning_rate` ({h.learning_rate})"
            raise UserError(problem, field="min_learning_rate", value=h.min_learning_rate)
        if h.horizons is not None and not is_plan(h.horizons):
            problem = "must be [step, last step] pairs: the first from step 0, each later one from "
            problem += "a step between that of the one before and its last"
            raise UserError(problem, field="horizons", value=[list(pair) for pair in h.horizons])
        self.lora = LoraConfig.of(h)
        if self.lora and h.init_from is None:
            problem = "needs a trained model to adapt"
            hint = "name its checkpoint or folder with `init_from`"
            raise UserError(problem, field="lora_rank", value=h.lora_rank, hint=hint)

    def setup(self, stage: str) -> None:
        check_precision(self.trainer.precision)
        if self.trainer.precision == "64-true":
            self.double()  # Lightning restores weights before it does so, rounded to float32
        if data := getattr(self.trainer, "datamodule", None):
            self.token_lengths = torch.from_numpy(data.tokenizer.token_lengths())
            self.gpt.spell(data.tokenizer)

    def configure_model(self) -> None:
        if shard := getattr(self.trainer.strategy, "shard", None):  # distributed/fsdp2.py
            shard(self.gpt)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits (B, T, V) of the token after each of `ids` (B, T)."""
        return self.gpt(ids)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        # Dropout is a pure function of the position in the run: a resumed run draws the same
        # masks, whatever drew random numbers before, and each rank draws its own.
        part = batch_idx % self.trainer.accumulate_grad_batches
        position = (self.hparams.seed, self.global_step, part, self.global_rank)
        seed = int(np.random.SeedSequence(position).generate_state(1, np.uint64)[0])
        # torch.manual_seed takes half a millisecond: it looks for every kind of device.
        torch.default_generator.manual_seed(seed)
        if self.device.type != "cpu":
            getattr(torch, self.device.type).manual_seed(seed)

    def training_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> Tensor:
        x, y, *weight = batch
        loss = next_token_loss(self.gpt, x, y)
        if weight:  # of batches with unequal numbers of targets: see TrainBatches
            part, whole = weight[0].float()
            loss = loss * (part / whole)
        parts = self.trainer.accumulate_grad_batches
        before = self.train_loss if batch_idx % parts else 0.0
        self.train_loss = before + loss.detach() / parts
        self._gradient_norm = None
        return loss

    def gradient_norm(self) -> Tensor:
        """Norm of all gradients together, before clipping; computed once a step, if asked for."""
        if self._gradient_norm is None:
            gradients = [p.grad for p in self.parameters() if p.grad is not None]
            # The norm of norms is the norm of all: those of half precision are taken in float32.
            norms = [
                torch.linalg.vector_norm(g, dtype=torch.float32) if is_half(g) else g
                for g in gradients
            ]
            self._gradient_norm = total_norm(norms)
        return self._gradient_norm

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        step = self.global_step + 1
        if self.is_logged(step):
            curves: dict[str, Any] = {"train/loss": self.train_loss}
            if self.trainer.world_size > 1:
                mean = self.trainer.strategy.reduce(self.train_loss.clone(), reduce_op="mean")
                curves["train/loss"] = mean
            curves["gradient_norm"] = self.gradient_norm()
            curves["learning_rate"] = optimizer.param_groups[0]["lr"]
            self.add_to_curves(curves, step)

    def is_logged(self, step: int) -> bool:
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        return every > 0 and step % every == 0

    def add_to_curves(self, values: dict[str, Any], step: int) -> None:
        """Gives the loggers values of one step; self.log would take a millisecond for each."""
        numbers = {name: float(value) for name, value in values.items()}
        self.curves |= numbers
        for logger in self.trainer.loggers:
            logger.log_metrics(numbers, step)
            logger.save()

    def on_validation_epoch_start(self) -> None:
        for totals in self._totals:
            totals.start(self.device)

    def validation_step(
        self, batch: tuple[Tensor, Tensor], batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        x, y = batch
        # Padding has no targets, but all ranks compute equally often: see data.py.
        loss = next_token_loss(self.gpt, x, y if len(y) else x)
        self._totals[dataloader_idx].update(loss, y, self.token_lengths)

    def on_validation_epoch_end(self) -> None:
        (train_loss, *_), (val_loss, bits_per_byte, _) = (t.compute() for t in self._totals)
        if not torch.isfinite(train_loss + val_loss):
            raise UserError(
                f"the loss is no longer finite at step {self.global_step}",
                hint="lower `learning_rate`; checkpoints saved earlier are intact",
            )
        self.log("step", float(self.global_step))
        self.log("train/eval_loss", train_loss)
        self.log("val/loss", val_loss)
        self.log("val/perplexity", val_loss.exp())
        if self.token_lengths is not None:
            self.log("val/bits_per_byte", bits_per_byte)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        h = self.hparams
        # With a float16 gradient scaler, Lightning clips only what is not fused.
        fused = self.trainer.precision != "16-mixed"
        dtype = None
        if h.optimizer == "muon":  # measured: all processes take what the first one finds
            strategy = self.trainer.strategy
            dtype = strategy.broadcast(fastest_dtype(strategy.root_device))
        optimizer = build_optimizer(
            self.gpt,
            h.learning_rate,
            h.weight_decay,
            h.betas,
            fused,
            h.optimizer,
            dtype,
            h.table_rate,
            h.table_eps,
        )
        save_by_name(optimizer, self)
        if self.trainer.precision == "bf16-mixed":
            # It has no scaler, but Lightning 2.6.6 refuses to clip what could work with one.
            optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]
        if h.schedule == "constant" and h.warmup_steps == 0:
            return optimizer
        max_steps = self.trainer.max_steps
        final_share = h.min_learning_rate / h.learning_rate

        def factor(step: int) -> float:
            # Horizons may come later: callbacks/budget_clock.py.
            return learning_rate_factor(
                step, max_steps, h.warmup_steps, h.schedule, final_share, h.horizons
            )

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: Contents) -> None:  # type: ignore[override]
        """Adds what makes one file enough: the whole GPTConfig, the tokenizer, the corpus.

        Raises:
            UserError: adapters alone would be saved, and nowhere the model that they adapt.
        """
        checkpoint["gpt"] = asdict(self.gpt.config)
        if self.lora:
            if not self.base and self.global_rank == 0:  # which keeps it
                problem = "adapts a model that only the training command loads and keeps"
                hint = "use that command to train adapters"
                raise UserError(problem, field="lora_rank", value=self.lora.rank, hint=hint)
            weights = checkpoint["state_dict"].items()
            checkpoint["state_dict"] = {name: w for name, w in weights if is_adapter(name)}
            checkpoint["lora"] = asdict(self.lora) | {"base": self.base}
        if data := getattr(self.trainer, "datamodule", None):
            checkpoint["tokenizer"] = data.tokenizer.to_dict()
            checkpoint["corpus"] = data.splits.info
        names = "accumulate_grad_batches gradient_clip_val precision max_steps world_size"
        checkpoint["trainer"] = {name: getattr(self.trainer, name) for name in names.split()}
