"""The training command: `build_run` puts a run together, `train` runs it.

Who decides when a run stops: callbacks/stopping.py. What it prints: training/summary.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lit_gpt.callbacks.budget_clock import BudgetClock
from lit_gpt.callbacks.checkpoints import (
    BestCheckpoint,
    CheckpointIO,
    LastCheckpoint,
    StepCheckpoints,
    check_space,
)
from lit_gpt.callbacks.early_stopping import EarlyStop
from lit_gpt.callbacks.evaluation import EvaluationPrinter, FinalEvaluation
from lit_gpt.callbacks.nonfinite import NonFiniteGuard
from lit_gpt.callbacks.profiling import Profile
from lit_gpt.callbacks.progress import ProgressBar, Throughput
from lit_gpt.callbacks.report_writer import ReportWriter
from lit_gpt.callbacks.samples import Samples
from lit_gpt.callbacks.stopping import GracefulStop
from lit_gpt.checkpoint import Checkpoint
from lit_gpt.data import TextDataModule
from lit_gpt.distributed.launch import command_line, lost_process, status_of
from lit_gpt.errors import UserError
from lit_gpt.module import LitGPT
from lit_gpt.training import adapters, run_folder, slurm, summary
from lit_gpt.training.epochs import Epoch, check_horizons, epoch_of
from lit_gpt.training.init_from import load_weights
from lit_gpt.training.loggers import start_loggers
from lit_gpt.training.options import SaveConfig, TrainOptions, option_name
from lit_gpt.training.restored_state import OptimizerStateCheck
from lit_gpt.training.resume import check_resume, fit
from lit_gpt.training.run_folder import as_list
from lit_gpt.training.trainer_options import build_trainer, save_shards
from lit_gpt.training.warning_filters import silence_warnings

__all__ = ["Run", "build_run", "main", "option_name", "train"]


@dataclass(frozen=True)
class Run:
    """A run that is ready to start, and what takes part in it."""

    options: TrainOptions
    trainer: pl.Trainer
    model: LitGPT
    data: TextDataModule
    checkpoint: Checkpoint | None  # the one it continues
    config: SaveConfig
    guard: NonFiniteGuard
    throughput: Throughput
    stop: GracefulStop
    samples: Samples
    printer: EvaluationPrinter
    early: EarlyStop
    report: ReportWriter
    best: BestCheckpoint
    last: LastCheckpoint
    final: FinalEvaluation
    step_checkpoints: StepCheckpoints

    @property
    def folder(self) -> Path:
        return Path(self.trainer.log_dir or self.trainer.default_root_dir)

    @property
    def epoch(self) -> Epoch:
        """One pass over what the run trains on."""
        return epoch_of(self.trainer, self.data)

    def check_space(self, folder: Path) -> None:
        """Checks that the disk has room for the run's checkpoints in `folder`."""
        num_files = 2 + self.step_checkpoints.most_files(self.trainer.max_steps)
        check_space(folder, self.model, self.data, num_files)


