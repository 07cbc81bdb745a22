"""Import of a local folder of an architecture in layouts.py, checked against transformers."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lit_gpt.errors import UserError
from lit_gpt.huggingface.adapter import CONFIG, WEIGHTS, merge_adapter
from lit_gpt.huggingface.architectures import gpt_weights, logit_difference
from lit_gpt.huggingface.config import gpt_config
from lit_gpt.huggingface.folder import (
    MAX_CONFIG,
    check_shapes,
    read_config,
    read_json,
    read_weights,
    weight_shapes,
)
from lit_gpt.huggingface.gguf_import import is_gguf
from lit_gpt.huggingface.layouts import LAYOUTS
from lit_gpt.huggingface.tokenizer import (
    added_spaces,
    from_hf,
    import_transformers,
    in_one_line,
    read_spec,
    unreadable,
)
from lit_gpt.model import GPT, GPTConfig
from lit_gpt.text.corpus import Corpus

CONTEXT = 1024  # tokens: the default for a model whose own context is longer
WINDOW = 64  # tokens whose logits are compared
PART = 1 << 20  # characters whose ids are compared at a time


def is_folder(source: str) -> bool:
    """Whether transformers wrote this, or it is a GGUF file; not, say, a folder named `bytes`."""
    folder = Path(os.path.expanduser(source))
    names = ("config.json", "tokenizer.json")
    return is_gguf(folder) or any((folder / name).is_file() for name in names)


def unusable(folder: Path, problem: str) -> UserError:
    return UserError(problem, field="init_from", value=str(folder), hint="use another model")


def read_model_config(folder: Path) -> tuple[Any, GPTConfig]:
    """The config of a folder's model, in transformers and as ours.

    Raises:
        UserError: config.json is missing or damaged, or describes a model that ours can't be;
            transformers is not installed.
    """
    path = folder / "config.json"
    if not path.is_file():
        alone = f": copy its {CONFIG} and {WEIGHTS} into the folder of the model that it adapts"
        is_adapter = (folder / CONFIG).is_file()
        raise unusable(folder, f"the folder has no config.json{alone if is_adapter else ''}")
    transformers = import_transformers()
    config = None
    try:
        fields = read_json(path, MAX_CONFIG)
        kind = fields.get("model_type")
        if kind in list(LAYOUTS):  # as a list, because it may be unhashable
            architecture = getattr(transformers, LAYOUTS[kind].architecture)
            config = read_config(fields, architecture.config_class)
            fields |= config.to_dict()
        return config, GPTConfig(**gpt_config(fields))
    except UserError as error:
        raise unusable(folder, f"config.json: {error}") from error
    except Exception as error:  # whatever transformers raises for values it rejects
        raise unusable(folder, f"config.json can't be read ({in_one_line(error)})") from error


def folder_fields(folder: Path) -> dict[str, Any]:
    """The fields of GPTConfig for the model of a folder, all but dropout.

    Raises:
        UserError: as for `read_model_config`, or the model is larger than the weights.
    """
    config, ours = read_model_config(folder)
    try:
        check_shapes(config, architecture_of(config), weight_shapes(folder))
    except Exception as error:  # a stranger's file can raise anything
        raise no_weights(folder, error) from error
    fields = asdict(ours)
    del fields["dropout"]  # a choice for training, not part of the model
    return fields


def architecture_of(config: Any) -> Any:
    """The class of the model in transformers."""
    return getattr(import_transformers(), LAYOUTS[config.model_type].architecture)


def no_weights(folder: Path, error: Exception) -> UserError:
    return unusable(folder, f"the weights can't be loaded ({in_one_line(error)})")


def load_folder(source: str, context_length: int) -> GPT:
    """The model of a folder, in eval mode on the CPU, its logits compared with transformers'.

    Args:
        context_length: at most the folder's; of learned positions the first ones are kept.

    Raises:
        UserError: the folder can't be used, or the logits differ.
    """
    folder = Path(os.path.expanduser(source))
    _, rows = from_hf(folder)
    config = GPTConfig(**folder_fields(folder), dropout=0.0)
    if rows.max() >= config.vocab_size:
        raise unusable(
            folder,
            f"tokenizer and weights do not belong together: the tokenizer has a token "
            f"{rows.max()}, the embedding only {config.vocab_size} rows",
        )
    theirs = load_hf_model(folder)
    weights = gpt_weights(theirs.state_dict(), config)
    if config.tie_embeddings and not weights["head.weight"].equal(weights["embedding.weight"]):
        raise unusable(
            folder, "tie_word_embeddings is true, but lm_head.weight isn't the embedding"
        )
    for name in ("embedding.weight", "head.weight"):
        weights[name] = weights[name][rows]
    if "position" in weights:
        weights["position"] = weights["position"][:context_length]
    model = GPT(replace(config, vocab_size=len(rows), context_length=context_length)).eval()
    model.load_state_dict(weights)
    check_logits(model, theirs, rows, folder)
    return model


def adapted_weights(folder: Path, config: Any) -> dict[str, torch.Tensor]:
    """The weights of a folder, with those of peft's adapter, if there is one, added.

    Raises:
        ValueError, OSError, SafetensorError: they can't be used.
    """
    weights = read_weights(folder)
    if not (folder / CONFIG).exists():
        return weights
    prefix = LAYOUTS[config.model_type].prefix
    return merge_adapter(folder, weights, prefix, is_transposed=config.model_type == "gpt2")


def load_hf_model(folder: Path) -> Any:
    """The folder's model in transformers, as float32, in eval mode.

    Raises:
        UserError: weights are damaged, or do not match config.json.
    """
    config, _ = read_model_config(folder)
    try:
        theirs, info = architecture_of(config).from_pretrained(
            None,  # so that nothing but these weights is read
            config=config,
            state_dict=adapted_weights(folder, config),
            dtype=torch.float32,
            output_loading_info=True,
        )
        if info["missing_keys"]:  # transformers draws these at random
            raise ValueError(f"no {min(info['missing_keys'])}")
    except Exception as error:  # a stranger's file can raise anything
        raise no_weights(folder, error) from error
    return theirs.eval()


@torch.inference_mode()
def check_logits(model: GPT, theirs: Any, rows: np.ndarray, folder: Path) -> None:
    """Compares the logits on a window of tokens from all over the vocabulary.

    Args:
        rows: (V,) the id in transformers for each of ours.

    Raises:
        UserError: they differ by more than rounding.
    """
    length = min(WINDOW, model.config.context_length)
    ids = torch.arange(length) * 7919 % len(rows)  # (T,); 7919 is prime
    their_ids = torch.from_numpy(rows)
    expected = theirs(input_ids=their_ids[None, ids]).logits[0][:, their_ids]  # (T, V)
    difference, limit = logit_difference(model(ids[None])[0], expected)
    if not difference < limit:  # also refuses NaN
        raise unusable(
            folder,
            f"the model uses something that lit_gpt does not implement: its logits differ from "
            f"those of transformers by up to {difference:.1e} (the limit is {limit:.1e})",
        )


def check_same_ids(folder: str | Path, corpus: Corpus) -> None:
    """Runs `check_ids` on a corpus that the folder's tokenizer encoded, once for each text.

    Raises:
        UserError: the folder's own tokenizer gives other ids.
    """

    def check() -> bool:
        text = corpus.as_text
        return check_ids(folder, text.tokens, text.parts())

    corpus.remember(f"same_ids_{fingerprint_of(folder)}", check)


def fingerprint_of(folder: str | Path) -> str:
    """Changes with anything that can change the ids of a text."""
    spec = json.dumps(read_spec(folder), sort_keys=True)
    return hashlib.sha256(spec.encode()).hexdigest()[:16]


def check_ids(folder: str | Path, tokens: np.ndarray, texts: Iterable[str | None]) -> bool:
    """True if the folder's own tokenizer, treating all text as plain text, gives the same ids.

    Args:
        folder: as for `from_hf`.
        tokens: (N,) our ids of the whole text.
        texts: the text in parts, cut where `cut_safely` does; None ends a document.

    Raises:
        UserError: it gives other ids, and where.
    """
    tokenizer, rows = from_hf(folder)
    from tokenizers import Tokenizer as Theirs

    spec = read_spec(folder)
    spaces = added_spaces(spec)
    model = {"type": "BPE", "ignore_merges": spec["model"].get("ignore_merges", False)}
    checked = {  # what `from_hf` has checked, and nothing else
        "version": spec.get("version", "1.0"),
        "added_tokens": [
            token for token in spec.get("added_tokens", []) if token["content"] in spaces
        ],
        "pre_tokenizer": spec["pre_tokenizer"],
        "model": model | {name: spec["model"][name] for name in ("vocab", "merges")},
    }
    try:
        theirs = Theirs.from_str(json.dumps(checked))
    except Exception as error:  # tokenizers raises nothing more specific
        raise unreadable(folder, error) from error
    start = 0
    for text in _join(texts):
        # The end-of-text token is the last.
        expected = rows[-1:] if text is None else np.array(theirs.encode(text).ids, np.int64)
        found = rows[tokens[start : start + len(expected)]]
        if not np.array_equal(found, expected):
            same = found == expected[: len(found)]
            first = start + (len(same) if same.all() else int(same.argmin()))
            nearby = tokenizer.decode(tokens[max(0, first - 4) : first + 4])
            raise UserError(
                f"splits this text differently from lit_gpt's version of it, near {nearby!r}",
                field="tokenizer",
                value=str(folder),
                hint="use another tokenizer",
            )
        start += len(expected)
    assert start == len(tokens)
    return True


def _join(texts: Iterable[str | None]) -> Iterator[str | None]:
    """Joins short parts, so that ids across their cuts are compared, too."""
    joined = ""
    for text in texts:
        if text is None or len(joined) > PART:
            yield joined
            joined = ""
        if text is None:
            yield None
        else:
            joined += text
    yield joined
