"""--budget: what makes no sense with it, and the options that it stands for.

A new run's are chosen by `lit_gpt.budget`. A resumed run's are those in its checkpoint.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import jsonargparse
import torch

from lit_gpt.budget.choice import CHOSEN, Choice
from lit_gpt.budget.durations import duration, seconds_of
from lit_gpt.budget.planner import plan_budget
from lit_gpt.budget.processor import set_threads
from lit_gpt.budget.text_facts import TextFacts, measure_text
from lit_gpt.checkpoint import Checkpoint
from lit_gpt.command import command_line
from lit_gpt.data import TextDataModule
from lit_gpt.distributed.launch import counted, find_launch
from lit_gpt.errors import UserError
from lit_gpt.generation.language_model import named_checkpoint
from lit_gpt.model import GPTConfig
from lit_gpt.text.files import TextFiles, holds_conversations
from lit_gpt.text.finding import is_token_store
from lit_gpt.text.splits import Splits
from lit_gpt.training import slurm
from lit_gpt.training.init_from import build_data
from lit_gpt.training.options import TrainOptions, option_name
from lit_gpt.training.trainer_options import check_accelerator, default_precision

# Two valid values of each option that is chosen, put before the user's own: if the result is the
# same with both, the user has set the option.
TWO_VALUES: dict[str, tuple[Any, Any]] = {
    "tokenizer": ("bytes", "chars"),
    "order": ("random", "shuffled"),
    "style": ("classic", "modern"),
    "tie_embeddings": ("true", "false"),
    "optimizer": ("adamw", "muon"),
    "schedule": ("constant", "linear"),
}
OURS = re.compile(r"bytes|cl100k_base|bpe:\d+")  # tokenizers that are chosen
SIZES = ("vocab_size", "context_length", "d_model", "num_blocks", "num_heads", "dropout")
FIELDS = [field.name for field in fields(GPTConfig) if field.name not in SIZES]
REFUSED = {  # options of the Trainer: the value that works, and why no other does
    "max_epochs": (None, "chooses the number of steps"),
    "min_epochs": (None, "chooses the number of steps"),
    "min_steps": (None, "chooses the number of steps"),
    "max_time": (None, "limits the time itself"),
    "fast_dev_run": (False, "plans more than one step"),
    "limit_train_batches": (None, "plans for all of the text"),
    "overfit_batches": (0.0, "plans for all of the text"),
    "check_val_every_n_epoch": (None, "evaluates by steps"),
    "num_nodes": (1, "plans for one device"),
}
ONE_DEVICE = (1, "1", [0], "0,")
FULL_NAMES = {"16": "16-mixed", "bf16": "bf16-mixed", "32": "32-true", "64": "64-true"}


def check_budget(config: jsonargparse.Namespace) -> float:
    """The budget's seconds, if a run with these options can have one.

    Raises:
        UserError: why it can't.
    """
    seconds = seconds_of(str(config.budget))
    launch = find_launch()
    if launch and launch.world_size > 1:
        problem = f"plans for one device, and {launch.name} started {counted(launch)}"
        raise UserError(problem, field="budget", hint=f"start it without {launch.name}")
    for name, (default, reason) in REFUSED.items():
        value = config.trainer[name]
        if value not in (None, default):
            problem = f"can't be used with `budget`, which {reason}"
            raise UserError(problem, field=name, value=value, hint="leave one of them out")
    if config.trainer.devices not in ONE_DEVICE:
        problem = "can't be used with `budget`, which plans for one device"
        raise UserError(problem, field="devices", value=config.trainer.devices, hint="leave it out")
    if config.find_lr:
        hint = "leave one of them out"
        raise UserError(
            "chooses the learning rate too, as `find_lr` does", field="budget", hint=hint
        )
    if config.model.init_from is not None:
        problem = "chooses a new model, and `init_from` names one"
        raise UserError(problem, field="budget", hint="leave one of them out")
    return seconds


def resumed_options(options: TrainOptions) -> dict[str, Any] | None:
    """What a checkpoint has for the options that a budget chooses; None: this is a new run.

    No others are taken, so that a stranger's checkpoint decides nothing else.
    """
    config = options.config
    root = config.trainer.default_root_dir or "."
    path = slurm.checkpoint_of_job(root, options.argv)
    if path is None and config.ckpt_path is not None:
        path = named_checkpoint(config.ckpt_path, root, ("last",))
    if path is None:
        return None
    saved = dict(Checkpoint.read(path).options)
    for group in [*saved.values()]:
        saved |= group if isinstance(group, dict) else {}
    if not saved:
        problem = f"does not work with {path}, which has no options"
        raise UserError(problem, field="budget", hint="leave it out, and give the run's options")
    return {name: saved[name] for name in CHOSEN if name in saved and is_plain(name, saved[name])}


def is_plain(name: str, value: Any) -> bool:
    if name == "tokenizer":
        return isinstance(value, str) and OURS.fullmatch(value) is not None
    return value is None or isinstance(value, bool | int | float | str)


def words(chosen: dict[str, Any]) -> list[str]:
    """Options by plain name as a command line has them."""
    return [f"{option_name(name)}={text_of(value)}" for name, value in chosen.items()]


def text_of(value: Any) -> str:
    return (
        "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    )


def plain_command(options: TrainOptions) -> str:
    """The same run without its budget, to be pasted."""
    assert options.choice
    argv = list(options.argv)
    if "--budget" in argv:
        at = argv.index("--budget")
        del argv[at : at + 2]
    ours = ("--budget=", "--json")  # the latter is plan.py's
    argv = [word for word in argv if not word.startswith(ours)]
    if any(word.startswith("--config") for word in argv):  # which may have one
        argv.append("--budget=null")
    return command_line("train", *words(options.choice.options), *argv)


def given_options(
    parse: Callable[[list[str]], jsonargparse.Namespace], argv: list[str]
) -> dict[str, Any]:
    """Which of the options that a budget chooses the user set, on the command line or in a file."""
    first, second = (
        by_plain_name(parse([*words({n: TWO_VALUES.get(n, (1, 2))[i] for n in CHOSEN}), *argv]))
        for i in (0, 1)
    )
    return {name: first[name] for name in CHOSEN if first[name] == second[name]}


def by_plain_name(config: jsonargparse.Namespace) -> dict[str, Any]:
    groups = (config, config.final, config.trainer, config.data, config.model)
    return {name: value for group in groups for name, value in vars(group).items()}


def choose_options(options: TrainOptions, seconds: float) -> Choice:
    """Chooses a new run's options.

    Raises:
        UserError: the text or the options can't be used.
    """
    config = options.config
    h = config.data
    given = given_options(options.parser.parse_args, options.argv)
    if config.model.horizons is not None:
        problem = "is a plan already, and `budget` makes one"
        raise UserError(problem, field="horizons", hint="leave one of them out")
    if given.get("max_steps", 1) < 1:
        problem = "can't be used with `budget`: the run has to end"
        raise UserError(problem, field="max_steps", value=given["max_steps"])
    given["accumulate_grad_batches"] = config.trainer.accumulate_grad_batches
    model = vars(config.model)
    fixed = [name for name in FIELDS if name in given or name not in CHOSEN]
    accelerator = config.trainer.accelerator
    check_accelerator(accelerator)
    device = device_of(accelerator)
    set_threads(config.threads)  # so that the trial computes as the run will
    files = (h.path, h.exclude, h.encoding, h.text_field, h.tsv_quotes, h.cache, h.loss_on)
    text = TextFiles(*files)
    if is_token_store(h.path):
        problem = "is a token store, and `budget` chooses for a text"
        raise UserError(problem, field="path", value=h.path, hint="name the text, or leave it out")
    if holds_conversations(text):
        problem = "chooses for plain text, and this text holds conversations"
        raise UserError(problem, field="budget", hint="leave it out")
    print(f"Choosing options for {duration(seconds)} on this machine ...", flush=True)

    def measure() -> TextFacts:
        return measure_text(text, h.train_fraction, h.val_path, h.compact_vocab)

    def encode(tokenizer: str, shortest: int) -> Splits:
        changed = {"tokenizer": tokenizer, "context_length": shortest}
        return build_data(TextDataModule, **{**h.as_dict(), **changed}).splits

    return plan_budget(
        seconds,
        measure,
        encode,
        given=given,
        fixed={name: model[name] for name in fixed if model[name] is not None},
        device=device,
        precision=precision_of(config.trainer.precision or default_precision(accelerator), device),
    )


def precision_of(value: str | int, device: torch.device) -> str:
    """The precision that the Trainer makes of one: by its full name, and on a CPU never float16."""
    name = FULL_NAMES.get(str(value), str(value))
    return "bf16-mixed" if name == "16-mixed" and device.type == "cpu" else name


def device_of(accelerator: str) -> torch.device:
    """The device that the Trainer takes."""
    if accelerator == "cpu" or not torch.accelerator.is_available():
        return torch.device("cpu")
    found = torch.accelerator.current_accelerator()
    return found or torch.device("cpu")
