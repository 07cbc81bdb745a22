"""The plan command: predicts a run's time, memory and disk space, and suggests changes."""

from __future__ import annotations

import json
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lit_gpt.budget.durations import duration
from lit_gpt.callbacks.checkpoints import base_bytes, file_bytes, free_bytes
from lit_gpt.callbacks.nonfinite import NonFiniteGuard
from lit_gpt.callbacks.progress import Throughput
from lit_gpt.callbacks.stopping import keep_signal_handlers
from lit_gpt.command import seconds_since_start, stop_at_once
from lit_gpt.data import TextDataModule
from lit_gpt.errors import UserError
from lit_gpt.planning.cluster import check_options, make_cluster
from lit_gpt.planning.cluster_text import print_cluster
from lit_gpt.planning.dry_run import DryRun, peak_memory
from lit_gpt.planning.suggestions import Suggestion, suggest_dropout, suggest_model, suggest_steps
from lit_gpt.storage import temporary_folder
from lit_gpt.text.overlap import SharedLines
from lit_gpt.training import summary
from lit_gpt.training.adapters import trained_weights
from lit_gpt.training.options import TrainOptions
from lit_gpt.training.options import option_name as training_option_name
from lit_gpt.training.run_folder import run_of_last
from lit_gpt.training.train import Run, build_run
from lit_gpt.training.warning_filters import silence_warnings

__all__ = ["main", "option_name"]

MANY_SHARED = 0.1  # of the validation lines
CLUSTER_OPTIONS: dict[str, tuple[Any, str]] = {  # types and descriptions; None: not given
    "device_name": (str, "plan for devices of this kind, such as H100, instead of this machine"),
    "devices": (int, "of that kind on each node; none: --trainer.devices"),
    "nodes": (int, "machines that have them; none: --trainer.num_nodes"),
    "price": (float, "of one device for an hour, for the cost"),
    "tokens": (int, "to train on, over all devices; none: what the steps make"),
    "vocab_size": (int, "tokens of the vocabulary; none: read the text and count them"),
}


def option_name(field: str) -> str:
    """As of the training command; `plan.devices` is --devices, `devices` --trainer.devices."""
    is_ours = field.startswith("plan.")
    return f"--{field.removeprefix('plan.')}" if is_ours else training_option_name(field)


class PlanOptions(TrainOptions):
    """The training command's options, those of other devices, and --json."""

    def __init__(self, argv: list[str]) -> None:
        super().__init__(argv, "Predict a run's time, memory and disk space; train nothing.")

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        for name, (kind, text) in CLUSTER_OPTIONS.items():
            parser.add_argument(f"--{name}", type=kind | None, help=text)
        parser.add_argument(
            "--json",
            action="store_true",
            help="end with the predicted numbers as one line of JSON",
        )

    def parse(self, args: list[str]) -> None:
        try:
            super().parse(args)
        except UserError as error:
            if error.field in CLUSTER_OPTIONS:  # not the Trainer's `devices`, nor a model's field
                error.field = f"plan.{error.field}"
            raise
        check_options(self.config)


