"""Which checkpoint a run continues, and whether its options fit it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jsonargparse

from lit_gpt.checkpoint import REST, RESUME_KEYS, SHARDED_KEYS, Checkpoint, is_sharded
from lit_gpt.command import as_user_error
from lit_gpt.data import TextDataModule
from lit_gpt.distributed import fsdp2
from lit_gpt.distributed.sharded_files import restore_all
from lit_gpt.errors import UserError
from lit_gpt.generation.language_model import named_checkpoint
from lit_gpt.model import GPTConfig
from lit_gpt.module import LitGPT, is_plan
from lit_gpt.optim import EPS
from lit_gpt.optimizer_state import fits
from lit_gpt.training import adapters, slurm, summary
from lit_gpt.training.changes import windows_seen_before
from lit_gpt.training.epochs import check_epochs_left
from lit_gpt.training.init_from import adopt_model
from lit_gpt.training.restored_state import check_restored_state

if TYPE_CHECKING:
    from lit_gpt.training.options import TrainOptions
    from lit_gpt.training.train import Run

TABLES = {"table_rate": 1.0, "table_eps": EPS}  # of checkpoints before these options


def resolve_checkpoint(options: TrainOptions) -> Checkpoint | None:
    """Opens the checkpoint to continue and makes `options.config` agree with it, or `init_from`.

    Raises:
        UserError: there is none, it can't be continued, or options contradict it.
        SystemExit: SLURM requeued a job that is done.
    """
    config = options.config
    root = config.trainer.default_root_dir or "."
    if config.ckpt_path is not None or slurm.job_id():
        restore_all(root)
    requeued = slurm.checkpoint_of_job(root, options.argv)
    if requeued:
        config["ckpt_path"] = str(requeued)
    elif config.ckpt_path is not None:
        config["ckpt_path"] = str(named_checkpoint(config.ckpt_path, root, ("last",)))
    if config.model.init_from is not None:
        adopt_model(options, config.ckpt_path or config.model.init_from)
    if config.ckpt_path is None:
        return None
    checkpoint = open_checkpoint(config.ckpt_path)
    adopt_horizons(config, checkpoint)
    if requeued:
        max_steps = config.trainer.max_steps
        summary.print_requeued(requeued, checkpoint.global_step or 0, max_steps)
        is_over = 0 <= max_steps <= (checkpoint.global_step or 0)
        if is_over or 0 < config.early_stopping.patience <= evaluations_waited(checkpoint):
            raise SystemExit(0)
    return checkpoint


def open_checkpoint(path: str) -> Checkpoint:
    """Reads all but the tensors of a checkpoint that can be continued.

    Raises:
        UserError: its parts don't fit together.
    """
    if is_sharded(path):  # shapes are compared as the tensors are read
        folder = Path(path).expanduser()
        return replace(Checkpoint.read(folder / REST, SHARDED_KEYS), path=folder).without_tensors()
    checkpoint = Checkpoint.read(path, RESUME_KEYS)
    model, _ = checkpoint.build(merge=False)
    try:
        trained = (part for part in model.named_parameters() if part[1].requires_grad)
        shapes = {f"gpt.{name}": weight.shape for name, weight in trained}
        is_fitting = fits(checkpoint.optimizer_state, shapes)
        is_fitting |= checkpoint.global_step == checkpoint.skipped_steps  # no update made yet
    except Exception:  # a malformed optimizer state can raise anything
        is_fitting = False
    if not is_fitting:
        raise UserError(
            f"{path} has no optimizer state that fits its weights, so it can't be continued",
            hint=f"start a new run from its weights with `init_from`={path}",
        )
    return checkpoint.without_tensors()


def adopt_horizons(config: jsonargparse.Namespace, checkpoint: Checkpoint) -> None:
    """Sets the steps that a run was planned for on its way, as its checkpoint has them.

    The options may be those it began with. Another max_steps is the user's: then the schedule is
    that of an ordinary run. Horizons that contradict the checkpoint's stay, to be reported.
    """
    saved = checkpoint.hyperparameters.get("horizons")
    if saved is None or not is_plan(saved):
        return
    saved = [list(pair) for pair in saved]
    given = [list(pair) for pair in config.model.horizons or []]
    if config.trainer.max_steps not in {last for _, last in saved + given}:
        config.model.horizons = None
    elif given == saved[: len(given)]:
        config.model.horizons = saved
        config.trainer.max_steps = saved[-1][1]


def check_resume(run: Run, checkpoint: Checkpoint) -> None:
    """Refuses to continue a run that is over, or whose options differ in what must not.

    Raises:
        UserError: why.
        SystemExit: SLURM requeued a job that is done.
    """
    if is_sharded(checkpoint.path) and run.options.config.trainer.strategy != fsdp2.NAME:
        raise UserError(
            f"{checkpoint.path} is a sharded checkpoint, which only fsdp2 continues",
            hint=f"use `strategy` fsdp2, or one file: lit-gpt consolidate {checkpoint.path}",
        )
    check_restored_state(checkpoint, run.trainer)
    if (seen := windows_seen_before(run)) is not None:
        run.data.load_state_dict({"windows_seen": seen})
    check_epochs_left(run.options, run.epoch, checkpoint)
    check_fit(checkpoint, run.trainer.max_steps, run.model, run.data)
    check_patience(checkpoint, run.early.patience)


def fit(run: Run) -> None:
    path = run.options.config.ckpt_path
    try:
        run.trainer.fit(run.model, datamodule=run.data, ckpt_path=path, weights_only=True)
    except Exception as error:
        if not run.checkpoint or isinstance(error, OSError) or as_user_error(error):
            raise
        if run.trainer.global_step - (run.checkpoint.global_step or 0) > 1:
            raise
        # The first step uses what Lightning restored.
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{path} can't be continued, its parts don't fit: {reason}") from error


def check_patience(checkpoint: Checkpoint, patience: int) -> None:
    """Refuses to continue a run that stopped early, unless it may wait longer now."""
    if 0 < patience <= (waited := evaluations_waited(checkpoint)):
        raise UserError(
            f"must be above {waited}: {checkpoint.path} stopped early, after {waited} evaluations "
            "without a lower validation loss",
            field="early_stopping.patience",
            value=patience,
            hint="raise it, or set it to 0 to train until `max_steps`",
        )


def evaluations_waited(checkpoint: Checkpoint) -> int:
    """After how many evaluations without an improvement the run stopped early; 0: it didn't."""
    state = checkpoint.callback_states.get("EarlyStopping")
    state = state if isinstance(state, dict) else {}
    waited, patience = state.get("wait_count"), state.get("patience")
    if not isinstance(waited, int) or not isinstance(patience, int):
        return 0
    return waited if 0 < patience <= waited else 0


