"""How a resumed run's options differ from those of the run that saved the checkpoint."""

from __future__ import annotations

import math
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from lit_gpt.checkpoint import Checkpoint
from lit_gpt.model import GPTConfig
from lit_gpt.module import is_plan
from lit_gpt.optim import learning_rate_factor
from lit_gpt.reports.run_files import MAX_OPTIONS, load_tree
from lit_gpt.storage import read_limited

if TYPE_CHECKING:
    from lit_gpt.training.train import Run

NO_EFFECT = (  # on the weights and losses: options, and groups of them
    *("config", "ckpt_path", "find_lr", "budget", "profile", "samples", "checkpoints"),
    *("overfit", "early_stopping"),
    *("data.cache", "trainer.default_root_dir", "trainer.logger", "trainer.log_every_n_steps"),
    *("trainer.enable_progress_bar", "trainer.enable_model_summary", "trainer.profiler"),
    *("trainer.enable_checkpointing", "trainer.fast_dev_run", "trainer.detect_anomaly"),
    *("trainer.num_sanity_val_steps", "trainer.inference_mode", "trainer.barebones"),
    "trainer.strategy",  # each computes the same
    # Only how long it trains; a schedule that depends on it is reported by itself.
    *("trainer.max_steps", "trainer.max_epochs", "trainer.max_time", "model.horizons"),
    "model.activation_checkpointing",
    *("trainer.min_steps", "trainer.min_epochs"),
)
BY_EFFECT = (  # compared by what they lead to
    *(f"model.{field.name}" for field in fields(GPTConfig) if field.name != "dropout"),
    *("model.style", "model.init_from", "data.path", "data.tokenizer"),
    *("data.val_path", "data.exclude", "data.loss_on"),
    *("trainer.precision", "trainer.devices", "trainer.num_nodes", "data.batch_size"),
    *("model.seed", "data.seed", "data.context_length"),  # given as another option
)
GROUPS = ("trainer.", "model.", "data.")  # in whose options no name comes twice


def changed_options(run: Run) -> list[str]:
    """What differs and may change the results, one text for each."""
    checkpoint = run.checkpoint
    if checkpoint is None:
        return []
    given = by_name(run.options.plain())
    saved = saved_options(checkpoint)
    if checkpoint.options or config_of(checkpoint.path):  # an option that is absent did not exist
        saved = by_name(run.options.plain(run.options.parser.get_defaults())) | saved
    saved["precision"] = checkpoint.trainer_settings.get("precision", run.trainer.precision)
    given["precision"] = run.trainer.precision
    changes = [
        f"{short_name(name)} {shown(saved[name])} -> {shown(value)}"
        for name, value in given.items()
        if name in saved and saved[name] != value and not is_ignored(name)
    ]
    return [*changes, *changed_batch(run, saved), *changed_schedule(run, checkpoint, saved)]


def is_ignored(name: str) -> bool:
    return name in BY_EFFECT or any(name == n or name.startswith(f"{n}.") for n in NO_EFFECT)


def short_name(name: str) -> str:
    return next((name[len(group) :] for group in GROUPS if name.startswith(group)), name)


def saved_options(checkpoint: Checkpoint) -> dict[str, Any]:
    """What is known of the options that the checkpoint's run had, by their full names.

    Older checkpoints have a part of them; the rest is in the config.yaml of their run.
    """
    saved = by_name(checkpoint.options or config_of(checkpoint.path))
    saved |= {f"model.{name}": value for name, value in checkpoint.hyperparameters.items()}
    saved |= {f"data.{name}": value for name, value in checkpoint.data_hyperparameters.items()}
    saved |= {f"trainer.{name}": value for name, value in checkpoint.trainer_settings.items()}
    saved.setdefault("seed_everything", checkpoint.hyperparameters.get("seed"))
    return {name: plain(value) for name, value in saved.items()}


def config_of(path: Path) -> dict[str, Any]:
    """The config.yaml of the run that a checkpoint lies in; empty if there is none to read."""
    try:
        config = load_tree(read_limited(path.parent.parent / "config.yaml", MAX_OPTIONS))
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        return {}
    return config if isinstance(config, dict) else {}


def by_name(options: dict[str, Any]) -> dict[str, Any]:
    """{"model": {"dropout": 0.1}} as {"model.dropout": 0.1}: values of options may be dicts."""
    found: dict[str, Any] = {}
    for group, value in options.items():
        if isinstance(value, dict):
            found |= {f"{group}.{name}": part for name, part in value.items()}
        else:
            found[group] = value
    return found


