"""The folder of a run: logs/version_N, its TensorBoard events, and who writes in it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from torch.utils.tensorboard.summary import hparams

from lit_gpt.errors import UserError
from lit_gpt.storage import locked, remove_unfinished
from lit_gpt.training import slurm


class RunLogger(TensorBoardLogger):
    """TensorBoard events in ROOT/version_N, a new N for each run, even of two started at once."""

    @property
    def version(self) -> str:
        if self._version is None:
            self._version = claim_run(Path(self.root_dir))
        return str(self._version)

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        super().log_hyperparams(params, *args, **kwargs)  # hparams.yaml
        plain = {k: v if isinstance(v, bool | int | float) else str(v) for k, v in params.items()}
        # Names the curve that TensorBoard's table shows; Lightning would add a point to it.
        for summary in hparams(plain, {"val/loss": 0.0}):
            self.experiment._get_file_writer().add_summary(summary)  # as Lightning does it


def is_rank_zero() -> bool:
    return getattr(rank_zero_only, "rank", 0) == 0


def claim_run(root: Path) -> str:
    """Makes the next folder version_N below root; two processes never get the same one."""
    if not is_rank_zero():
        return "rank"  # never used: nothing but the first rank writes
    taken = [p.name.removeprefix("version_") for p in root.glob("version_*")]
    n = 1 + max((int(t) for t in taken if t.isdecimal()), default=-1)
    while True:
        try:
            (root / f"version_{n}").mkdir(parents=True)
            return f"version_{n}"
        except FileExistsError:
            n += 1
        except OSError as error:
            raise UserError(
                f"cannot make a folder for the run in {root}: {error.strerror}",
                hint="name another place with `default_root_dir`",
            ) from error


@contextmanager
def lock_run_folder(folder: Path) -> Iterator[None]:
    """Locks a run's folder, and removes what a killed process left half-written there.

    The lock ends with the process, however that ends. On file systems without locks there is none.

    Raises:
        UserError: another process trains in it.
    """
    if not is_rank_zero():
        yield
        return
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    with locked(folder, hint="wait until it ends, or start a new run without `ckpt_path`"):
        remove_unfinished(folder)
        remove_unfinished(folder / "checkpoints")
        yield


def run_of_last(ckpt_path: str | None, root: str) -> str | None:
    """The name of a run's folder below root where `ckpt_path` is its last.ckpt: it continues there.

    Any other checkpoint starts a new run, so that nothing saved after it is overwritten.
    """
    if ckpt_path is None or Path(ckpt_path).name != "last.ckpt":
        return None
    run = Path(os.path.expanduser(ckpt_path)).resolve().parent.parent
    return run.name if run.parent == Path(os.path.expanduser(root)).resolve() else None


def run_folder_arguments(config: Any, ckpt_path: str | None) -> dict[str, Any]:
    """Arguments for the Trainer that give a run a folder of its own, whatever else logs it.

    Args:
        config: the Trainer's options, loggers instantiated.
        ckpt_path: checkpoint that the run continues.
    """
    root = config.default_root_dir or "."
    version = run_of_last(ckpt_path, root)
    if config.logger is False:
        return {"default_root_dir": str(Path(root, version or claim_run(Path(root))))}
    place: dict[str, Any] = {}
    if slurm.job_id():  # Lightning would load an hpc_ckpt_N.ckpt of any earlier run from the root
        place["default_root_dir"] = str(Path(root) / "requeued")
    loggers = as_list(config.logger)
    if any(isinstance(logger, TensorBoardLogger) for logger in loggers):
        return place  # the folder of the user's own logger is the run's
    ours = RunLogger(root, name="", version=version, default_hp_metric=False)
    return {**place, "logger": [ours, *loggers]}


def scratch_arguments(config: Any, folder: Path) -> dict[str, Any]:
    """Arguments for the Trainer of a dry run, which writes only into this folder."""
    logger = TensorBoardLogger(folder, name="", version="")
    return {
        "default_root_dir": str(folder),
        "logger": config.logger is not False and logger,
        "enable_progress_bar": False,
        "enable_checkpointing": False,
    }


def as_list(value: Any) -> list[Any]:
    """The objects of an option that takes one, several, or true for the default."""
    if value is None or isinstance(value, bool):
        return []
    return list(value) if isinstance(value, list | tuple) else [value]
