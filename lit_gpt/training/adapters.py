"""A run that trains adapters: the frozen model that they go with, and what is told of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning.pytorch.utilities import rank_zero_only

from lit_gpt.callbacks.checkpoints import save_atomically
from lit_gpt.checkpoint import Checkpoint, base_contents, base_path
from lit_gpt.errors import UserError
from lit_gpt.lora import load_base
from lit_gpt.module import LitGPT

if TYPE_CHECKING:
    from lit_gpt.training.train import Run

DEFAULTS = {"lora_rank": 0, "lora_alpha": 16.0, "lora_layers": "all"}  # of earlier checkpoints


def check_sharded(model: LitGPT, sharded: bool) -> None:
    """Refuses checkpoints in shards, which would have the frozen weights as well."""
    if model.lora and sharded:
        problem = "is for checkpoints too large for one process, and those of adapters are small"
        raise UserError(problem, field="sharded", hint="leave it out")


def restore_base(model: LitGPT, checkpoint: Checkpoint) -> None:
    """Gives a resumed run the frozen weights, which its checkpoint has not.

    Raises:
        UserError: they are not beside it.
    """
    if model.lora and not model.gpt.embedding.weight.is_meta:  # of fsdp2's other processes
        load_base(model.gpt, checkpoint.base_weights())


@rank_zero_only
def keep_base(run: Run) -> None:
    """Puts the frozen model beside the run's checkpoints, once, so that these can be used.

    Raises:
        UserError: it can't be written.
    """
    if not run.model.lora:
        return
    contents, run.model.base = base_contents(run.model.gpt, run.data.tokenizer)
    path = base_path(run.folder / "checkpoints", run.model.base)
    if not path.is_file():
        save_atomically(contents, path)


def trained_weights(model: LitGPT) -> str | None:
    """How many weights the adapters have, for the card of a run; None: it has none."""
    if not model.lora:
        return None
    total = sum(weight.numel() for weight in model.gpt.parameters())
    trained = sum(weight.numel() for weight in model.gpt.parameters() if weight.requires_grad)
    return f"{trained:,} ({trained / total:.2%}), in LoRA adapters of rank {model.lora.rank}"
