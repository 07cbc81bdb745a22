"""Owns the training command: options, their links and defaults, where a run goes, exit status."""

from __future__ import annotations

import logging
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.cli import LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lit_gpt.callbacks import checkpoints, evaluation
from lit_gpt.callbacks.nonfinite import NonFiniteGuard
from lit_gpt.callbacks.progress import ProgressBar, Throughput
from lit_gpt.callbacks.report_writer import ReportWriter
from lit_gpt.callbacks.samples import Samples
from lit_gpt.callbacks.stopping import GracefulStop
from lit_gpt.checkpoint import Checkpoint, newest_checkpoint
from lit_gpt.data import TextDataModule
from lit_gpt.errors import UserError
from lit_gpt.module import LitGPT
from lit_gpt.training import slurm, summary
from lit_gpt.training.init_from import adopt_model, load_weights, set_tokenizer
from lit_gpt.training.options import Parser
from lit_gpt.training.resume import check_fit, open_checkpoint
from lit_gpt.training.run_folder import RunLogger, claim_run, keep_others_out, run_of_last

TRAINER_DEFAULTS: dict[str, Any] = {
    "max_steps": 500,
    "val_check_interval": 50,
    "check_val_every_n_epoch": None,  # steps, not epochs, are what is counted
    "limit_val_batches": 10,
    "num_sanity_val_steps": 0,  # the evaluation at step 0 serves
    "log_every_n_steps": 10,
    "devices": 1,
    "inference_mode": False,  # metrics of the evaluation at step 0 live on in the fit
    "default_root_dir": "logs",
    "enable_model_summary": False,  # its FLOPs are 0; we print our own line
}


class SaveConfig(SaveConfigCallback):
    """config.yaml in the run's folder, without what only the command itself was to do."""

    def __init__(self, parser: Parser, config: Any, **kwargs: Any) -> None:
        config = config.clone()
        config["ckpt_path"] = None
        config["find_lr"] = False
        super().__init__(parser, config, **kwargs)


