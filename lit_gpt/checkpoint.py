"""Owns checkpoint files: written whole or not at all, checked when read, one -> (GPT, Tokenizer).

A file may come from a stranger: nothing in it is run, nothing in it can take more memory than the
file has bytes, and a flipped bit in what is read is found by the archive's own CRC-32 of each part
(PyTorch writes them and never looks at them).
"""

from __future__ import annotations

import os
import shutil
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_gpt.errors import UserError
from lit_gpt.model import GPT, GPTConfig
from lit_gpt.storage import unfinished
from lit_gpt.text.tokenizer import Tokenizer

MAX_TABLES = 1 << 30  # bytes of a model's tables of positions, which no weights vouch for
TO_WRITE = {"gpt", "tokenizer", "state_dict"}
TO_CONTINUE = {
    *("corpus", "hyper_parameters", "datamodule_hyper_parameters", "global_step"),
    *("optimizer_states", "lr_schedulers", "loops", "callbacks", "pytorch-lightning_version"),
}


def save_atomically(content: dict[str, Any], path: str | Path) -> None:
    """Writes a temporary file beside `path`, flushes it to disk and renames it.

    So `path` always names a complete file, the earlier one until the new one is safe. What a
    killed process left half-written, is written over by the next.

    Raises:
        UserError: the disk is full or can't be written.
    """
    path = Path(path)
    temporary = unfinished(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        if os.name == "posix":  # the new name, too, outlives a loss of power
            folder = os.open(path.parent, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        raise UserError(
            f"cannot write the checkpoint {path} ({_reason(error, path)}): earlier checkpoints are "
            "unharmed; make room, then continue with --ckpt_path last"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def _reason(error: Exception, path: Path) -> str:
    """Why a file can't be written; of a full disk torch says no more than that it failed."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    try:
        return f"{shutil.disk_usage(path.parent).free:,} bytes are free there"
    except OSError:
        return str(error)


def read_checkpoint(path: str | Path, needed: set[str] = TO_WRITE) -> dict[str, Any]:
    """What a checkpoint of this project holds, on the CPU. Never runs code from the file.

    Raises:
        UserError: no such file, or one that is damaged or of something else.
    """
    path = Path(os.path.expanduser(path))  # Path's own fails for a user who is not there
    if not path.is_file():
        raise UserError(f"no checkpoint at {str(path)!r}: give --ckpt_path a .ckpt file")
    try:
        _check_archive(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
        _check_tensors(content)
    except Exception as error:  # whatever a file that somebody made for it can raise
        raise UserError(
            f"{path} is no checkpoint that can be loaded (truncated, damaged or not from lit_gpt): "
            "give --ckpt_path another one"
        ) from error
    missing = sorted(needed - set(content)) if isinstance(content, dict) else sorted(needed)
    if missing:
        raise UserError(
            f"{path} is not a whole checkpoint of lit_gpt: it has no {', '.join(missing)}; "
            "give --ckpt_path another one"
        )
    return content


def _check_archive(path: Path) -> None:
    """Its parts are together no larger than the file, and what their CRCs say.

    torch.load would unpack a zip bomb, and reads flipped bits as weights.
    """
    with zipfile.ZipFile(path) as archive:
        if sum(part.file_size for part in archive.infolist()) > path.stat().st_size:
            raise ValueError("parts that are compressed or overlap")
        if damaged := archive.testzip():
            raise ValueError(f"{damaged} is damaged")


def _check_tensors(content: Any) -> None:
    """Each tensor must have as many numbers in the file as its shape says (strides may repeat)."""
    for tensor in _tensors(content):
        plain = tensor.layout == torch.strided and tensor.device.type == "cpu"
        if not plain or tensor.numel() * tensor.itemsize > tensor.untyped_storage().nbytes():
            raise ValueError("a tensor whose shape lies")


def _tensors(content: Any) -> Iterator[Tensor]:
    todo, seen = [content], set()
    while todo:
        part = todo.pop()
        if isinstance(part, Tensor):
            yield part
        elif isinstance(part, dict | list | tuple | set) and id(part) not in seen:
            seen.add(id(part))  # a part may hold itself
            todo += [*part, *part.values()] if isinstance(part, dict) else part


def build_model(content: dict[str, Any], path: str | Path) -> tuple[GPT, Tokenizer]:
    """The model, in eval mode on the CPU, and its tokenizer, of what `read_checkpoint` read.

    Raises:
        UserError: parts that do not fit together; nothing large is made for them.
    """
    try:
        config, tokenizer = GPTConfig(**content["gpt"]), Tokenizer.from_dict(content["tokenizer"])
        weights = content["state_dict"].items()
        weights = {k.removeprefix("gpt."): v for k, v in weights if k[:4] == "gpt."}
        if config.num_blocks > len(weights):
            raise ValueError(f"{config.num_blocks} blocks, {len(weights)} weights")
        if config.vocab_size != tokenizer.vocab_size:
            raise ValueError(f"{config.vocab_size} rows, {tokenizer.vocab_size} tokens")
        with torch.device("meta"):  # shapes without memory
            plan = GPT(config)
        if sum(table.nbytes for table in plan.buffers()) > MAX_TABLES:
            raise ValueError(f"a context of {config.context_length} tokens")
        plan.load_state_dict(weights, assign=True)  # names and shapes are those of the config
        model = GPT(config)
        model.load_state_dict(weights)
    except Exception as error:
        reason = " ".join(str(error).split("\n")[:2]) or type(error).__name__
        raise UserError(f"the parts of {path} do not fit together: {reason}") from error
    return model.eval(), tokenizer


def load_checkpoint(path: str | Path) -> tuple[GPT, Tokenizer]:
    """The model, in eval mode on the CPU, and its tokenizer, from nothing but the file.

    Raises:
        UserError: a file that can't be used.
    """
    return build_model(read_checkpoint(path), path)


def newest_checkpoint(root: str | Path, name: str) -> Path | None:
    """The `name`.ckpt written last below `root`, of whichever run; None where there is none."""
    found = Path(os.path.expanduser(root)).rglob(f"checkpoints/{name}.ckpt")
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


def find_newest(logs: str) -> Path:
    """The newest run's best checkpoint below `logs`, or its last; says which.

    Raises:
        UserError: there is none.
    """
    path = newest_checkpoint(logs, "best") or newest_checkpoint(logs, "last")
    if path is None:
        raise UserError(
            f"no checkpoint below {logs!r}: train a model first, or name one with --ckpt_path"
        )
    print(f"Using {path}", file=sys.stderr)
    return path
