"""The consolidate command: makes one ordinary file of a sharded checkpoint."""

from __future__ import annotations

from pathlib import Path

import torch

from lit_gpt.checkpoint import (
    REST,
    SHARDED_KEYS,
    Checkpoint,
    is_sharded,
    take_tensors,
    with_tensors,
)
from lit_gpt.command import call, command_line
from lit_gpt.distributed import sharded_files
from lit_gpt.errors import UserError
from lit_gpt.storage import atomic_open


def consolidate(folders: list[str]) -> None:
    """Make one ordinary .ckpt of a sharded checkpoint, on one process.

    Args:
        folders: sharded checkpoints; of last.ckpt, last-whole.ckpt is made beside it.

    Raises:
        UserError: not a sharded checkpoint, or one that can't be read.
    """
    for folder in map(Path, folders):
        sharded_files.restore(folder)
        if not is_sharded(folder):
            hint = "give a folder that --checkpoints.sharded made, such as checkpoints/last.ckpt"
            raise UserError(f"{folder} is not a sharded checkpoint", hint=hint)
        checkpoint = Checkpoint.read(folder / REST, SHARDED_KEYS)
        contents = dict(checkpoint.contents)
        _, state = take_tensors(contents)
        try:
            tensors = sharded_files.empty_tensors(folder)
            sharded_files.load(tensors, folder)
        except Exception as error:  # whatever a damaged or malicious folder can raise
            problem = f"{folder} can't be read (incomplete, damaged or not from lit_gpt)"
            raise UserError(problem, hint="use another checkpoint") from error
        weights = sharded_files.weights_of(tensors)
        if checkpoint.gpt_config.tie_embeddings:
            weights["gpt.head.weight"] = weights["gpt.embedding.weight"]
        state = {**state, "state": sharded_files.state_of(tensors)}
        out = sharded_files.whole_file(folder)
        with atomic_open(out) as file:
            torch.save(with_tensors(contents, weights, state), file)
        print(f"Wrote {out}")
        print(f"Generate text:   {command_line('generate', '--ckpt_path', str(out))}")


def main(argv: list[str]) -> int:
    call(consolidate, argv)
    return 0
