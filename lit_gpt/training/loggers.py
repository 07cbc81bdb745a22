"""A run's loggers: started before it, continued when it resumes, and no reason to end it."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Callable
from contextlib import suppress
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import Namespace
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter

from lit_gpt.command import is_interrupt
from lit_gpt.errors import UserError
from lit_gpt.storage import atomic_write_text
from lit_gpt.training.run_folder import is_rank_zero, run_of_last

if TYPE_CHECKING:
    from lit_gpt.training.train import Run

IDS = "loggers.json"  # in a run's folder: what each of its loggers calls the run
CONTINUED = {  # the argument that takes this id, and those that say where it is one
    "TensorBoardLogger": ("version", ("save_dir", "name")),
    "CSVLogger": ("version", ("save_dir", "name")),
    "WandbLogger": ("version", ("project", "entity")),
    "MLFlowLogger": ("run_id", ("experiment_name", "tracking_uri", "save_dir")),
    "CometLogger": ("experiment_key", ("workspace", "project")),
}
FOLDERS = ("save_dir",)
GUARDED = ("log_metrics", "log_hyperparams", "log_graph", "log_text", "save", "finalize")


class AppendedCSV(ExperimentWriter):
    """Continues metrics.csv up to a step, where Lightning's would delete the file.

    Lightning 2.6.6: docs/lightning-notes.md#private-apis.
    """

    def __init__(self, log_dir: str, step: int) -> None:
        super().__init__(log_dir)
        path = Path(self.metrics_file_path)
        rows = csv.DictReader(io.StringIO(path.read_text(encoding="utf-8")))
        self.metrics_keys = list(rows.fieldnames or [])
        text = io.StringIO()
        kept = csv.DictWriter(text, self.metrics_keys, extrasaction="ignore")
        kept.writeheader()
        for row in rows:
            with suppress(ValueError, TypeError, KeyError):  # half a row
                if int(row["step"]) <= step:
                    kept.writerow(row)
        atomic_write_text(path, text.getvalue())

    def _check_log_dir_exists(self) -> None:
        """Deletes nothing."""


def start_loggers(run: Run) -> None:
    """Connects each logger, so that one that can't be used ends the run before it has begun.

    Raises:
        UserError: which one, and why.
    """
    if run.trainer.fast_dev_run:  # type: ignore[attr-defined]
        return
    for logger in run.trainer.loggers:
        name = type(logger).__name__
        try:
            if isinstance(logger, CSVLogger) and run.checkpoint:
                continue_csv(logger, run.checkpoint.global_step or 0)
            getattr(logger, "experiment", None)
        except Exception as error:
            hint = "leave out `trainer.logger`, or choose another"
            if name == "WandbLogger":
                hint = "run `wandb login`, or set WANDB_MODE=offline to keep the data here"
            raise UserError(f"{name} can't start: {reason_of(error)}", hint=hint) from error
        keep_training(logger, run.model.print)
    save_ids(run)


def continue_csv(logger: CSVLogger, step: int) -> None:
    if is_rank_zero() and Path(logger.log_dir, ExperimentWriter.NAME_METRICS_FILE).is_file():
        logger._experiment = AppendedCSV(logger.log_dir, step)


def keep_training(logger: Logger, say: Callable[[str], None]) -> None:
    """Makes what a logger raises a line of output, once: only a checkpoint is worth ending for."""
    has_said = False

    def guarded(method: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(method)
        def attempt(*args: Any, **kwargs: Any) -> Any:
            nonlocal has_said
            try:
                return method(*args, **kwargs)
            except Exception as error:
                if is_interrupt(error):
                    raise
                if not has_said:
                    has_said = True
                    say(f"{type(logger).__name__} can't log, training goes on: {reason_of(error)}")

        return attempt

    targets: list[tuple[Any, tuple[str, ...]]] = [(logger, GUARDED)]
    if isinstance(logger, TensorBoardLogger):
        targets.append((logger.experiment, ("add_text",)))
    for target, names in targets:
        for name in names:
            if hasattr(target, name):
                setattr(target, name, guarded(getattr(target, name)))


def reason_of(error: BaseException) -> str:
    """One line, without the backquotes that would mark one of our options."""
    lines = str(error).strip().replace("`", "'").splitlines()
    return lines[0] if lines else type(error).__name__


def logger_options(config: Any) -> list[Namespace]:
    """The options of each of the user's loggers, from those of the Trainer."""
    value = config.logger
    found = value if isinstance(value, list) else [value]
    return [options for options in found if isinstance(options, Namespace)]


def name_and_place(options: Namespace) -> tuple[str, dict[str, Any]]:
    """The class of a logger, and the arguments in which its ids are unique."""
    name = options.class_path.rpartition(".")[2]
    given = vars(options.get("dict_kwargs") or Namespace()) if "dict_kwargs" in options else {}
    given = dict(given) | vars(options.get("init_args") or Namespace())
    place = {key: given.get(key) for key in CONTINUED.get(name, ("", ()))[1]}
    for key in place.keys() & FOLDERS:
        place[key] = os.path.abspath(os.path.expanduser(place[key] or "."))
    return name, place


def save_ids(run: Run) -> None:
    """Notes in the run's folder what its loggers call the run."""
    ours = len(run.trainer.loggers) - len(options := logger_options(run.options.config.trainer))
    ids = []
    for logger, its_options in zip(run.trainer.loggers[ours:], options, strict=True):
        name, place = name_and_place(its_options)
        ids.append({"logger": name, "place": place, "id": logger.version})
    if ids and run.trainer.is_global_zero:
        try:
            run.folder.mkdir(parents=True, exist_ok=True)
            atomic_write_text(run.folder / IDS, json.dumps(ids, indent=1, default=str))
        except OSError as error:
            effect = "a resumed run is a new one in its loggers"
            run.model.print(f"Could not write {IDS}, so {effect}: {reason_of(error)}")


def continue_loggers(config: Any, ckpt_path: str | None) -> None:
    """Gives loggers, in the Trainer's options, the ids of the run that they continue.

    Where one is TensorBoard's, the folder of the first is the run's, and must be its own again.
    """
    options = logger_options(config)
    if not options or ckpt_path is None or Path(ckpt_path).name != "last.ckpt":
        return
    folder = Path(os.path.expanduser(ckpt_path)).resolve().parent.parent
    try:
        saved = json.loads((folder / IDS).read_text(encoding="utf-8"))
        ids = [(str(entry["logger"]), entry["place"], entry["id"]) for entry in saved]
    except (OSError, ValueError, TypeError, LookupError):
        return
    found = [next((i for n, p, i in ids if (n, p) == name_and_place(o)), None) for o in options]
    has_own_folder = any(name_and_place(o)[0] == "TensorBoardLogger" for o in options)
    if has_own_folder and found[0] is None:
        return
    if not has_own_folder and run_of_last(ckpt_path, config.default_root_dir or ".") is None:
        return
    for its_options, its_id in zip(options, found, strict=True):
        argument = CONTINUED.get(name_and_place(its_options)[0], ("",))[0]
        if argument and isinstance(its_id, int | str) and not its_options.init_args.get(argument):
            its_options.init_args[argument] = its_id
