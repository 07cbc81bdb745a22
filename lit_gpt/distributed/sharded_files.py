"""Sharded checkpoints: folders in which each process writes its own weights and moments.

torch.distributed.checkpoint writes and reads the tensors, divided between any number of processes;
all else is in an ordinary file beside them. A folder has its name only once it is whole.
"""

from __future__ import annotations

import pickle
import shutil
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lit_gpt.errors import UserError
from lit_gpt.optimizer_state import State

WEIGHTS = "weights/"  # begins the key of a weight: weights/NAME
MOMENTS = "moments/"  # of a moment: moments/KIND/NAME
SAFE_MODULES = ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem")
SAFE = {("torch", "Size"), ("torch.serialization", "_get_layout"), ("pathlib", "PosixPath")}


def tensors_of(module: nn.Module, state: State) -> dict[str, Tensor]:
    """All that a folder has of a model and its optimizer, by key: what is sharded stays so."""
    found = {f"{WEIGHTS}{name}": weight.detach() for name, weight in module.named_parameters()}
    for name, moments in state["state"].items():
        found |= {f"{MOMENTS}{kind}/{name}": moment for kind, moment in moments.items()}
    return found


def weights_of(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    keys = [key for key in tensors if key.startswith(WEIGHTS)]
    return {key.removeprefix(WEIGHTS): tensors[key] for key in keys}


def state_of(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The moments of each weight."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, moment in tensors.items():
        if key.startswith(MOMENTS):
            kind, _, name = key.removeprefix(MOMENTS).partition("/")
            found.setdefault(name, {})[kind] = moment
    return found


def unfinished(path: Path) -> Path:
    return path.with_name(f".{path.name}.new")


def replaced(path: Path) -> Path:
    """Where the folder before it is, for the moment in which a new one takes its name."""
    return path.with_name(f".{path.name}.old")


def save(
    tensors: dict[str, Tensor], write_rest: Callable[[Path], None], path: Path, is_first: bool
) -> None:
    """Writes a folder, in all processes; the first one writes the rest too.

    The earlier folder keeps its name until the new one is on the disk.

    Raises:
        UserError: it can't be written; in all processes.
    """
    import torch.distributed as dist
    from torch.distributed import checkpoint as dcp

    work = unfinished(path)
    if is_first:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
    dist.barrier()
    try:
        dcp.save(tensors, storage_writer=dcp.FileSystemWriter(work))  # flushes files to the disk
    except dcp.CheckpointException as error:  # a BaseException
        raise UserError(
            f"cannot write the checkpoint {path} ({reason_of(error)}): earlier checkpoints are "
            "unharmed",
            hint="make room, then continue with `ckpt_path` last",
        ) from None
    if is_first:
        write_rest(work)
        restore(path)
        shutil.rmtree(replaced(path), ignore_errors=True)
        if path.is_file():
            path.unlink()
        with suppress(FileNotFoundError):
            path.rename(replaced(path))
        work.rename(path)
        shutil.rmtree(replaced(path), ignore_errors=True)
    dist.barrier()


def reason_of(error: Any) -> str:
    """What the first of the processes says that failed, in one line."""
    failure, *_ = error.failures.values()
    return str(failure[0]).partition("\n")[0]


def whole_file(path: Path) -> Path:
    """The file that `lit-gpt consolidate` makes of a folder."""
    return path.with_name(f"{path.stem}-whole.ckpt")


def restore(path: Path) -> None:
    """Gives a folder its name back, if a process was killed while it was being replaced."""
    if not path.exists():
        with suppress(OSError):
            replaced(path).rename(path)


def restore_all(root: str | Path) -> None:
    """The same for all runs below a folder."""
    for old in Path(root).expanduser().rglob("checkpoints/.*.ckpt.old"):
        restore(old.with_name(old.name.removeprefix(".").removesuffix(".old")))


class Unpickler(pickle.Unpickler):
    """Reads the plain description of tensors, and calls nothing else that a file may name."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in SAFE:
            return super().find_class(module, name)
        if module in (*SAFE_MODULES, "torch") and "." not in name:
            found = super().find_class(module, name)
            is_record = isinstance(found, type) and found.__module__ in SAFE_MODULES
            if is_record or isinstance(found, torch.dtype):
                return found
        raise pickle.UnpicklingError(f"{module}.{name}")


def reader(path: Path) -> Any:
    """Reads a folder without running anything in it.

    Raises:
        ValueError: it describes more than its files can have.
    """
    from torch.distributed import checkpoint as dcp

    class Reader(dcp.FileSystemReader):
        def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
            with (path / ".metadata").open("rb") as file:
                metadata = Unpickler(file).load()
            entries = metadata.state_dict_metadata.values()
            total = sum(e.size.numel() * e.properties.dtype.itemsize for e in entries)
            if total > sum(part.stat().st_size for part in path.glob("*.distcp")):
                raise ValueError("tensors larger than the files")
            return metadata

    return Reader(path)


def load(tensors: dict[str, Tensor], path: Path) -> None:
    """Fills tensors, sharded or whole, with what a folder has of these keys; in all processes.

    Raises:
        ValueError: it lacks some, has them in another shape, or is damaged; in all processes.
    """
    from torch.distributed import checkpoint as dcp
    from torch.distributed import is_initialized

    with warnings.catch_warnings():  # one process is what is meant
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        try:
            dcp.load(tensors, storage_reader=reader(path), no_dist=not is_initialized())
        except dcp.CheckpointException as error:
            raise ValueError(reason_of(error)) from None


def empty_tensors(path: Path, weights: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Tensors of the keys that a folder has, to be filled.

    Args:
        weights: moments are sharded as these are, by name; None: all are whole.
    """
    found = {}
    for key, entry in reader(path).read_metadata().state_dict_metadata.items():
        name = key.rpartition("/")[2]
        if weights and name in weights and entry.size == weights[name].shape:
            found[key] = torch.empty_like(weights[name].detach())
        else:
            found[key] = torch.empty(entry.size, dtype=entry.properties.dtype)
    return found
