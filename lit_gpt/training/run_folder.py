"""Owns the folder of a run: logs/version_N, its TensorBoard events, and who goes on in it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from torch.utils.tensorboard.summary import hparams

from lit_gpt.errors import UserError
from lit_gpt.storage import locked, remove_unfinished


class RunLogger(TensorBoardLogger):
    """TensorBoard events in ROOT/version_N, a new N for each run, even of two started at once."""

    @property
    def version(self) -> str:
        if self._version is None:
            self._version = claim_run(Path(self.root_dir)) if rank_zero_only.rank == 0 else "rank"
        return self._version

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        super().log_hyperparams(params, *args, **kwargs)  # hparams.yaml
        plain = {k: v if isinstance(v, bool | int | float) else str(v) for k, v in params.items()}
        # Names the curve that TensorBoard's table shows; Lightning would add a point to it.
        for summary in hparams(plain, {"val/loss": 0.0}):
            self.experiment._get_file_writer().add_summary(summary)  # as Lightning does it


def claim_run(root: Path) -> str:
    """Makes the next folder version_N below root; two processes never get the same one."""
    taken = [p.name.removeprefix("version_") for p in root.glob("version_*")]
    for n in count(max((int(t) for t in taken if t.isdecimal()), default=-1) + 1):
        try:
            (root / f"version_{n}").mkdir(parents=True)
            return f"version_{n}"
        except FileExistsError:
            continue
        except OSError as error:
            raise UserError(
                f"cannot make a folder for the run in {root}: {error.strerror}; name another with "
                "--trainer.default_root_dir"
            ) from error


@contextmanager
def keep_others_out(folder: Path) -> Iterator[None]:
    """Holds the run's folder for this process, and clears what a killed one left half-written.

    The lock goes with the process, however it ends. Where a file system has no locks, none is held.

    Raises:
        UserError: another process trains in it.
    """
    if rank_zero_only.rank != 0:
        yield
        return
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    with locked(folder, hint="wait until it ends, or start a new run without `ckpt_path`"):
        remove_unfinished(folder)
        remove_unfinished(folder / "checkpoints")
        yield


def run_of_last(ckpt_path: str | None, root: str) -> str | None:
    """The run's folder below root, where `ckpt_path` is the last.ckpt of a run: it goes on there.

    Any other checkpoint starts a new run, so that nothing saved after it is overwritten.
    """
    if ckpt_path is None or Path(ckpt_path).name != "last.ckpt":
        return None
    run = Path(os.path.expanduser(ckpt_path)).resolve().parent.parent
    return run.name if run.parent == Path(os.path.expanduser(root)).resolve() else None
