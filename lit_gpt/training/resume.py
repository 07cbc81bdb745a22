"""Owns what goes with what: which checkpoint a run continues, or takes its first weights from."""

from __future__ import annotations

from collections import Counter
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from lit_gpt.checkpoint import TO_CONTINUE, Checkpoint
from lit_gpt.data import TextDataModule
from lit_gpt.errors import UserError
from lit_gpt.model import GPTConfig
from lit_gpt.module import LitGPT


def open_checkpoint(path: str) -> Checkpoint:
    """All but the tensors of a checkpoint that can be continued; its parts fit together."""
    checkpoint = Checkpoint.read(path, TO_CONTINUE)
    model, _ = checkpoint.build()
    try:
        states = checkpoint.optimizer_state["state"].values()
        fits = Counter(map(shape_of, states)) == Counter(p.shape for p in model.parameters())
        fits = fits or checkpoint.global_step == checkpoint.skipped_steps  # it has none yet
    except Exception:  # whatever an optimizer's state is not made of
        fits = False
    if not fits:
        raise UserError(
            f"{path} has no optimizer state that fits its weights, so it can't be continued: start "
            f"a new run from them with --model.init_from={path}"
        )
    return checkpoint.without_tensors()


def shape_of(state: dict[str, Any]) -> torch.Size:
    """That of a weight's moments, which are all alike."""
    (shape,) = {moment.shape for moment in state.values() if moment.ndim > 0}
    return shape


def check_fit(
    path: str, checkpoint: Checkpoint, max_steps: int, model: LitGPT, data: TextDataModule
) -> None:
    """Refuses to continue a checkpoint of another model, optimizer, tokenizer, text or split."""
    if 0 <= max_steps <= checkpoint.global_step:
        raise UserError(
            f"{path} is at step {checkpoint.global_step} already: give a larger "
            f"--trainer.max_steps than {max_steps}"
        )
    differ = []
    gpt = checkpoint.gpt_config
    for field in fields(GPTConfig):
        saved, given = getattr(gpt, field.name), getattr(model.gpt.config, field.name)
        if saved != given and field.name not in ("dropout", "style"):
            differ.append(f"{field.name} is {saved} there and {given} here")
    optimizer = ("optimizer", "learning_rate", "weight_decay", "betas")
    text = ("train_fraction", "encoding", "text_field")
    same_tokens = checkpoint.has_tokenizer(data.tokenizer)
    if not same_tokens:
        text = ("tokenizer", "compact_vocab", *text)
    for names, saved, given in (
        (optimizer, checkpoint.hyperparameters, model.hparams),
        (text, checkpoint.data_hyperparameters, data.hparams),
    ):
        for name in names:
            if saved.get(name) != given[name]:
                differ.append(f"{name} is {saved.get(name)} there and {given[name]} here")
    if checkpoint.corpus_info.get("fingerprint") != data.corpus.info.fingerprint:
        differ.append(f"the text of {data.hparams.path} is not the one it was trained on")
    elif not same_tokens and not differ:
        differ.append("the tokenizer's vocabulary is another")
    if differ:
        config = Path(path).parent.parent / "config.yaml"
        hint = f"--config {config}" if config.is_file() else "the options of that run"
        raise UserError(
            f"{path} does not fit the options given: {'; '.join(differ)}. Continue it with {hint}, "
            f"or start a new run from its weights with --model.init_from={path}"
        )
