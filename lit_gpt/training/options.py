"""The options of a run: LightningCLI's, our defaults, and a help that fits on a screen."""

from __future__ import annotations

import argparse
import inspect
import re
from collections.abc import Iterator
from functools import cached_property, reduce
from operator import or_
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, get_args

import jsonargparse
import lightning.pytorch as pl
import yaml
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback

from lit_gpt import command
from lit_gpt.budget.processor import set_threads
from lit_gpt.callbacks.checkpoints import StepCheckpoints
from lit_gpt.callbacks.early_stopping import EarlyStop
from lit_gpt.callbacks.evaluation import EvaluationPrinter, FinalEvaluation
from lit_gpt.callbacks.samples import Samples
from lit_gpt.checkpoint import write_options
from lit_gpt.data import TextDataModule
from lit_gpt.distributed.fsdp2 import device_of_weights
from lit_gpt.distributed.launch import adopt_launch
from lit_gpt.errors import UserError
from lit_gpt.model import GPTConfig
from lit_gpt.module import LitGPT
from lit_gpt.storage import atomic_write_text
from lit_gpt.training.epochs import prefer_epochs
from lit_gpt.training.init_from import build_data
from lit_gpt.training.loggers import continue_loggers
from lit_gpt.training.resume import resolve_checkpoint
from lit_gpt.training.trainer_options import check_trainer, not_a_choice

if TYPE_CHECKING:
    from lit_gpt.budget.choice import Choice

TRAINER_DEFAULTS: dict[str, Any] = {
    "max_steps": 500,
    "val_check_interval": 50,
    "check_val_every_n_epoch": None,  # count steps, not epochs
    "limit_val_batches": 10,
    "num_sanity_val_steps": 0,  # the evaluation at step 0 serves
    "log_every_n_steps": 10,
    "devices": 1,
    "inference_mode": False,  # metrics of the evaluation at step 0 are used in the fit
    "default_root_dir": "logs",
    "enable_model_summary": False,  # its FLOPs are 0; we print our own line
}
OUR_HELP = {  # plainer than Lightning's
    "config": "YAML file of options",
    "seed_everything": "seed of the initial weights, the windows and dropout",
    "trainer.max_steps": "optimizer steps; -1: until stopped",
    "trainer.max_epochs": "passes over the training text, instead of steps",
    "trainer.max_time": "stop after this time, as DD:HH:MM:SS",
    "trainer.val_check_interval": "steps between evaluations",
    "trainer.limit_val_batches": "batches of each split in an evaluation; 0: no evaluations",
    "trainer.accumulate_grad_batches": "batches per optimizer step",
    "trainer.gradient_clip_val": "clip the gradient to this norm",
    "trainer.accelerator": "cpu, gpu, mps or auto",
    "trainer.devices": "how many devices to train on",
    "trainer.precision": "32-true, bf16-mixed or 16-mixed; default: bf16-mixed where the GPU "
    "supports it",
    "trainer.default_root_dir": "folder of the runs",
}
MODEL_HELP = "style d_model num_blocks num_heads dropout learning_rate optimizer schedule"
DATA_HELP = "path tokenizer context_length batch_size order train_fraction"
SHORT_HELP = {  # what --help shows
    *OUR_HELP,
    *("help", "print_config", "ckpt_path", "find_lr", "budget", "profile"),
    *("device_name", "devices", "nodes", "price", "tokens", "vocab_size", "json"),  # of plan
    *(f"model.{name}" for name in f"{MODEL_HELP} warmup_steps compile init_from lora_rank".split()),
    *(f"data.{name}" for name in DATA_HELP.split()),
    *("samples.prompts", "checkpoints.every_n_steps"),
}
GROUPS: dict[str, tuple[str, tuple[type, ...]]] = {  # titles in --help, and whose fields they have
    "model": ("model and optimizer", (LitGPT, GPTConfig)),
    "data": ("text and batches", (TextDataModule,)),
    "samples": ("sample texts", (Samples,)),
    "checkpoints": ("checkpoints every N steps", (StepCheckpoints,)),
    "overfit": ("overfitting", (EvaluationPrinter,)),
    "early_stopping": ("early stopping", (EarlyStop,)),
    "final": ("final evaluation", (FinalEvaluation,)),
    "trainer": ("training", (pl.Trainer,)),
}
NAMES = {  # of fields in two groups; of two kinds of patience, one is never refused
    "seed": "--seed_everything",
    "context_length": "--data.context_length",
    "patience": "--early_stopping.patience",
}
PROBE = 1 << 62  # a number that nobody gives
NOT_TEXT = re.compile("[\0\ud800-\udfff]")  # in no file name, and can't be saved


