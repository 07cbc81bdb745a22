"""Check that a GGUF file is the model: read back by transformers, and run by llama.cpp."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lit_gpt.errors import UserError
from lit_gpt.generation.sampling import Sampling, generate
from lit_gpt.huggingface.architectures import layout_of
from lit_gpt.huggingface.config import hf_config
from lit_gpt.huggingface.export_check import (
    check_logits,
    common_text,
    differs,
    ids_with_visible,
    spread_windows,
)
from lit_gpt.huggingface.gguf_file import GGUFType, end_ids, import_gguf
from lit_gpt.huggingface.llama_cpp import LlamaCpp
from lit_gpt.huggingface.tokenizer import import_transformers, in_one_line
from lit_gpt.model import GPT
from lit_gpt.text.chat import ChatTemplate
from lit_gpt.text.corpus import Corpus
from lit_gpt.text.tokenizer import Tokenizer

NUM_PROMPTS = 5
MAX_GREEDY = 60  # tokens after each
MAX_TEXT = 1 << 20  # characters whose ids are compared
NOT_RUN = (
    "llama.cpp: not run, because llama-cpp-python is not installed: neither ids nor text are "
    "checked there (pip install llama-cpp-python)"
)


def check_gguf(
    path: Path, model: GPT, corpus: Corpus, train_fraction: float, kind: GGUFType
) -> list[str]:
    """Compares a file with the model, as programs will read and run it.

    Args:
        corpus: a text, encoded by our tokenizer.
        train_fraction: windows and prompts come from what follows this share of the tokens.
        kind: of the weights; only with f32 must logits and text be the same.

    Returns:
        A line for each comparison.

    Raises:
        UserError: something differs.
    """
    windows = spread_windows(corpus.tokens, train_fraction, model.config.context_length)
    lines = [size_of(path, kind), check_weights(path, model, windows, kind)]
    try:
        llama = LlamaCpp(path, model.config.context_length)
    except ImportError:
        return [*lines, NOT_RUN]
    except (ValueError, RuntimeError) as error:
        raise differs(f"llama.cpp can't load the file ({in_one_line(error)})") from error
    try:
        check_ends(llama, corpus.tokenizer)
        num_tokens = check_ids(llama, corpus)
        lines.append(f"llama.cpp: {num_tokens:,} tokens of the text identical")
        lines.append(check_text(llama, model, corpus.tokenizer, windows, kind))
    finally:
        llama.close()
    return lines


def size_of(path: Path, kind: GGUFType) -> str:
    """A line about the file's size, and which matrices are larger than asked for."""
    kinds = [tensor.tensor_type.name for tensor in import_gguf().GGUFReader(path).tensors]
    line = f"Size: {path.stat().st_size:,} bytes"
    if kind != "q8_0" or "F16" not in kinds:
        return line
    larger = kinds.count("F16")
    total = larger + kinds.count("Q8_0")
    return f"{line}; {larger} of {total} matrices are f16, as their rows are no multiple of 32"


def check_weights(path: Path, model: GPT, windows: Tensor, kind: GGUFType) -> str:
    """Compares the logits on windows (N, T) with those of the weights that transformers reads."""
    transformers = import_transformers()
    layout = layout_of(model.config)
    with redirect_stderr(io.StringIO()):  # of its progress bar
        theirs = getattr(transformers, layout.architecture).from_pretrained(
            path.parent,
            gguf_file=path.name,
            # It would miss some of the fields of the file, such as the size of heads.
            config=transformers.AutoConfig.for_model(**hf_config(model.config)),
            dtype=torch.float32,
            local_files_only=True,
        )
    largest, limit = check_logits(theirs.eval(), model, windows, is_exact=kind == "f32")
    count, length = windows.shape
    line = f"Logits on {count} windows of {length} tokens: largest difference {largest:.1e}"
    return f"{line}, below {limit:.0e}" if kind == "f32" else line