def plain(value: Any) -> Any:
    """The value as YAML has it, where a tuple is a list."""
    return [plain(part) for part in value] if isinstance(value, list | tuple) else value


def shown(value: Any) -> str:
    """The value in a line of text: of an object no more than its class."""
    if isinstance(value, dict) and "class_path" in value:
        return str(value["class_path"]).rpartition(".")[2]
    if isinstance(value, list):
        return f"[{', '.join(map(shown, value))}]"
    return str(value)


def changed_batch(run: Run, saved: dict[str, Any]) -> list[str]:
    """Whether all devices together now take another number of windows at once."""
    now = (run.data.hparams.batch_size, run.trainer.world_size)
    then = (saved.get("data.batch_size"), saved_world_size(saved) or now[1])
    if not isinstance(then[0], int) or then[0] * then[1] == now[0] * now[1]:
        return []
    if now[1] == then[1]:
        return [f"batch_size {then[0]} -> {now[0]}"]
    return [f"batch_size x devices {then[0]} x {then[1]} -> {now[0]} x {now[1]}"]


def changed_schedule(run: Run, checkpoint: Checkpoint, saved: dict[str, Any]) -> list[str]:
    """Whether the schedule now ends at another step, and what that does to the learning rate."""
    last = saved.get("trainer.max_steps")
    if run.model.hparams.schedule == "constant" or not isinstance(last, int):
        return []
    step = checkpoint.global_step or 0
    horizons = saved.get("model.horizons")
    before: list[list[int]] = horizons if is_plan(horizons) else [[0, last]]  # type: ignore[assignment]
    now = plan_of(run)
    if before == now:
        return []
    jump = schedule_jump(run, step, before, now)
    change = f"max_steps {before[-1][1]} -> {now[-1][1]}"
    if before[-1] == now[-1]:
        change = f"horizons {before} -> {now}"
    return [f"{change}, so the learning rate jumps {jump}"]


def plan_of(run: Run) -> list[list[int]]:
    """The run's horizons: the last step that it is planned for, and from which step on."""
    horizons = run.model.hparams.horizons or [(0, run.trainer.max_steps)]
    return [list(pair) for pair in horizons]


def schedule_jump(run: Run, step: int, before: list[list[int]], now: list[list[int]]) -> str:
    """The learning rate at a step on the schedule of some horizons and on that of others."""
    h = run.model.hparams
    final_share = h.min_learning_rate / h.learning_rate
    old, new = (
        h.learning_rate
        * learning_rate_factor(step, -1, h.warmup_steps, h.schedule, final_share, horizons)
        for horizons in (before, now)
    )
    return f"from {old:.3g} to {new:.3g} at step {step}"


def saved_world_size(saved: dict[str, Any]) -> int | None:
    """How many devices the checkpoint's run had, by its options; None: unknown."""
    world_size = saved.get("trainer.world_size")
    if world_size is None:  # 0.1.0
        counts = (saved.get("trainer.devices"), saved.get("trainer.num_nodes", 1))
        if all(isinstance(count, int) and count > 0 for count in counts):
            world_size = counts[0] * counts[1]
    return world_size if isinstance(world_size, int) and world_size > 0 else None


def windows_seen_before(run: Run) -> int | None:
    """The place in the data of a run of 0.1.0 with shuffled windows, which its checkpoint hasn't.

    None if the checkpoint has it, or if windows were random: `RandomOrderByRank` draws these.
    """
    checkpoint = run.checkpoint
    if checkpoint is None or checkpoint.data_state or run.data.hparams.order == "random":
        return None
    saved = saved_options(checkpoint)
    names = ("trainer.accumulate_grad_batches", "data.batch_size")
    factors = [checkpoint.global_step, saved_world_size(saved), *(saved.get(n) for n in names)]
    if not all(isinstance(factor, int) and factor > 0 for factor in factors):
        return None
    return math.prod(factor for factor in factors if isinstance(factor, int))


def changed_devices(run: Run) -> str | None:
    """What a resume on another number of devices changes besides the batch, in a sentence."""
    if run.checkpoint is None:
        return None
    before = saved_world_size(saved_options(run.checkpoint))
    now = run.trainer.world_size
    if before in (None, now):
        return None
    start = f"Resumed on another number of devices ({before} -> {now}): "
    if not run.checkpoint.data_state and run.data.hparams.order == "random":
        return f"{start}other windows are drawn from here on"  # by rank, as in 0.1.0
    if run.model.hparams.dropout:
        return f"{start}the same windows come next, but dropout masks differ from here on"
    return None
