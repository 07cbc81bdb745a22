"""Owns the plan: what is known of a run before it trains, and what would better be changed."""

from __future__ import annotations

import json
import signal
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lit_gpt.callbacks import checkpoints
from lit_gpt.callbacks.nonfinite import NonFiniteGuard
from lit_gpt.callbacks.progress import Throughput
from lit_gpt.callbacks.samples import Samples
from lit_gpt.data import TextDataModule
from lit_gpt.errors import UserError
from lit_gpt.planning.dry_run import Trial, peak_memory
from lit_gpt.planning.suggestions import Suggestion, suggest_dropout, suggest_model, suggest_steps
from lit_gpt.storage import temporary_folder
from lit_gpt.text.overlap import SharedLines
from lit_gpt.training import summary
from lit_gpt.training.init_from import set_tokenizer
from lit_gpt.training.options import Parser
from lit_gpt.training.run_folder import run_of_last
from lit_gpt.training.train import TrainingCLI, quieten

MANY_SHARED = 0.1  # of the validation lines


class PlanCLI(TrainingCLI):
    """train.py's options, taken and refused as there; what its trainer writes goes with `exits`.

    The user's own callbacks and loggers are left out of the trial.
    """

    def __init__(self, args: list[str] | None, exits: ExitStack) -> None:
        self.exits, self.encoding = exits, 0.0
        super().__init__(args)

    def add_arguments_to_parser(self, parser: Parser) -> None:
        super().add_arguments_to_parser(parser)
        parser.add_argument(
            "--json",
            action="store_true",
            help="End with the predicted seconds and peak memory as one line of JSON.",
        )

    def before_instantiate_classes(self) -> None:
        super().before_instantiate_classes()
        start = time.perf_counter()
        set_tokenizer(TextDataModule(**self.config.data.as_dict()))  # fills the cache
        self.encoding = time.perf_counter() - start  # the run itself will find it there

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        if self.config_init.trainer.fast_dev_run:
            raise UserError("--trainer.fast_dev_run is no run to plan: leave it out")
        trainer = super().instantiate_trainer(**kwargs)
        by_type = {type(callback): callback for callback in trainer.callbacks}
        self.trial = Trial(by_type[Samples], self.folder)
        trainer.callbacks = [by_type[NonFiniteGuard], by_type[Throughput], self.trial]
        trainer._signal_connector.register_signal_handlers = lambda: None  # as GracefulStop does
        return trainer

    def place_of_run(self) -> dict[str, Any]:
        """A folder beside the cached corpus: should it outlive us, `corpus` will remove it."""
        cache = self.datamodule.corpus.folder.parent
        try:
            self.folder = self.exits.enter_context(temporary_folder(cache))
        except OSError:  # the cache's disk is full or read-only
            self.folder = self.exits.enter_context(temporary_folder(Path(tempfile.gettempdir())))
        logger = self.config_init.trainer.logger is not False
        return {
            "default_root_dir": str(self.folder),
            "logger": TensorBoardLogger(self.folder, name="", version="") if logger else False,
        }

    @property
    def tokens_a_step(self) -> int:
        h, trainer = self.datamodule.hparams, self.trainer
        windows = h.batch_size * trainer.accumulate_grad_batches * trainer.world_size
        return windows * h.context_length

    @property
    def epochs_a_step(self) -> float:
        return self.tokens_a_step / len(self.datamodule.train_tokens)

    @property
    def done(self) -> int:
        """Steps of the checkpoint that the run goes on from."""
        return self.checkpoint.global_step if self.checkpoint else 0


def print_text(data: TextDataModule) -> None:
    for name, value in summary.text_card(data):
        print(f"{name}: {value}")
    if data.vocabulary.is_compact:
        print(f"Full vocabulary: {data.vocabulary.full_size():,} tokens")


def print_model(cli: PlanCLI) -> None:
    gpt, trainer = cli.model.gpt, cli.trainer
    outer, blocks = gpt.num_parameters()
    embedding = gpt.embedding.weight.numel()
    head = f"{outer - embedding:,}" if outer > embedding else "the embedding's"
    print(
        f"Parameters: {outer + blocks:,} (embedding {embedding:,}, blocks {blocks:,}, head {head})"
    )
    print(f"Tokens per parameter: {len(cli.datamodule.train_tokens) / (outer + blocks):.2g}")
    if trainer.max_steps >= 0:
        print(
            f"Epochs: {trainer.max_steps * cli.epochs_a_step:.2f} ({trainer.max_steps:,} steps of "
            f"{cli.tokens_a_step:,} tokens)"
        )
    print(f"Device: {trainer.strategy.root_device.type}, precision {trainer.precision}")


