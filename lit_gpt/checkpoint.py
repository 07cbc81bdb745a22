"""Owns checkpoint files: written whole or not at all, and one file -> (GPT, Tokenizer)."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import torch

from lit_gpt.errors import UserError
from lit_gpt.model import GPT, GPTConfig
from lit_gpt.tokenizer import Tokenizer


def save_atomically(content: dict[str, Any], path: str | Path) -> None:
    """Writes a temporary file beside `path`, flushes it to disk and renames it.

    So `path` always names a complete file, the earlier one until the new one is safe.

    Raises:
        UserError: the disk is full or can't be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        reason = getattr(error, "strerror", None) or "is the disk full?"
        raise UserError(
            f"cannot write the checkpoint {path} ({reason}): earlier checkpoints are unharmed; "
            "make room, then continue with --ckpt_path last"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


TO_WRITE = {"gpt", "tokenizer", "state_dict"}
TO_CONTINUE = {
    *("corpus", "hyper_parameters", "datamodule_hyper_parameters", "global_step"),
    *("optimizer_states", "lr_schedulers", "loops", "callbacks", "pytorch-lightning_version"),
}


def read_checkpoint(path: str | Path, needed: set[str] = TO_WRITE) -> dict[str, Any]:
    """What a checkpoint of this project holds, on the CPU. Never runs code from the file.

    Raises:
        UserError: no such file, or one that is damaged or of something else.
    """
    path = Path(os.path.expanduser(path))  # Path's own fails for a user who is not there
    if not path.is_file():
        raise UserError(f"no checkpoint at {str(path)!r}: give --ckpt_path a .ckpt file")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (
        OSError,
        RuntimeError,
        EOFError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        pickle.UnpicklingError,
    ) as error:
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


def load_checkpoint(path: str | Path) -> tuple[GPT, Tokenizer]:
    """The model, in eval mode on the CPU, and its tokenizer, from nothing but the file.

    Raises:
        UserError: a file that can't be used.
    """
    content = read_checkpoint(path)
    try:
        config, tokenizer = GPTConfig(**content["gpt"]), Tokenizer.from_dict(content["tokenizer"])
        model = GPT(config)
        weights = content["state_dict"].items()
        model.load_state_dict({k.removeprefix("gpt."): v for k, v in weights if k[:4] == "gpt."})
    except (TypeError, ValueError, LookupError, AttributeError, RuntimeError, UserError) as error:
        raise UserError(f"the parts of {path} do not fit together: {error}") from error
    return model.eval(), tokenizer


def newest_checkpoint(root: str | Path, name: str) -> Path | None:
    """The `name`.ckpt written last below `root`, of whichever run; None where there is none."""
    found = Path(os.path.expanduser(root)).rglob(f"checkpoints/{name}.ckpt")
    return max(found, key=lambda path: path.stat().st_mtime, default=None)