def option_name(field: str) -> str:
    """A field as the command line spells it: `context_length` is --data.context_length."""
    if field in NAMES:
        return NAMES[field]
    for group, (_, owners) in GROUPS.items():
        if any(field in inspect.signature(owner).parameters for owner in owners):
            return f"--{group}.{field}"
    return f"--{field}"


class Parser(command.Parser, LightningArgumentParser):
    """Makes whatever is wrong with the options, or a file of them, a UserError."""

    shown: str | None = None  # of --help=all or --help=trainer: what comes after the =

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if "Unexpected config" in message:  # the message holds the whole file
            raise UserError("a --config file maps option names to values: `model: {d_model: 64}`")
        if group := re.match(r'.?Key "(\w+)\.\w+" not found in namespace', message):  # from a link
            message = f"--{group[1]} is a group of options, so it can't be null"
        if value := re.search(r'"trainer.precision"(?s:.+)Given value: (.+)', message):
            raise not_a_choice("precision", value[1])
        option = re.match('Parser key "(.+?)"', message)
        if option and (problem := problem_of_class(message)):
            kinds = set(re.findall(r"class_path'?[=:] ?'(?:[\w.]+\.)?(\w+)'", message))
            kind = kinds.pop() if len(kinds) == 1 else None
            hint = f"`{option[1]}.help`={kind or 'CLASS'} lists what it takes"
            raise UserError(problem, field=option[1], value=kind, hint=hint)
        super().error(message, ex)

    def parse_args(  # type: ignore[override]
        self, args: Any = None, *others: Any, **kwargs: Any
    ) -> jsonargparse.Namespace:
        check_values("the command line", args)
        for word in args:
            if word.startswith("--help="):
                self.shown = word.partition("=")[2]
                self.print_help()
                self.exit()
        try:
            config = super().parse_args(args, *others, **kwargs)
            self.validate(config, skip_none=False)  # at first, null passes as any value
        except UnicodeDecodeError as error:
            raise UserError(f"a file is not UTF-8 text ({error})", field="config") from error
        except RecursionError:
            self.error("an option is nested too deeply, or part of itself")
        except (TypeError, LookupError, ValueError, AttributeError) as error:
            self.error(str(error))
        defaults = self.get_defaults()
        for name in self.groups or {}:
            value = config.get(name)
            if not isinstance(value, jsonargparse.Namespace):
                self.error(f"--{name} is a group of options, so it can't be {value}")
            if len(vars(value)) < len(vars(defaults[name])):  # null, but for what links set
                self.error(f"--{name} is a group of options, so it can't be null")
        for name, value in config.items():
            check_values(f"--{name}", value)
        return config

    def format_help(self, *args: Any, **kwargs: Any) -> str:
        """The options that most people need, ours first; with --help=GROUP or =all the others."""
        groups = self.groups or {}
        if not GROUPS.keys() <= groups.keys():  # of a class, by --trainer.callbacks.help=CLASS
            return super().format_help(*args, **kwargs)
        for action in self._actions:
            if self.shown is None and action.dest in SHORT_HELP:
                action.help = OUR_HELP.get(action.dest, action.help)
            elif self.shown not in ("all", action.dest.partition(".")[0]):
                action.help = argparse.SUPPRESS
            # Lists can be appended to with --NAME+, which is not worth a line each.
            action.option_strings = [s for s in action.option_strings if not s.endswith("+")]
        for name, (title, _) in GROUPS.items():
            groups[name].title = title
        others: list[Any] = [g for g in self._action_groups if g not in groups.values()]
        self._action_groups = [*others, *(groups[name] for name in GROUPS)]
        return super().format_help(*args, **kwargs)


def check_values(where: str, value: Any) -> None:
    """Refuses text that no file can hold and numbers that torch can't, naming `where` they are."""
    for leaf in leaves(value):
        if isinstance(leaf, str) and NOT_TEXT.search(leaf):
            raise UserError(f"{leaf!r} in {where} is not valid Unicode text without NUL characters")
        if isinstance(leaf, int) and abs(leaf) >= 1 << 63:
            raise UserError(f"{leaf} in {where} does not fit into 64 bits")