def check_ends(llama: LlamaCpp, tokenizer: Tokenizer) -> None:
    """Refuses a file with which llama.cpp ends elsewhere in a text than the model.

    It also ends at tokens whose names look like an end, such as an ordinary `</s>`.
    """
    expected = set(end_ids(tokenizer))
    missing = expected - llama.end_ids
    added = llama.end_ids - expected - set(tokenizer.special.values())  # no text has these
    for verb, ids in {"does not treat": missing, "treats": added}.items():
        if ids:
            token = tokenizer.decode([min(ids)])
            raise UserError(
                f"llama.cpp {verb} the token {token!r} as end of generation, unlike the model",
                hint="use a vocabulary without this token, or export for transformers",
            )


def texts_of(corpus: Corpus) -> Iterator[tuple[str, np.ndarray]]:
    """The first parts of the text, MAX_TEXT characters in all, and our ids of each."""
    done = 0
    num_characters = 0
    for text in corpus.parts():
        ids = 1 if text is None else len(corpus.tokenizer.encode(text))
        if text is not None:
            yield text, corpus.tokens[done : done + ids]
            num_characters += len(text)
        done += ids
        if num_characters >= MAX_TEXT:
            return


def check_ids(llama: LlamaCpp, corpus: Corpus) -> int:
    """Compares the ids of the text; how many there are."""
    done = 0
    for text, ids in texts_of(corpus):
        found = np.array(llama.encode(text))
        other = ids_with_visible(corpus.tokenizer, text)
        expected = ids if other is None else other
        if not np.array_equal(found, expected):
            length = min(len(found), len(expected))
            same = found[:length] == expected[:length]
            first = length if same.all() else int(same.argmin())
            nearby = corpus.tokenizer.decode(expected[max(0, first - 4) : first + 4])
            raise differs(f"llama.cpp splits the text differently, near {nearby!r}")
        done += len(expected)
    return done


def check_text(
    llama: LlamaCpp, model: GPT, tokenizer: Tokenizer, windows: Tensor, kind: GGUFType
) -> str:
    """Compares greedy text after prompts, the beginnings of some windows (N, T)."""
    length = windows.size(1)
    length = max(1, min(length // 2, model.config.context_length + 1 - MAX_GREEDY))
    hidden = ChatTemplate.of(tokenizer).special
    silent = {*(tokenizer.special[name] for name in hidden), *llama.end_ids}  # have no text there
    same, total, ties = 0, 0, 0
    for window in windows[:NUM_PROMPTS]:
        prompt = window[None, :length]
        ours = greedy(model, prompt, llama.end_ids)
        found = llama.greedy(prompt[0].tolist(), len(ours))
        common, is_tie = common_text(model, prompt, ours, found, is_exact=kind == "f32")
        text = [i for i in found[:common] if i not in silent]
        if llama.decode_bytes(text) != tokenizer.decode_bytes(text):
            raise differs("llama.cpp writes other text for the same tokens")
        same, total, ties = same + common, total + len(ours), ties + is_tie
    tied = f", {ties} of them up to two equally likely tokens" if ties else ""
    prompts = f"greedy text after {len(windows[:NUM_PROMPTS])} prompts"
    if kind == "f32":
        return f"llama.cpp: {prompts}, {same} tokens, identical{tied}"
    return f"llama.cpp: {prompts}, {same} of {total} tokens as in f32 before the first other one"


def greedy(model: GPT, prompt: Tensor, ends: set[int]) -> list[int]:
    """Our likeliest tokens after the prompt (1, T), up to one that ends it."""
    room = model.config.context_length - prompt.size(1) + 1  # the last one need not be read
    new = generate(model, prompt, min(MAX_GREEDY, room), Sampling(temperature=0))
    ids: list[int] = torch.cat(list(new)).tolist()
    end: Any = next((n for n, i in enumerate(ids, 1) if i in ends), None)
    return ids[:end]