def time_parts(cli: PlanCLI, steps: int, started: float) -> dict[str, float]:
    """Seconds of each part of a run of so many steps, as a user would time it."""
    trial, trainer, data = cli.trial, cli.trainer, cli.datamodule
    every = cli.config_init.trainer.val_check_interval
    saved = -(-steps // every) if trainer.limit_val_batches else 0
    evaluations = saved + (trainer.limit_val_batches != 0 and not cli.checkpoint)
    by_steps = cli.config_init.checkpoints.every_n_steps
    files = max(1, 2 * saved) + (steps // by_steps if by_steps else 0)  # the last and the best
    each = trial.evaluation * trial.eval_batch + trial.samples
    return {
        "start-up": started + trial.around + trial.first_steps,
        f"{steps:,} steps": steps * trial.step,
        f"{evaluations:,} evaluations": evaluations * each,
        f"{files:,} checkpoints": files * trial.save,
        "final evaluation": len(data.whole_val_split()) * trial.final_batch,
    }


def print_costs(cli: PlanCLI, started: float) -> None:
    trial, device = cli.trial, cli.trainer.strategy.root_device
    measured = f"measured over {trial.steps:,} steps"
    planned = cli.trainer.max_steps
    parts = time_parts(cli, max(0, planned - cli.done), started)
    limit = cli.stop.timer.time_remaining()
    if planned < 0:
        print(f"Time: {duration(trial.step)} a step ({measured}); no number of steps is planned")
    else:
        listed = ", ".join(f"{name} {duration(seconds)}" for name, seconds in parts.items())
        print(f"Time: about {duration(sum(parts.values()))} on this machine ({measured})")
        print(f"Parts of the time: {listed}")
    if limit is not None and (planned < 0 or limit < sum(parts.values()) - parts["start-up"]):
        print(f"Stopped before: --trainer.max_time ends training after {duration(limit)}")
    if memory := peak_memory():
        print(f"Memory: about {memory / 1e6:,.0f} MB of this machine's")
    if device.type == "cuda":
        memory = torch.cuda.max_memory_allocated(device)
        print(f"Memory of the GPU: about {memory / 1e6:,.0f} MB")


def print_disk(cli: PlanCLI) -> None:
    data, root = cli.datamodule, cli.config_init.trainer.default_root_dir or "."
    folder = Path(root, run_of_last(cli.config.ckpt_path, root) or "version_N", "checkpoints")
    count = 2 + cli.config_init.checkpoints.most_files(cli.trainer.max_steps)
    size = checkpoints.file_bytes(cli.model, data)
    cache = sum(p.stat().st_size for p in data.corpus.folder.iterdir())
    print(
        f"Disk space: {count * size / 1e6:,.1f} MB for {count} checkpoints (one more while it is "
        f"written), {cache / 1e6:,.1f} MB for the cached corpus; "
        f"{checkpoints.free_bytes(folder) / 1e6:,.0f} MB are free"
    )
    try:
        cli.check_space(folder)
    except UserError as error:
        print(f"Warning: {error}")


def suggestions(cli: PlanCLI) -> list[Suggestion]:
    """What would better be changed; a run that goes on from a checkpoint keeps its options."""
    steps, config = cli.trainer.max_steps, cli.model.gpt.config
    if cli.checkpoint:
        return []
    found = []
    if steps > 0:
        change = suggest_steps(steps, cli.epochs_a_step)
        better = int(change.options[0].partition("=")[2]) if change else steps
        found += [change, suggest_dropout(config.dropout, better * cli.epochs_a_step)]
    if not cli.model.hparams.init_from:
        tokens = len(cli.datamodule.train_tokens)
        found.append(suggest_model(tokens, config, cli.model.hparams))
    return [suggestion for suggestion in found if suggestion]


def print_suggestions(found: list[Suggestion], shared: SharedLines) -> None:
    if shared.num_shared > MANY_SHARED * shared.num_lines:
        print(
            f"Warning: {shared.num_shared / shared.num_lines:.0%} of the validation lines were "
            "trained on, so the validation loss tells little of new text: remove duplicates"
        )
    for suggestion in found:
        print(f"{suggestion.reason}:  {summary.command(*suggestion.options)}")
    if not found:
        print("Nothing to change")


def duration(seconds: float) -> str:
    """As one says it: 12 ms, 1.5 s, 45 s, 2 min 10 s, 3 h 20 min."""
    if seconds < 1:
        return f"{1e3 * seconds:.3g} ms"
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours:,} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


@rank_zero_only
def print_known(cli: PlanCLI) -> None:
    """What needs no trial."""
    print_text(cli.datamodule)
    print_model(cli)


@rank_zero_only
def print_measured(cli: PlanCLI, started: float) -> None:
    print_costs(cli, started)
    print_disk(cli)
    print_suggestions(suggestions(cli), summary.find_shared_lines(cli.datamodule))
    if cli.config.json:
        steps = cli.trainer.max_steps
        seconds = sum(time_parts(cli, max(0, steps - cli.done), started).values())
        print(json.dumps({"seconds": seconds, "memory_bytes": peak_memory()}))


def main(begin: float, args: list[str] | None = None) -> int:
    """Prints the plan; `begin`: time.perf_counter() when the process began."""
    quieten()
    with ExitStack() as exits:
        # Lightning would go on after Ctrl-C for a while, and call it a failure.
        old = signal.signal(signal.SIGINT, lambda number, frame: sys.exit(128 + number))
        exits.callback(signal.signal, signal.SIGINT, old)
        try:
            cli = PlanCLI(args, exits)
            started = time.perf_counter() - begin - cli.encoding
            print_known(cli)
            cli.trial.run(cli.trainer, cli.model, cli.datamodule)
        except MisconfigurationException as error:
            raise UserError(str(error)) from error
        print_measured(cli, started)
    return 0