def leaves(value: Any) -> Iterator[Any]:
    """All that is in nested options and lists, keys included."""
    if isinstance(value, jsonargparse.Namespace):
        value = vars(value)
    if isinstance(value, dict):
        value = [*value.keys(), *value.values()]
    if isinstance(value, list | tuple | set):
        for part in value:
            yield from leaves(part)
    else:
        yield value


def problem_of_class(message: str) -> str:
    """Why a class can't be made with these options, out of all that jsonargparse says."""
    found = re.search(
        r"\n *Errors:(?P<bullet>\n *- )(?P<errors>(?s:.+?))(?=\n *Given value|$)", message
    )
    errors = found["errors"].split(found["bullet"]) if found else []
    others = ("Expected a", "Not a valid subclass", "Import path", "Does not validate")
    parts = (e.partition("; --help")[0] for e in errors if not e.startswith(others))
    return "; ".join(dict.fromkeys(parts)).replace("`", "'")


def take_whole_numbers_first(parser: LightningArgumentParser) -> None:
    """Has an option that takes whole numbers and others read `2` as a whole number.

    The types of a union are tried in order. `Optional[Union[int, float]]` has the order of an equal
    one that any other package made before, since typing caches it.
    """
    actions: list[Any] = parser._actions
    for action in actions:
        kinds = get_args(getattr(action, "_typehint", None))
        if int in kinds and float in kinds:
            action._typehint = reduce(or_, (int, *(kind for kind in kinds if kind is not int)))


def check_profile(config: jsonargparse.Namespace) -> None:
    """Refuses --profile with what takes its place or does no training."""
    others = {"profiler": config.trainer.profiler, "find_lr": config.find_lr}
    for name, value in others.items():
        if config.profile and value:
            hint = "leave one of them out"
            raise UserError(f"can't be used with `{name}`", field="profile", hint=hint)