class TrainingCLI(LightningCLI):
    """`python scripts/train.py`: LightningCLI without subcommands, and our defaults."""

    def __init__(self, args: list[str] | None = None) -> None:
        self.checkpoint: Checkpoint | None = None
        self.words = sys.argv[1:] if args is None else list(args)  # as SLURM starts them anew
        super().__init__(
            LitGPT,
            TextDataModule,
            save_config_callback=SaveConfig,
            save_config_kwargs={"overwrite": True},  # only a continued run finds one
            trainer_defaults=TRAINER_DEFAULTS,
            seed_everything_default=1337,
            parser_class=Parser,
            args=args,
            run=False,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )

    def add_arguments_to_parser(self, parser: Parser) -> None:
        parser.add_argument(
            "--ckpt_path",
            type=str | None,
            default=None,
            help="Checkpoint to continue, or `last` for the newest run's; none: start afresh.",
        )
        parser.add_argument(
            "--find_lr",
            action="store_true",
            help="Don't train: try rising learning rates, suggest one and plot the losses.",
        )
        parser.add_lightning_class_args(Samples, "samples")
        parser.add_lightning_class_args(evaluation.StepLines, "overfit")
        parser.add_lightning_class_args(checkpoints.StepCheckpoints, "checkpoints")
        parser.link_arguments(
            "data", "model.vocab_size", compute_fn=set_tokenizer, apply_on="instantiate"
        )
        parser.link_arguments("data.context_length", "model.context_length")
        parser.link_arguments("seed_everything", "data.seed", compute_fn=int)
        parser.link_arguments("seed_everything", "model.seed", compute_fn=int)

    def parse_arguments(self, parser: Parser, args: list[str] | None) -> None:
        super().parse_arguments(parser, args)
        seed, accumulate = self.config.seed_everything, self.config.trainer.accumulate_grad_batches
        if isinstance(seed, bool) or not 0 <= seed < 2**32:
            raise UserError(f"--seed_everything must be 0 or more and below 2**32, not {seed}")
        if accumulate < 1:
            raise UserError(
                f"--trainer.accumulate_grad_batches must be at least 1, not {accumulate}"
            )

    def before_instantiate_classes(self) -> None:
        root = self.config.trainer.default_root_dir or "."
        requeued = slurm.checkpoint_of_job(root, self.words)
        if requeued:
            self.config["ckpt_path"] = str(requeued)
        elif self.config.ckpt_path == "last":
            path = newest_checkpoint(root, "last")
            if path is None:
                raise UserError(
                    f"--ckpt_path last: no run below {root!r} has a last.ckpt: start one without "
                    "--ckpt_path, or give the path of a checkpoint"
                )
            self.config["ckpt_path"] = str(path)
        path = self.config.ckpt_path
        if self.config.model.init_from is not None:
            defaults = self.parser.get_defaults()
            probe = self.parser.parse_args(["--data.context_length=1", *self.words])
            if probe.data.context_length != 1:  # given later, be it the default
                defaults.data.context_length = None
            adopt_model(self.config, defaults, path or self.config.model.init_from)
        if path is not None:
            self.checkpoint = open_checkpoint(path)
        if requeued:
            step, planned = self.checkpoint.global_step, self.config.trainer.max_steps
            summary.print_requeued(requeued, step, planned)
            if 0 <= planned <= step:
                raise SystemExit(0)

    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except ValueError as error:
            root: BaseException = error
            while root.__cause__:
                root = root.__cause__
            if isinstance(root, ModuleNotFoundError):  # an optional package, such as wandb
                raise UserError(str(root)) from error
            raise

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        config = self.config_init.trainer
        interval = config.val_check_interval
        if not isinstance(interval, int) or interval < 1:
            raise UserError(
                f"--trainer.val_check_interval is a number of steps, at least 1, not {interval}; "
                "to evaluate only at the end give it --trainer.max_steps"
            )
        # Lightning's interval counts batches; ours counts steps, as everything else here.
        kwargs["val_check_interval"] = interval * config.accumulate_grad_batches
        if config.precision is None:
            kwargs["precision"] = default_precision(config.accelerator)
        self.stop = GracefulStop(config.max_time)
        kwargs["max_time"] = None  # Lightning's own would stop inside a step
        throughput, final = Throughput(), evaluation.FinalEvaluation(self.stop)
        words = summary.command("python", sys.argv[0], *self.words)
        self.report = ReportWriter(words, self.config_init.samples, final)
        kwargs["callbacks"] = [
            *as_list(config.callbacks),
            NonFiniteGuard(),
            throughput,
            self.stop,
            self.report,
            checkpoints.BestCheckpoint(),  # before the last one, which keeps the best score
            checkpoints.LastCheckpoint(self.stop),
            final,
            *([] if config.enable_progress_bar is False else [ProgressBar(throughput)]),
            *([slurm.JobNote(self.words)] if slurm.job_id() else []),
        ]
        kwargs["plugins"] = [*as_list(config.plugins), checkpoints.CheckpointIO(self.stop)]
        try:
            return super().instantiate_trainer(**kwargs, **self.place_of_run())
        except (ValueError, TypeError) as error:  # what the Trainer says of options it can't use
            raise UserError(str(error)) from error

    def place_of_run(self) -> dict[str, Any]:
        """Trainer arguments that give the run a folder of its own, whatever else logs it."""
        config = self.config_init.trainer
        root = config.default_root_dir or "."
        version = run_of_last(self.config.ckpt_path, root)
        loggers = as_list(config.logger)
        if config.logger is False:
            version = version or (claim_run(Path(root)) if rank_zero_only.rank == 0 else "rank")
            return {"default_root_dir": str(Path(root) / version)}
        # Lightning would load an hpc_ckpt_N.ckpt that it once saved here, of whichever run.
        place = {"default_root_dir": str(Path(root) / "requeued")} if slurm.job_id() else {}
        if any(isinstance(logger, TensorBoardLogger) for logger in loggers):
            return place  # the user's own; its folder is the run's
        ours = RunLogger(root, name="", version=version, default_hp_metric=False)
        return {**place, "logger": [ours, *loggers]}

    def after_instantiate_classes(self) -> None:
        if self.checkpoint:
            check_fit(
                self.config.ckpt_path,
                self.checkpoint,
                self.trainer.max_steps,
                self.model,
                self.datamodule,
            )
        elif init_from := self.model.hparams.init_from:
            load_weights(self.model.gpt, init_from)

    def fit(self) -> None:
        path, data = self.config.ckpt_path, self.datamodule
        try:
            self.trainer.fit(self.model, datamodule=data, ckpt_path=path, weights_only=True)
        except Exception as error:
            if not self.checkpoint or isinstance(error, UserError):
                raise
            if self.trainer.global_step - self.checkpoint.global_step > 1:
                raise
            raise UserError(  # in what Lightning restores, which the first step uses
                f"{path} can't be continued, its parts don't fit: {type(error).__name__}: {error}"
            ) from error

    def check_space(self, folder: Path) -> None:
        by_steps = self.config_init.checkpoints.most_files(self.trainer.max_steps)
        if not self.trainer.fast_dev_run:
            checkpoints.check_space(folder, self.model, self.datamodule, 2 + by_steps)

    def run(self) -> int:
        """Trains, evaluates and prints; returns the exit status."""
        if self.config.find_lr:
            from lit_gpt.training.lr_finder import find_learning_rate

            find_learning_rate(self.trainer, self.model, self.datamodule, self.checkpoint)
            return 0
        trainer, model, data = self.trainer, self.model, self.datamodule
        folder = Path(trainer.log_dir or trainer.default_root_dir)
        self.check_space(folder / "checkpoints")
        self.report.card = summary.print_start(trainer, model, data, self.checkpoint)
        self.stop.signals += slurm.requeue_signals(trainer)
        with keep_others_out(folder), self.stop:
            if not self.checkpoint and trainer.limit_val_batches != 0:
                trainer.validate(model, datamodule=data, verbose=False)
            self.fit()
        summary.print_end(trainer, data)
        unfinished = trainer.global_step < trainer.max_steps or trainer.max_steps < 0
        if self.stop.reason in slurm.requeue_signals(trainer) and unfinished:
            slurm.requeue()
        return self.stop.status if trainer.is_global_zero else 0