@dataclass
class Plan:
    """A run, what its dry run measured, and the numbers that follow.

    Args:
        start_up: seconds from the start of the process to the dry run, encoding left out.
    """

    run: Run
    dry_run: DryRun
    start_up: float

    @property
    def epochs_per_step(self) -> float:
        return self.run.epoch.step_windows / self.run.epoch.windows

    @property
    def steps_to_do(self) -> int:
        """Planned steps that the checkpoint, if any, has not done yet."""
        checkpoint = self.run.checkpoint
        done = checkpoint.global_step or 0 if checkpoint else 0
        return max(0, self.run.trainer.max_steps - done)

    def seconds(self) -> dict[str, float]:
        """Seconds of each part of the run, by name."""
        run = self.run
        dry_run = self.dry_run
        steps = self.steps_to_do
        has_evaluations = run.trainer.limit_val_batches != 0
        interval = int(run.trainer.val_check_interval) // run.trainer.accumulate_grad_batches
        saved = -(-steps // interval) if has_evaluations else 0
        evaluations = saved + (has_evaluations and not run.checkpoint)  # one at step 0
        every_n_steps = run.step_checkpoints.every_n_steps
        files = max(1, 2 * saved) + (steps // every_n_steps if every_n_steps else 0)
        evaluation = dry_run.num_eval_batches * dry_run.eval_batch + dry_run.samples
        return {
            "start-up": self.start_up + dry_run.overhead + dry_run.first_steps,
            f"{steps:,} steps": steps * dry_run.step,
            f"{evaluations:,} evaluations": evaluations * evaluation,
            f"{files:,} checkpoints": files * dry_run.save,
            "final evaluation": len(run.final.batches(run.data)) * dry_run.final_batch,
        }


@rank_zero_only
def print_text(data: TextDataModule) -> None:
    for name, value in summary.text_card(data):
        print(f"{name}: {value}")
    if data.vocabulary.is_compact:
        print(f"Full vocabulary: {data.vocabulary.full_size():,} tokens")


@rank_zero_only
def print_model(plan: Plan) -> None:
    gpt = plan.run.model.gpt
    trainer = plan.run.trainer
    outer, blocks = gpt.num_parameters()
    embedding = sum(p.numel() for p in gpt.embedding.parameters())
    pairs = sum(p.numel() for p in gpt.pairs.parameters()) if gpt.pairs else 0
    parts = {"embedding": embedding, "pairs": pairs, "blocks": blocks}
    listed = "".join(f"{name} {count:,}, " for name, count in parts.items() if count)
    head = f"{outer - embedding - pairs:,}" if not gpt.config.tie_embeddings else "the embedding's"
    print(f"Parameters: {outer + blocks:,} ({listed}head {head})")
    if trained := trained_weights(plan.run.model):
        print(f"Trained parameters: {trained}")
    print(f"Tokens per parameter: {len(plan.run.data.train_tokens) / (outer + blocks):.2g}")
    if trainer.max_steps >= 0:
        print(
            f"Epochs: {trainer.max_steps * plan.epochs_per_step:.2f} ({trainer.max_steps:,} steps "
            f"of {plan.run.epoch.step_tokens:,} tokens)"
        )
    print(f"Device: {trainer.strategy.root_device.type}, precision {trainer.precision}")


def print_costs(plan: Plan) -> None:
    trainer = plan.run.trainer
    device = trainer.strategy.root_device
    dry_run = plan.dry_run
    measured = f"measured over {dry_run.steps:,} steps"
    parts = plan.seconds()
    total = sum(parts.values())
    limit = plan.run.stop.timer.time_remaining()
    if trainer.max_steps < 0:
        print(f"Time: {duration(dry_run.step)}/step ({measured}); no number of steps is planned")
    else:
        listed = ", ".join(f"{name} {duration(seconds)}" for name, seconds in parts.items())
        print(f"Time: about {duration(total)} on this machine ({measured})")
        print(f"Parts of the time: {listed}")
    if limit is not None and (trainer.max_steps < 0 or limit < total - parts["start-up"]):
        print(f"Stops earlier: --trainer.max_time ends training after {duration(limit)}")
    if memory := peak_memory():
        total_memory = psutil.virtual_memory().total
        print(f"Memory: about {memory / 1e6:,.0f} MB of {total_memory / 1e6:,.0f} MB")
    if device.type == "cuda":
        memory = torch.cuda.max_memory_allocated(device)
        print(f"GPU memory: about {memory / 1e6:,.0f} MB")


def print_disk(run: Run) -> None:
    config = run.options.config
    root = config.trainer.default_root_dir or "."
    folder = Path(root, run_of_last(config.ckpt_path, root) or "version_N", "checkpoints")
    count = 2 + run.step_checkpoints.most_files(run.trainer.max_steps)
    total = count * file_bytes(run.model, run.data) + base_bytes(run.model)
    splits = run.data.splits
    folders = {splits.corpus.folder, splits.val_corpus.folder}
    cache = sum(path.stat().st_size for folder in folders for path in folder.iterdir())
    print(
        f"Disk space: {total / 1e6:,.1f} MB for {count} checkpoints (one more while it is "
        f"written), {cache / 1e6:,.1f} MB for the cached corpus; "
        f"{free_bytes(folder) / 1e6:,.0f} MB are free"
    )
    try:
        run.check_space(folder)
    except UserError as error:
        print(f"Warning: {error.render(option_name)}")


def suggestions(plan: Plan) -> list[Suggestion]:
    """Changes that would help; none for a resumed run, which must keep its options, or a budget."""
    run = plan.run
    if run.checkpoint or run.options.choice:
        return []
    steps = run.trainer.max_steps
    config = run.model.gpt.config
    found: list[Suggestion | None] = []
    if steps > 0:
        change = suggest_steps(steps, plan.epochs_per_step)
        better_steps = int(change.options[0].partition("=")[2]) if change else steps
        found.append(change)
        found.append(suggest_dropout(config.dropout, better_steps * plan.epochs_per_step))
    if not run.model.hparams.init_from:
        found.append(suggest_model(len(run.data.train_tokens), config, run.model.hparams))
    return [suggestion for suggestion in found if suggestion]


def print_suggestions(found: list[Suggestion], shared: SharedLines) -> None:
    if shared.num_shared > MANY_SHARED * shared.num_lines:
        print(
            f"Warning: {shared.num_shared / shared.num_lines:.0%} of the validation lines are in "
            "the training text too, so the validation loss says little about new text: remove "
            "duplicates"
        )
    for suggestion in found:
        print(f"{suggestion.reason}:  {' '.join(suggestion.options)}")
    if not found:
        print("Nothing to change")


@rank_zero_only
def print_measured(plan: Plan) -> None:
    print_costs(plan)
    print_disk(plan.run)
    print_suggestions(suggestions(plan), summary.find_shared_lines(plan.run.data))
    if plan.run.options.config.json:
        seconds = sum(plan.seconds().values())
        numbers = {"seconds": seconds, "memory_bytes": peak_memory()}
        print(json.dumps(numbers | summary.choice_numbers(plan.run.options)))


def make_plan(options: TrainOptions, exits: ExitStack) -> Plan:
    """Builds the run with a dry run in a temporary folder, which goes with `exits`."""
    refuse_dry_run(options)
    start = time.perf_counter()
    data = options.build_data(TextDataModule, **options.config.data.as_dict())
    folder_of_cache = data.corpus.folder.parent  # encodes the text, which the run will then find
    encoding = time.perf_counter() - start
    try:  # beside the cached corpus: if this process is killed, the next encoding removes it
        folder = exits.enter_context(temporary_folder(folder_of_cache))
    except OSError:  # that disk is full or read-only
        folder = exits.enter_context(temporary_folder(Path(tempfile.gettempdir())))
    dry_run = DryRun(folder)
    run = build_run(options, [NonFiniteGuard(), Throughput(), dry_run], scratch=folder)
    keep_signal_handlers(run.trainer)
    return Plan(run, dry_run, seconds_since_start() - encoding)


def refuse_dry_run(options: TrainOptions) -> None:
    if options.config.trainer.fast_dev_run:
        raise UserError("is not a run to plan", field="fast_dev_run", hint="leave it out")


def plan_elsewhere(options: TrainOptions) -> None:
    """Prints the plan for other devices; reads the text only for what was not given."""
    refuse_dry_run(options)
    config = options.config
    data = None
    if config.vocab_size is None:
        data = options.build_data(TextDataModule, **config.data.as_dict())
        print_text(data)
    train_tokens = len(data.train_tokens) if data else None
    vocab_size = data.vocab_size if data else config.vocab_size
    cluster = make_cluster(config, vocab_size, train_tokens)
    print_cluster(cluster)
    if config.json:
        print(json.dumps(cluster.numbers()))


def main(argv: list[str]) -> int:
    """Prints the plan."""
    silence_warnings()
    # Lightning would continue after Ctrl-C for a while, and call it a failure.
    with stop_at_once(), ExitStack() as exits:
        try:
            options = PlanOptions(argv)
            if options.config.device_name is not None:
                plan_elsewhere(options)
                return 0
            summary.print_choice(options)
            plan = make_plan(options, exits)
            print_text(plan.run.data)
            print_model(plan)
            plan.dry_run.measure(plan.run)
        except MisconfigurationException as error:
            raise UserError(str(error)) from error
        print_measured(plan)
    return 0