def build_run(
    args: list[str] | TrainOptions, callbacks: Sequence[Callback] = (), scratch: Path | None = None
) -> Run:
    """Builds trainer, model, data and callbacks from the options of the training command.

    Args:
        args: the command line, or its options once they are parsed.
        callbacks: further ones.
        scratch: makes it a dry run, which writes nothing outside this folder: `callbacks` are
            then its only ones, so that nothing is saved or shown.

    Raises:
        UserError: options that can't be used, or don't fit the text or the checkpoint.
    """
    options = args if isinstance(args, TrainOptions) else TrainOptions(args)
    checkpoint = options.checkpoint
    objects = options.instantiate()
    model: LitGPT = objects.model
    data: TextDataModule = objects.data
    stop = GracefulStop(objects.trainer.max_time)
    final: FinalEvaluation = objects.final
    final.stop = stop
    # Lightning moves checkpoint callbacks to the end and keeps their order: the report comes first,
    # as checkpoints continue what it has, and the best before the last, which keeps its score.
    ours: dict[str, Any] = {
        "guard": NonFiniteGuard(),
        "throughput": Throughput(),
        "stop": stop,
        "samples": objects.samples,
        "printer": objects.overfit,
        "early": objects.early_stopping,
        "report": ReportWriter(command_line("train", *options.argv), objects.samples, final),
        "best": BestCheckpoint(),
        "last": LastCheckpoint(stop),
        "final": final,
        "step_checkpoints": objects.checkpoints,
    }
    more: list[Callback] = []
    if objects.trainer.enable_progress_bar is not False:
        more.append(ProgressBar(ours["throughput"]))
    if checkpoint:
        more.append(OptimizerStateCheck(checkpoint.path))
    if slurm.job_id():
        more.append(slurm.SlurmJobMarker(options.argv))
    if options.budget is not None:
        plan = options.choice.plan if options.choice else None
        useful, window = (plan.useful_steps, plan.window) if plan else (None, 0.0)
        more.append(BudgetClock(options.budget, useful, window=window))
    profile = Profile() if options.config.profile else None
    if profile:
        more.append(profile)
    config = SaveConfig(options.parser, options.config)
    if not objects.trainer.fast_dev_run:
        more.append(config)
    if scratch is None:
        arguments = run_folder.run_folder_arguments(objects.trainer, options.config.ckpt_path)
        theirs = as_list(objects.trainer.callbacks)
        arguments["callbacks"] = [*theirs, *ours.values(), *more, *callbacks]
        if profile:
            arguments["profiler"] = profile.actions
    else:
        model.base = "scratch"  # what is saved there is never loaded by another process
        arguments = run_folder.scratch_arguments(objects.trainer, scratch) | {
            "callbacks": [*callbacks]
        }
    arguments["plugins"] = [*as_list(objects.trainer.plugins), CheckpointIO(stop)]
    trainer = build_trainer(vars(objects.trainer) | arguments, data)
    save_shards(trainer, objects.checkpoints.sharded)
    adapters.check_sharded(model, objects.checkpoints.sharded)
    if not objects.trainer.fast_dev_run:
        check_horizons(trainer, model.hparams.horizons)
    run = Run(options, trainer, model, data, checkpoint, config, **ours)
    if checkpoint:
        check_resume(run, checkpoint)
        adapters.restore_base(model, checkpoint)
    elif model.hparams.init_from:
        load_weights(model.gpt, model.hparams.init_from)
    return run


def train(run: Run) -> int:
    """Trains, evaluates and prints; returns the exit status."""
    trainer = run.trainer
    if not trainer.fast_dev_run:  # type: ignore[attr-defined]
        run.check_space(run.folder / "checkpoints")
    run.report.card = summary.print_start(run) or []  # None on the other ranks
    run.stop.signals += slurm.requeue_signals(trainer)
    with run_folder.lock_run_folder(run.folder):
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            adapters.keep_base(run)
        start_loggers(run)  # here, where Ctrl-C ends the process
        with run.stop:
            if not run.checkpoint and trainer.limit_val_batches != 0:
                trainer.validate(run.model, datamodule=run.data, verbose=False)  # at step 0
            fit(run)
    summary.print_end(run)
    is_unfinished = trainer.global_step < trainer.max_steps or trainer.max_steps < 0
    if run.stop.reason in slurm.requeue_signals(trainer) and is_unfinished:
        slurm.requeue()
    return status_of(run.stop.status, trainer.is_global_zero)


def main(argv: list[str]) -> int:
    silence_warnings()
    options = TrainOptions(argv)
    summary.print_choice(options)
    try:
        if options.config.find_lr:
            from lit_gpt.training.lr_finder import find_learning_rate  # loads Lightning's Tuner

            find_learning_rate(options)
            return 0
        return train(build_run(options))
    except MisconfigurationException as error:
        raise UserError(str(error)) from error
    except RuntimeError as error:
        if lost := lost_process(error):
            raise lost from error
        raise
