"""Owns the import of a local GPT-2 or Qwen3 folder, checked against transformers."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lit_gpt.errors import UserError
from lit_gpt.huggingface.architectures import LAYOUTS, check_logits, gpt_weights
from lit_gpt.huggingface.config import gpt_config
from lit_gpt.huggingface.tokenizer import from_hf, import_transformers, read_spec, unreadable
from lit_gpt.model import GPT, GPTConfig

CONTEXT = 1024  # tokens of a window, where none are asked for and the model could take more


WINDOW = 64  # tokens whose logits are compared


PART = 1 << 20  # characters whose ids are compared at a time


TABLES = re.compile(r"(^|\.)(attn\.(masked_)?bias|rotary_emb\.inv_freq)$")  # no weights; old files


def is_folder(source: str) -> bool:
    """Whether it is a folder as transformers makes them (and no name that a folder has too)."""
    folder = Path(os.path.expanduser(source))
    return any((folder / name).is_file() for name in ("config.json", "tokenizer.json"))


def folder_fields(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{folder} has no config.json: give --model.init_from a model's folder")
    transformers = import_transformers()
    try:
        theirs = json.loads(path.read_text(encoding="utf-8"))
        if theirs.get("model_type") in list(LAYOUTS):  # with the defaults of what it leaves out
            theirs = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
            theirs = theirs.to_dict()
    except Exception as error:  # whatever transformers says of values it doesn't like
        raise UserError(f"{path} can't be read: {in_one_line(error)}") from error
    try:
        fields = asdict(GPTConfig(**gpt_config(theirs)))
    except UserError as error:
        raise UserError(f"{folder}: {error}") from error
    del fields["dropout"]  # what is said there of training is no part of the model
    return fields


def in_one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def load_folder(source: str, context_length: int) -> GPT:
    """The model of a folder, in eval mode on the CPU, its logits compared with transformers'.

    Args:
        context_length: at most the folder's; of learned positions the first are taken.

    Raises:
        UserError: it can't be used; the logits are not the same.
    """
    folder = Path(os.path.expanduser(source))
    rows = from_hf(folder)[1]
    whole = GPTConfig(**folder_fields(folder), dropout=0.0)
    if rows.max() >= whole.vocab_size:
        raise UserError(
            f"{folder}: the tokenizer has a token {rows.max()}, and the model {whole.vocab_size} "
            "rows: they don't belong together"
        )
    theirs = load_theirs(folder)
    try:
        weights = gpt_weights(theirs.state_dict(), whole)
    except UserError as error:
        raise UserError(f"{folder}: {error}") from error
    for name in ("embedding.weight", "head.weight"):
        weights[name] = weights[name][rows]
    if "position" in weights:
        weights["position"] = weights["position"][:context_length]
    model = GPT(replace(whole, vocab_size=len(rows), context_length=context_length)).eval()
    model.load_state_dict(weights)
    compare_logits(model, theirs, rows, folder)
    return model


def load_theirs(folder: Path) -> Any:
    """transformers' model of the folder, as float32, in eval mode.

    Raises:
        UserError: weights are missing or damaged.
    """
    transformers = import_transformers()
    try:
        theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            local_files_only=True,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are named below
        )
    except Exception as error:  # whatever a foreign file can raise
        raise UserError(
            f"the weights of {folder} can't be loaded ({in_one_line(error)})"
        ) from error
    for what, names in {  # what it would draw at random, or pass over
        "is missing": info["missing_keys"],
        "has another shape": {name for name, *_ in info["mismatched_keys"]},
        "is too much": {name for name in info["unexpected_keys"] if not TABLES.search(name)},
    }.items():
        if names:
            raise UserError(
                f"the weights of {folder} are not those that its config.json says: {min(names)} "
                f"{what} ({len(names)} such in all)"
            )
    return theirs.eval()


@torch.inference_mode()
def compare_logits(model: GPT, theirs: Any, rows: np.ndarray, folder: Path) -> None:
    """On a window of tokens from all over the vocabulary."""
    length = min(WINDOW, model.config.context_length)
    ids = torch.arange(length) * 7919 % len(rows)  # a prime
    rows = torch.from_numpy(rows)
    expected = theirs(input_ids=rows[None, ids]).logits[0][:, rows]
    try:
        check_logits(model(ids[None])[0], expected)
    except UserError as error:
        raise UserError(
            f"{folder} has something that was not seen here: {error}; take another model"
        ) from error


def fingerprint_of(folder: str | Path) -> str:
    """Changes with anything that `check_ids` finds by the tokenizer."""
    spec = json.dumps(read_spec(Path(folder).expanduser()), sort_keys=True)
    return hashlib.sha256(spec.encode()).hexdigest()[:16]


def check_ids(folder: str | Path, tokens: np.ndarray, parts: Iterable[str | None]) -> bool:
    """True; the folder's own tokenizer, all text taken as plain text, gives the same ids.

    Args:
        folder: as for `from_hf`.
        tokens: (N,) our ids of the whole text.
        parts: that text, cut where it may be cut; None ends a document.

    Raises:
        UserError: it gives others, and where.
    """
    tokenizer, rows = from_hf(folder)
    spec = read_spec(Path(folder).expanduser())
    from tokenizers import Tokenizer as Theirs

    none = dict.fromkeys(("normalizer", "post_processor", "truncation", "padding"))
    try:
        theirs = Theirs.from_str(json.dumps(spec | none | {"added_tokens": []}))
    except Exception as error:  # it has no class of its own
        raise unreadable(Path(folder), error) from error
    at = 0
    for text in _joined(parts):
        if text is None:
            expected = rows[[tokenizer.end_of_text]]
        else:
            expected = np.array(theirs.encode(text).ids, dtype=np.int64)
        found = rows[tokens[at : at + len(expected)]]
        if not np.array_equal(found, expected):
            same = [a == b for a, b in zip(found, expected, strict=False)]
            place = same.index(False) if False in same else len(same)
            near = tokenizer.decode(tokens[at + max(0, place - 4) : at + place + 4])
            raise UserError(
                f"the tokenizer of {folder} splits the text of --data.path otherwise than can be "
                f"done here, near {near!r}"
            )
        at += len(expected)
    assert at == len(tokens)
    return True


def _joined(parts: Iterable[str | None]) -> Iterator[str | None]:
    """Larger parts, so that cuts, too, are looked at."""
    text, size = [], 0
    for part in parts:
        if part is None or size > PART:
            if text:
                yield "".join(text)
            text, size = [], 0
        if part is None:
            yield None
        else:
            text.append(part)
            size += len(part)
    if text:
        yield "".join(text)
