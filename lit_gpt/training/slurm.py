"""SLURM: the job that a run belongs to, and resuming it when the job is requeued."""

from __future__ import annotations

import hashlib
import os
import subprocess
from pathlib import Path
from typing import NoReturn

import lightning.pytorch as pl
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_only

NOTE = "slurm_job"  # file in a run's folder that names its job


def job_id() -> str | None:
    """The job that srun started this process in, as scontrol spells it; None outside SLURM."""
    if not SLURMEnvironment.detect():
        return None
    if array := os.environ.get("SLURM_ARRAY_JOB_ID"):
        return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    return os.environ.get("SLURM_JOB_ID")


def note_of(args: list[str]) -> str:
    """Job and command line: a job may well train several models."""
    return f"{job_id()} {hashlib.sha256(chr(0).join(args).encode(errors='replace')).hexdigest()}"


class SlurmJobMarker(Callback):
    """Writes into the folder of a run which job it belongs to."""

    def __init__(self, args: list[str]) -> None:
        self.note = note_of(args)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        folder = trainer.log_dir  # all ranks ask for it together
        if trainer.is_global_zero and folder and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            try:
                Path(folder).mkdir(parents=True, exist_ok=True)
                (Path(folder) / NOTE).write_text(self.note, encoding="utf-8")
            except OSError as error:
                reason = f"a requeued job will not find this run: {error.strerror}"
                print(f"Could not write {Path(folder) / NOTE}, so {reason}")


def checkpoint_of_job(root: str | Path, args: list[str]) -> Path | None:
    """The last.ckpt of this job's newest run with these arguments, where SLURM requeued the job."""
    if job_id() is None or int(os.environ.get("SLURM_RESTART_COUNT") or 0) == 0:
        return None
    notes = (p for p in Path(root).expanduser().rglob(NOTE) if p.read_text() == note_of(args))
    checkpoints = (note.parent / "checkpoints" / "last.ckpt" for note in notes)
    found = filter(Path.exists, checkpoints)  # folders, if sharded
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


def end_done(option: str, value: int) -> NoReturn:
    """Ends a requeued job that had done all it was asked to."""
    rank_zero_only(print)(f"Nothing is left to do: --trainer.{option} is {value}")
    raise SystemExit(0)


def requeue_signals(trainer: pl.Trainer) -> list[int]:
    """The signal by which SLURM warns that the time is nearly up; empty without requeueing."""
    environment = trainer._accelerator_connector.cluster_environment
    if isinstance(environment, SLURMEnvironment) and environment.auto_requeue:
        return [environment.requeue_signal] if environment.requeue_signal else []
    return []


@rank_zero_only
def requeue() -> None:
    """Puts the job back into the queue, which ends this process too."""
    command = ["scontrol", "requeue", str(job_id())]
    print("Requeuing:      ", *command, flush=True)  # before SLURM ends this process
    try:
        result = subprocess.run(command, capture_output=True, text=True)
        failure = (result.stderr.strip() or "failed") if result.returncode else None
    except OSError as error:
        failure = error.strerror
    if failure:
        print(f"Not requeued ({' '.join(failure.split())}): continue with the command above")