def default_precision(accelerator: str) -> str:
    """bf16-mixed on an NVIDIA card that computes in bfloat16, else 32-true, there with TF32."""
    if accelerator not in ("auto", "gpu", "cuda") or not torch.cuda.is_available():
        return "32-true"
    torch.set_float32_matmul_precision("high")
    return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "32-true"


def as_list(value: Any) -> list[Any]:
    if value is None or isinstance(value, bool):
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def quieten() -> None:
    """Silences, by their exact source, messages that would tell a user nothing."""
    for name in (
        "pytorch.utilities.rank_zero",
        "fabric.utilities.seed",
        "pytorch.tuner.lr_finder",
        "pytorch.trainer.connectors.checkpoint_connector",
    ):
        logging.getLogger(f"lightning.{name}").setLevel(logging.WARNING)
    for message in (
        "LightningCLI's args parameter",  # from Python, as the benchmarks do
        ".*LeafSpec.*",  # torch 2.13 and Lightning's use of its pytrees
        "Checkpoint directory .* exists and is not empty",  # at each continued run
        ".*`weights_only` was not set.*",  # said on saving, where it means nothing
        "It is recommended to use .*sync_dist",  # torchmetrics have done so
        "You defined a `validation_step` but have no",  # --find_lr evaluates nothing
        "The dirpath has changed from",  # a new run from another run's checkpoint
    ):
        warnings.filterwarnings("ignore", message)


def main(args: list[str] | None = None) -> int:
    quieten()
    try:
        return TrainingCLI(args).run()
    except MisconfigurationException as error:
        raise UserError(str(error)) from error
