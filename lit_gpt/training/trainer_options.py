"""The Trainer's options: which values are refused, and what the others become.

docs/options.md has the table of all of them.
"""

from __future__ import annotations

import importlib
import math
import re
from inspect import signature
from typing import Any

import jsonargparse
import lightning.pytorch as pl
import torch
from lightning.pytorch import callbacks, plugins, strategies
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lit_gpt.data import TextDataModule
from lit_gpt.distributed import fsdp2
from lit_gpt.errors import UserError, check_least
from lit_gpt.module import check_precision
from lit_gpt.training.epochs import set_limits

LOWEST = {
    "accumulate_grad_batches": 1,
    "check_val_every_n_epoch": 1,
    "log_every_n_steps": 0,
    "max_epochs": -1,
    "max_steps": -1,
    "min_epochs": 0,
    "min_steps": 0,
    "num_nodes": 1,
    "num_sanity_val_steps": -1,
}
CHOICES: dict[str, tuple[Any, ...]] = {
    "accelerator": ("auto", "cpu", "gpu", "cuda", "mps"),
    "gradient_clip_algorithm": ("norm", "value"),
    "precision": (
        *("32-true", "bf16-mixed", "16-mixed", "bf16-true", "64-true"),
        *("32", "bf16", "16", "64", 32, 16, 64),
    ),
    "profiler": ("simple", "advanced", "pytorch"),
    "strategy": (
        *("auto", "ddp", "fsdp2", "single_device"),
        *("ddp_find_unused_parameters_true", "ddp_find_unused_parameters_false"),
    ),
}
HINTS = {
    "precision": "use bf16-mixed for speed, bf16-true for memory",
    "strategy": "ddp is the one for several devices, fsdp2 the one for models that one can't hold",
}
REFUSED: dict[str, tuple[Any, str, str]] = {  # the only value that works, why, what to use instead
    "barebones": (False, "a run needs what it turns off", "use `enable_progress_bar` false"),
    "enable_checkpointing": (True, "a run saves checkpoints", "use `fast_dev_run` to save nothing"),
    "limit_predict_batches": (None, "training predicts nothing", "use `limit_val_batches`"),
    "limit_test_batches": (None, "training has no test split", "use `limit_val_batches`"),
    "model_registry": (None, "there is no registry", "use `default_root_dir`"),
    "reload_dataloaders_every_n_epochs": (
        *(0, "batches depend on the step alone, so there is nothing to reload"),
        "use `data.order` shuffled for a new order in each epoch",
    ),
    "sync_batchnorm": (False, "the model has no batch normalization", "leave it out"),
    "use_distributed_sampler": (
        *(True, "batches are divided between devices without a sampler"),
        "leave it out",
    ),
}
INSTEAD: tuple[tuple[type, str], ...] = (  # of these classes, and those made from them
    (callbacks.Timer, "use `max_time`"),
    (callbacks.GradientAccumulationScheduler, "use `accumulate_grad_batches`"),
    (callbacks.LearningRateFinder, "use `find_lr`"),
    (callbacks.BatchSizeFinder, "use `batch_size` and lit-gpt plan"),
    (callbacks.StochasticWeightAveraging, "use EMAWeightAveraging, or `schedule` cosine"),
    (callbacks.SpikeDetection, "it can't be resumed: use `skip_bad_steps`"),
    (callbacks.ProgressBar, "a run has its own: use `enable_progress_bar`"),
    (callbacks.BaseFinetuning, "all weights train: use `init_from`"),
    (callbacks.ModelPruning, "use a smaller `d_model`"),
    (callbacks.BasePredictionWriter, "training predicts nothing: use lit-gpt generate"),
    (plugins.CheckpointIO, "a run writes its own checkpoints: use `default_root_dir`"),
    (plugins.LayerSync, "the model has no batch normalization: leave it out"),
    (plugins.Precision, "use `precision`"),
)
METRICS = ("val/loss", "val/perplexity", "val/bits_per_byte", "train/eval_loss", "step")
SHARDED_PRECISIONS = (None, "32-true", "bf16-mixed", "bf16-true", "32", "bf16", 32)
MONITORS = (callbacks.EarlyStopping, callbacks.ModelCheckpoint)
STRATEGIES = (strategies.DDPStrategy, strategies.SingleDeviceStrategy)
LISTS = ("callbacks", "plugins")