class SaveConfig(SaveConfigCallback):
    """The options of a run in its config.yaml and its checkpoints.

    Without what was asked of this command only.
    """

    def __init__(self, parser: LightningArgumentParser, config: jsonargparse.Namespace) -> None:
        config = config.clone()
        config["ckpt_path"] = None
        config["find_lr"] = config["profile"] = False
        config["budget"] = None  # what it chose is among the options
        super().__init__(parser, config, save_to_log_dir=False)
        self.folder: Path | None = None
        self.path: Path | None = None  # once it is written

    @cached_property
    def text(self) -> str:
        return self.parser.dump(self.config, skip_none=False)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.folder = Path(trainer.log_dir or trainer.default_root_dir)  # asks all ranks
        super().setup(trainer, pl_module, stage)

    def save_config(self, *_: Any) -> None:
        assert self.folder is not None
        self.save_to(self.folder)

    def save_to(self, folder: Path) -> None:
        """Writes config.yaml; a folder that can't be written to must not end the run."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
            atomic_write_text(folder / self.config_filename, self.text)
            self.path = folder / self.config_filename
        except OSError as error:
            print(f"Could not write {folder / self.config_filename}: {error.strerror}")

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        horizons = pl_module.hparams["horizons"]
        if horizons != self.config.model.horizons:  # BudgetClock has planned anew
            self.config.model.horizons = horizons
            self.config.trainer.max_steps = trainer.max_steps
            self.__dict__.pop("text", None)
            if trainer.is_global_zero:
                self.save_config()
        write_options(checkpoint, yaml.safe_load(self.text))


class TrainOptions(LightningCLI):
    """The options of a run, parsed and checked; `build_run` makes the objects.

    Attributes:
        argv: what the user typed.
        checkpoint: the one to continue, without its tensors; None: a new run.
        config: the values by group: `config.model.d_model`.
        budget: seconds; None: as many as it takes.
        choice: what a budget chose for a new run.
    """

    budget: float | None = None
    choice: Choice | None = None

    def __init__(self, argv: list[str], description: str = "Train a GPT on a text.") -> None:
        self.argv = list(argv)
        more = "More options: --help=all, or --help=model, =data, =trainer for one group."
        super().__init__(
            LitGPT,
            TextDataModule,
            trainer_defaults=TRAINER_DEFAULTS,
            seed_everything_default=1337,
            parser_class=Parser,
            parser_kwargs={"description": f"{description} {more}"},
            args=self.argv,
            run=False,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--ckpt_path",
            type=str | None,
            help="checkpoint to continue, or `last` for the newest run's; none: a new run",
        )
        parser.add_argument(
            "--find_lr",
            action="store_true",
            help="don't train: try rising learning rates, suggest one and plot the losses",
        )
        parser.add_argument(
            "--profile",
            action="store_true",
            help="show what ten steps spend their time on, and save a trace of them",
        )
        parser.add_argument(
            "--budget",
            type=str | int | None,  # in YAML, 600 is a number, which is refused with what to write
            help="time for all of it, as in 90s, 10m or 1h30m: chooses the options that learn most",
        )
        parser.add_argument(
            "--threads",
            type=int | None,
            help="threads that PyTorch computes on, on a CPU; none: its own choice",
        )
        parser.add_lightning_class_args(Samples, "samples")
        parser.add_lightning_class_args(EvaluationPrinter, "overfit")
        parser.add_lightning_class_args(EarlyStop, "early_stopping")
        parser.add_lightning_class_args(FinalEvaluation, "final")
        parser.add_lightning_class_args(StepCheckpoints, "checkpoints")
        parser.add_instantiator(self.build_data, TextDataModule, subclasses=False)
        parser.add_instantiator(self.build_model, LitGPT, subclasses=False)
        parser.link_arguments("data.vocab_size", "model.vocab_size", apply_on="instantiate")
        parser.link_arguments("data.context_length", "model.context_length")
        parser.link_arguments("seed_everything", "data.seed", compute_fn=int)
        parser.link_arguments("seed_everything", "model.seed", compute_fn=int)
        take_whole_numbers_first(parser)

    def build_data(self, data_class: type[TextDataModule], **options: Any) -> TextDataModule:
        return build_data(data_class, self.checkpoint, **options)

    def build_model(self, model_class: type[LitGPT], **options: Any) -> LitGPT:
        with device_of_weights(self.config.trainer.strategy):
            return model_class(**options)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        self.parse(args)
        if self.config.budget is not None:
            from lit_gpt.training import budget  # what only a budget needs

            self.budget = budget.check_budget(self.config)
            chosen = budget.resumed_options(self)
            if chosen is None:
                self.choice = budget.choose_options(self, self.budget)
                chosen = self.choice.options
            self.parse([*budget.words(chosen), *args])  # so that the user's win

    def parse(self, args: list[str]) -> None:
        self.config = self.parser.parse_args(args)
        seed = self.config.seed_everything
        if isinstance(seed, bool) or not 0 <= seed < 2**32:
            raise UserError("must be at least 0 and below 2**32", field="seed", value=seed)
        prefer_epochs(self.config.trainer, self.given)
        adopt_launch(self.config.trainer, args)
        check_profile(self.config)
        check_trainer(self.config.trainer)

    def instantiate_classes(self) -> None:
        """Opens the checkpoint; `build_run` makes the objects, once a command wants them."""
        self.checkpoint = resolve_checkpoint(self)

    def given(self, name: str) -> bool:
        """Whether the user set an option, even to its default, on the command line or in a file."""
        return self.parser.parse_args([f"--{name}={PROBE}", *self.argv])[name] != PROBE

    def plain(self, config: jsonargparse.Namespace | None = None) -> dict[str, Any]:
        """The options, or others like them, by group, in the plain types of YAML."""
        text = self.parser.dump(config or self.config, skip_none=False, skip_validation=True)
        return dict(yaml.safe_load(text))

    def instantiate(self) -> jsonargparse.Namespace:
        """Model, data module and callbacks, by the names of their options."""
        set_threads(self.config.threads)
        config = self.config.clone()  # so that the ids of its loggers stay out of config.yaml
        continue_loggers(config.trainer, config.ckpt_path)
        try:
            return self.parser.instantiate_classes(config)
        except ValueError as error:
            cause: BaseException | None = error
            while cause:
                if isinstance(cause, ModuleNotFoundError):  # an optional package, such as wandb
                    raise UserError(str(cause)) from error
                cause = cause.__cause__
            if problem := problem_of_class(str(error)):
                raise UserError(problem) from error
            raise
