"""Check that an exported folder is the model: the same tokens, logits and greedy text."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lit_gpt.errors import UserError
from lit_gpt.generation.sampling import Sampling, generate
from lit_gpt.huggingface.architectures import TOLERANCE, logit_difference
from lit_gpt.huggingface.tokenizer import import_transformers
from lit_gpt.model import GPT
from lit_gpt.text.chat import ChatTemplate, marked
from lit_gpt.text.corpus import Corpus
from lit_gpt.text.token_file import split_at
from lit_gpt.text.tokenizer import Tokenizer

NUM_WINDOWS = 8
MAX_GREEDY = 64  # tokens


def check_export(
    folder: Path,
    model: GPT,
    corpus: Corpus,
    train_fraction: float,
    adapt: Callable[[Any], Any] = lambda theirs: theirs,
) -> list[str]:
    """Loads the folder as its users will, and compares it with the model.

    Args:
        corpus: a text, encoded by our tokenizer.
        train_fraction: logits are compared on what follows this share of the tokens.
        adapt: makes the model of that of the folder.

    Returns:
        A line for each comparison.

    Raises:
        UserError: something differs.
    """
    load = import_transformers()
    check_tokens(load.AutoTokenizer.from_pretrained(folder, local_files_only=True), corpus)
    theirs = load.AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    theirs = adapt(theirs).eval()
    windows = spread_windows(corpus.tokens, train_fraction, model.config.context_length)
    num_windows, length = windows.shape
    difference, limit = check_logits(theirs, model, windows)
    prompt = windows[:1, : max(1, length // 2)]
    num_greedy, is_tie = check_greedy(theirs, model, prompt, corpus.tokenizer.end_ids)
    end = ", then two tokens are equally likely" if is_tie else ""
    return [
        f"Tokens: {len(corpus.tokens):,} identical",
        f"Logits on {num_windows} windows of {length} tokens: largest difference "
        f"{difference:.1e}, below {limit:.0e}",
        f"Greedy text: {num_greedy} tokens identical{end}",
    ]


def differs(problem: str) -> UserError:
    return UserError(
        problem,
        hint="this is a bug in lit_gpt or in the installed transformers, so nothing was written",
    )


def check_tokens(theirs: Any, corpus: Corpus) -> None:
    """Compares the ids of the whole text, and of its end; memory doesn't grow with it."""
    done = 0
    ends = corpus.tokenizer.end_ids
    if ends and theirs.eos_token_id not in ends:
        raise differs(f"the exported tokenizer ends a text with token {theirs.eos_token_id}")
    for text in corpus.parts():
        ids = [corpus.tokenizer.end_of_text]
        if text is not None:
            plain = {"split_special_tokens": True, "add_special_tokens": False}
            ids = theirs(text, verbose=False, **plain)["input_ids"]
        found = np.array(ids)
        expected = corpus.tokens[done : done + len(found)]
        if text is not None and (other := ids_with_visible(corpus.tokenizer, text)) is not None:
            expected = other
            done += len(corpus.tokenizer.encode(text)) - len(other)
        same = found[: len(expected)] == expected[: len(found)]
        if not same.all():
            i = int(same.argmin())
            raise differs(
                f"the exported tokenizer splits the text differently: token {done + i:,} is "
                f"{found[i]}, not {expected[i]}"
            )
        done += len(found)
    total = len(corpus.tokens)
    if done != total:
        raise differs(f"the exported tokenizer splits the text into {done:,} tokens, not {total:,}")


def ids_with_visible(tokenizer: Tokenizer, text: str) -> np.ndarray | None:
    """What a text is to other programs, to which visible special tokens in it are tokens.

    None if it has none: then it is what it is to ours.
    """
    if not any(name in text for name in tokenizer.visible_names):
        return None
    return tokenizer.encode_chat(marked(text, ChatTemplate.of(tokenizer).special))


def spread_windows(tokens: np.ndarray, train_fraction: float, length: int) -> Tensor:
    """Windows (N, T) of ids, spread evenly over the validation split.

    They come from the whole text if that split is shorter than one window, and are shorter if the
    text is.
    """
    validation = tokens[split_at(len(tokens), train_fraction) :]
    if len(validation) >= length:
        tokens = validation
    length = min(length, len(tokens))
    starts = np.linspace(0, len(tokens) - length, NUM_WINDOWS).astype(np.int64)
    windows = tokens[np.unique(starts)[:, None] + np.arange(length)]
    return torch.from_numpy(windows.astype(np.int64))


@torch.inference_mode()
def check_logits(
    theirs: Any, model: GPT, windows: Tensor, is_exact: bool = True
) -> tuple[float, float]:
    """The largest difference on windows (N, T), and its limit, which binds where `is_exact`.

    Takes one window at a time, because the logits of a large vocabulary need much memory.
    """
    largest = (0.0, TOLERANCE)
    for window in windows:
        ours = model(window[None])  # (1, T, V)
        difference, limit = logit_difference(ours, theirs(window[None]).logits)
        if not difference < (limit if is_exact else math.inf):  # also refuses NaN
            raise differs(
                f"the exported model's logits differ by up to {difference:.1e} (the limit is "
                f"{limit:.1e})"
            )
        largest = max(largest, (difference, limit))
    return largest


def check_greedy(
    theirs: Any, model: GPT, prompt: Tensor, ends: Collection[int]
) -> tuple[int, bool]:
    """How many tokens after the prompt (1, T) are the same, and whether a tie ends them."""
    room = model.config.context_length - prompt.size(1) + 1  # the last one need not be read
    new = generate(model, prompt, min(MAX_GREEDY, room), Sampling(temperature=0))
    ours = torch.cat(list(new)).tolist()
    first_end = next((place for place, i in enumerate(ours) if i in ends), len(ours))
    ours = ours[: first_end + 1]
    mask = torch.ones_like(prompt)
    output = theirs.generate(prompt, attention_mask=mask, max_new_tokens=len(ours), do_sample=False)
    found = output[0, prompt.size(1) :].tolist()
    return common_text(model, prompt, ours, found)


def common_text(
    model: GPT, prompt: Tensor, ours: list[int], found: list[int], is_exact: bool = True
) -> tuple[int, bool]:
    """How many tokens after the prompt (1, T) are the same, and whether a tie ends them.

    Raises:
        UserError: others follow without a tie, although the weights are the same (`is_exact`).
    """
    if found == ours:
        return len(ours), False
    pairs = zip(ours, found, strict=False)
    same = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(ours), len(found)))
    if same < min(len(ours), len(found)):
        ids = torch.cat([prompt[0], torch.tensor(ours[:same], dtype=torch.int64)])
        with torch.inference_mode():
            logits = model(ids[None])[0, -1]  # (V,)
        if (logits[ours[same]] - logits[found[same]]).abs() < TOLERANCE:
            return same, True
    if not is_exact:
        return same, False
    raise differs(
        f"the exported model's greedy text differs from token {same + 1} of {len(ours)} on"
    )