def validation_fingerprint(text_info: dict[str, Any]) -> Any:
    """That of a validation text of its own; None if there is none."""
    info = text_info.get("validation")
    return info.get("fingerprint") if isinstance(info, dict) else None


def with_loss(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a text, with what `loss_on` is for rows of messages where it isn't given."""
    default = "answers" if options.get("text_field") is None else None
    return {**options, "loss_on": options.get("loss_on") or default}


def check_fit(checkpoint: Checkpoint, max_steps: int, model: LitGPT, data: TextDataModule) -> None:
    """Refuses to continue a checkpoint of another model, optimizer, tokenizer, text or split."""
    path = checkpoint.path
    step = checkpoint.global_step or 0
    if 0 <= max_steps <= step:
        problem = f"must be above {step}, the step of {path}"
        raise UserError(problem, field="max_steps", value=max_steps)
    model_fields = [f.name for f in fields(GPTConfig) if f.name not in ("dropout", "style")]
    optimizer_fields = ["optimizer", "learning_rate", "weight_decay", "betas", *TABLES]
    data_fields = ["encoding", "text_field"]
    if data.hparams.val_path is None:
        data_fields = ["train_fraction", *data_fields]
    splits = data.splits
    is_chat = splits.train_flags is not None or splits.val_flags is not None
    if is_chat or data.hparams.text_field is not None:
        data_fields = ["loss_on", *data_fields]
    same_tokens = checkpoint.has_tokenizer(data.tokenizer)
    if not same_tokens:
        data_fields = ["tokenizer", "compact_vocab", *data_fields]
    compared = (
        (model_fields, asdict(checkpoint.gpt_config), asdict(model.gpt.config)),
        (optimizer_fields, TABLES | checkpoint.hyperparameters, model.hparams),
        ([*adapters.DEFAULTS], adapters.DEFAULTS | checkpoint.hyperparameters, model.hparams),
        (data_fields, with_loss(checkpoint.data_hyperparameters), with_loss(data.hparams)),
    )
    differences = [
        f"{name} was {saved.get(name)} and is now {given[name]}"
        for names, saved, given in compared
        for name in names
        if saved.get(name) != given[name]
    ]
    now = splits.info
    then = checkpoint.corpus_info
    if then.get("fingerprint") != now["fingerprint"]:
        differences.append(f"the text of {data.hparams.path} is not the one it was trained on")
    elif validation_fingerprint(then) != validation_fingerprint(now):
        where = data.hparams.val_path or data.hparams.path
        differences.append(f"the text of {where} is not the one it was validated on")
    elif not same_tokens and not differences:
        differences.append("the tokenizer's vocabulary differs")
    if differences:
        config = path.parent.parent / "config.yaml"
        options = f"`config` {config}" if config.is_file() else "the options of that run"
        raise UserError(
            f"{path} does not fit the options: {', '.join(differences)}",
            hint=f"continue it with {options}, or start a new run from its weights with "
            f"`init_from`={path}",
        )
