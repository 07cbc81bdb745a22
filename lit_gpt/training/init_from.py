"""Owns what a run may start from: a checkpoint of ours, or a local GPT-2 or Qwen3 folder."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lit_gpt.checkpoint import load_checkpoint
from lit_gpt.data import TextDataModule
from lit_gpt.errors import UserError
from lit_gpt.huggingface.importing import (
    CONTEXT,
    check_same_ids,
    folder_fields,
    is_folder,
    load_folder,
)
from lit_gpt.huggingface.tokenizer import from_hf
from lit_gpt.model import GPT


def set_tokenizer(data: TextDataModule) -> int:
    """Hands the data a model's own tokenizer, where `tokenizer` names a model.

    On the text, a folder's tokenizer must give the same ids as transformers' version of it.

    Returns:
        The vocabulary's size.

    Raises:
        UserError: the tokenizer or the text can't be used.
    """
    h = data.hparams
    if is_folder(h.tokenizer):
        data.given_tokenizer = from_hf(h.tokenizer)[0]
        check_same_ids(h.tokenizer, data.corpus)
    elif h.tokenizer.endswith(".ckpt"):
        data.given_tokenizer = load_checkpoint(h.tokenizer)[1]
    return data.vocab_size


def model_fields(source: str) -> dict[str, Any]:
    """The fields of GPTConfig that go with the weights; a folder says nothing of dropout.

    Raises:
        UserError: no such file or folder, or one that can't be used.
    """
    path = Path(os.path.expanduser(source))
    if path.is_dir():
        return folder_fields(path)
    if not path.exists() and path.suffix != ".ckpt":
        raise UserError(
            f"no checkpoint and no folder at {source!r}: give --model.init_from a .ckpt file or a "
            "folder with config.json, model.safetensors and tokenizer.json"
        )
    return asdict(load_checkpoint(source)[0].config)


def load_weights(model: GPT, source: str) -> None:
    """Gives a model the weights of a checkpoint or folder.

    Raises:
        UserError: they can't be used, or are of a model of another shape.
    """
    if is_folder(source):
        given = load_folder(source, model.config.context_length)
    else:
        given = load_checkpoint(source)[0]
    try:
        model.load_state_dict(given.state_dict())
    except RuntimeError as error:
        raise UserError(
            f"the weights of {source} are of a model of another shape: give this one the same "
            "fields of GPTConfig (a checkpoint holds them under 'gpt')"
        ) from error


def adopt_model(config: Any, defaults: Any, source: str) -> None:
    """Makes the model of `config` that of a checkpoint or folder, and its text's tokenizer too.

    Args:
        config: options of the training command, changed in place.
        defaults: the same, as nobody changed them.
        source: what brings weights and tokenizer.

    Raises:
        UserError: an option that was given, and says otherwise than the source.
    """
    gpt, init_from = model_fields(source), config["model"]["init_from"]
    free = {"vocab_size", "dropout"}  # comes with the tokenizer; may change at any time
    wanted = {("model", name): value for name, value in gpt.items()}
    wanted["data", "tokenizer"] = source
    longest = wanted["data", "context_length"] = wanted.pop(("model", "context_length"))
    if is_folder(source):  # of its table, too, the first positions serve
        wanted["data", "context_length"] = min(longest, CONTEXT)
        if config["data"]["context_length"] <= longest:
            free.add("context_length")
    elif gpt["position"] != "learned":  # a table, as long as the context
        free.add("context_length")
    for (group, name), value in wanted.items():
        given = config[group].get(name)
        if given in (defaults[group].get(name), init_from) and name != "dropout":
            config[group][name] = value
        elif given != value and name not in free:
            value = (
                f"at most {longest}" if is_folder(source) and name == "context_length" else value
            )
            raise UserError(
                f"--{group}.{name} {given} does not go with the weights of {source}, where it is "
                f"{value}: leave it out, or --model.init_from"
            )
    config["model"]["context_length"] = config["data"]["context_length"]