def check_trainer(config: jsonargparse.Namespace) -> None:
    """Refuses values of the Trainer's options that would be ignored, or end in a traceback.

    Args:
        config: the Trainer's options, nothing instantiated.
    """
    for name, lowest in LOWEST.items():
        check_least(lowest, **{name: config[name]})
    for name in ("max_steps", "max_epochs"):
        if config[name] == 0:
            raise UserError("must be at least 1, or -1 for no limit", field=name, value=0)
    check_precision(config.precision)
    for name, choices in CHOICES.items():
        value = config[name]
        if value is not None and not is_class(value) and value not in choices:
            raise not_a_choice(name, value)
    for name, (default, reason, hint) in REFUSED.items():
        if config[name] not in (None, default):
            raise UserError(reason, field=name, value=config[name], hint=hint)
    check_classes(config)
    check_batches(config)
    check_clipping(config)
    if config.strategy == fsdp2.NAME:
        check_sharding(config)


def check_sharding(config: jsonargparse.Namespace) -> None:
    """Refuses what needs whole weights, or was not made for shards of them."""
    if config.precision not in SHARDED_PRECISIONS:
        hint = "use bf16-mixed, bf16-true or 32-true"
        raise UserError(
            "can't be used with fsdp2", field="precision", value=config.precision, hint=hint
        )
    for value in filter(is_class, values_of(config, "callbacks")):
        if issubclass(kind := class_of(value), callbacks.WeightAveraging):
            problem = "averages whole weights, which fsdp2 has in no process"
            raise UserError(
                f"{kind.__name__} {problem}", field="callbacks", hint="use `strategy` ddp"
            )


def values_of(config: jsonargparse.Namespace, name: str) -> list[Any]:
    return config[name] if isinstance(config[name], list) else [config[name]]


def not_a_choice(name: str, value: Any) -> UserError:
    names = ", ".join(choice for choice in CHOICES[name] if isinstance(choice, str))
    return UserError(f"must be one of {names}", field=name, value=value, hint=HINTS.get(name))


def is_class(value: Any) -> bool:
    return isinstance(value, jsonargparse.Namespace)


def check_classes(config: jsonargparse.Namespace) -> None:
    for name in LISTS:
        for value in filter(is_class, values_of(config, name)):
            kind = class_of(value)
            monitor = value.get("init_args.monitor")
            if issubclass(kind, MONITORS) and monitor not in (None, *METRICS):
                problem = f"{kind.__name__} monitors {monitor!r}, which is not measured"
                hint = f"monitor one of {', '.join(METRICS)}"
                raise UserError(problem, field=name, hint=hint)
            for refused, hint in INSTEAD:
                if issubclass(kind, refused):
                    raise UserError("can't be used", field=name, value=kind.__name__, hint=hint)
    strategy = config.strategy
    if is_class(strategy):
        spawns = strategy.get("init_args.start_method", "popen") != "popen"
        if spawns or not issubclass(class_of(strategy), STRATEGIES):
            name = class_of(strategy).__name__
            raise UserError("can't be used", field="strategy", value=name, hint=HINTS["strategy"])
    for name in ("accelerator", "profiler"):
        if is_class(config[name]) and class_of(config[name]).__name__.startswith("XLA"):
            raise UserError("TPUs can't be used", field=name, hint="leave it out")


def class_of(value: jsonargparse.Namespace) -> type:
    module, _, name = value.class_path.rpartition(".")
    found: type = getattr(importlib.import_module(module), name)
    return found


def check_batches(config: jsonargparse.Namespace) -> None:
    """The limits of batches, and the intervals between evaluations."""
    for name in ("limit_train_batches", "limit_val_batches", "overfit_batches"):
        value = config[name]
        is_share = isinstance(value, float)
        if value is not None and not (0 <= value <= 1 if is_share else value >= 0):
            problem = "must be a number of batches, or a share of them between 0.0 and 1.0"
            raise UserError(problem, field=name, value=value)
    if config.limit_train_batches == 0:
        raise UserError("leaves no batch to train on", hint="raise `limit_train_batches`")
    if config.overfit_batches and config.limit_train_batches is not None:
        hint = "leave out `limit_train_batches`"
        raise UserError("sets this limit itself", field="overfit_batches", hint=hint)
    interval = config.val_check_interval
    if interval is None:
        if config.check_val_every_n_epoch is None:
            problem = "must be a number of steps, or a share of an epoch"
            raise UserError(problem, field="val_check_interval", value="null")
        return
    if config.check_val_every_n_epoch is not None:
        hint = "set only one of `val_check_interval` (steps) and `check_val_every_n_epoch`"
        raise UserError("there are two intervals", field="check_val_every_n_epoch", hint=hint)
    is_share = isinstance(interval, float) and 0 < interval <= 1
    if not is_share and not (isinstance(interval, int) and interval >= 1):
        raise UserError(
            "must be a number of steps, at least 1, or a share of an epoch, at most 1.0",
            field="val_check_interval",
            value=interval,
            hint="to evaluate only at the end, give it the value of `max_steps`",
        )


def check_clipping(config: jsonargparse.Namespace) -> None:
    value = config.gradient_clip_val
    if value is not None and not 0 <= value < math.inf:
        raise UserError(
            "must be a finite number, at least 0", field="gradient_clip_val", value=value
        )
    if config.gradient_clip_algorithm is not None and not value:
        hint = "set `gradient_clip_val` too"
        raise UserError("clips nothing alone", field="gradient_clip_algorithm", hint=hint)


def build_trainer(options: dict[str, Any], data: TextDataModule) -> pl.Trainer:
    """The Trainer of a run, which counts steps alone, and the limits of `data`.

    Args:
        options: the Trainer's arguments, objects instantiated.
        data: learns which batches come round.

    Raises:
        UserError: Lightning can't use them.
    """
    ours = {
        "precision": options["precision"] or default_precision(options["accelerator"]),
        "max_time": None,  # Lightning's own would stop inside a step: see GracefulStop
        "max_steps": -1,
        "max_epochs": -1,
        "min_steps": None,
        "min_epochs": 0,  # with min_steps, None would be 1, and the one epoch has no end
        "limit_train_batches": None,
        "overfit_batches": 0.0,
        "val_check_interval": 2,
        "check_val_every_n_epoch": None,
    }
    check_accelerator(options["accelerator"])
    try:
        trainer = pl.Trainer(**options | ours)
    except (ValueError, TypeError, ImportError, MisconfigurationException) as error:
        message = str(error).replace("`", "'")  # they don't mark our fields
        places = {
            found.start(): name
            for name in signature(pl.Trainer).parameters
            if (found := re.search(rf"\b{name}\b", message))
        }
        raise UserError(message, field=places.get(min(places, default=-1))) from error
    if not options["fast_dev_run"]:
        set_limits(trainer, data, options)
    return trainer


def save_shards(trainer: pl.Trainer, wanted: bool) -> None:
    """Has fsdp2 save folders instead of files; a UserError if other strategies are to."""
    if isinstance(trainer.strategy, fsdp2.FSDP2Strategy):
        trainer.strategy.saves_shards = wanted
    elif wanted:
        raise UserError("only fsdp2 has shards", field="sharded", hint="use `strategy` fsdp2")


def check_accelerator(name: str) -> None:
    is_there = {"gpu": torch.cuda.is_available() or torch.backends.mps.is_available()}
    is_there |= {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not is_there.get(name, True):
        hint = "leave it out to use what there is"
        raise UserError("this machine has none", field="accelerator", value=name, hint=hint)


def default_precision(accelerator: str) -> str:
    """bf16-mixed on an NVIDIA GPU that computes in bfloat16, else 32-true, there with TF32."""
    if accelerator not in ("auto", "gpu", "cuda") or not torch.cuda.is_available():
        return "32-true"
    torch.set_float32_matmul_precision("high")
    return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "32-true"
