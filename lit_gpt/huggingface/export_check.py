"""Owns the proof that an exported folder is the model: same tokens, logits, greedy text."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lit_gpt.errors import UserError
from lit_gpt.generation.sampling import Sampling, generate
from lit_gpt.huggingface.architectures import TOLERANCE, check_logits
from lit_gpt.huggingface.tokenizer import import_transformers
from lit_gpt.model import GPT
from lit_gpt.text.corpus import Corpus, TextSource, split_at

NUM_WINDOWS = 8
MAX_GREEDY = 64  # tokens
REPORT = "this is a fault of lit_gpt or of the installed transformers, so nothing was written"


@dataclass(frozen=True)
class Findings:
    """What was compared; all of it agreed."""

    num_tokens: int  # of the text
    num_windows: int
    window_length: int
    difference: float  # the largest of a logit
    allowed: float
    num_greedy: int
    tie: bool  # whether the greedy texts part where two tokens are equally likely


def check_export(
    folder: Path, model: GPT, source: TextSource, corpus: Corpus, train_fraction: float
) -> Findings:
    """Loads the folder as its users will, and compares.

    Args:
        source: what `corpus` was made from, with our tokenizer.
        train_fraction: what follows this share of the tokens gives the windows for the logits.

    Raises:
        UserError: something is not the same.
    """
    load = import_transformers()
    check_tokens(load.AutoTokenizer.from_pretrained(folder, local_files_only=True), source, corpus)
    theirs = load.AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval()
    windows = spread_windows(corpus.tokens, train_fraction, model.config.context_length)
    difference, allowed = compare_logits(theirs, model, windows)
    half = windows[:1, : max(1, windows.size(1) // 2)]
    num_greedy, tie = compare_greedy(theirs, model, half, corpus.tokenizer.end_of_text)
    return Findings(len(corpus.tokens), *windows.shape, difference, allowed, num_greedy, tie)


def check_tokens(theirs: Any, source: TextSource, corpus: Corpus) -> None:
    """That the whole text becomes the same ids; memory doesn't grow with it."""
    done, end = 0, [theirs.eos_token_id]
    for text in source.parts(corpus):
        found = np.array(end if text is None else theirs(text, verbose=False)["input_ids"])
        expected = corpus.tokens[done : done + len(found)]
        same = found[: len(expected)] == expected
        if not same.all():
            at = int(same.argmin())
            raise UserError(
                f"the exported tokenizer splits the text otherwise: token {done + at:,} is "
                f"{found[at]}, not {expected[at]}; {REPORT}"
            )
        done += len(found)
    if done != len(corpus.tokens):
        raise UserError(
            f"the exported tokenizer makes {done:,} tokens of the text, not "
            f"{len(corpus.tokens):,}; {REPORT}"
        )


def spread_windows(tokens: np.ndarray, train_fraction: float, length: int) -> Tensor:
    """Ids (N, T) of windows spread over what validates; over all, or shorter, where it is short."""
    validating = tokens[split_at(len(tokens), train_fraction) :]
    if len(validating) >= length:
        tokens = validating
    length = min(length, len(tokens))
    starts = np.linspace(0, len(tokens) - length, NUM_WINDOWS).astype(np.int64)
    windows = tokens[np.unique(starts)[:, None] + np.arange(length)]
    return torch.from_numpy(windows.astype(np.int64))


@torch.inference_mode()
def compare_logits(theirs: Any, model: GPT, windows: Tensor) -> tuple[float, float]:
    """As `check_logits`, window by window: logits of a large vocabulary take much memory."""
    try:
        return max(check_logits(model(row[None]), theirs(row[None]).logits) for row in windows)
    except UserError as error:
        raise UserError(f"{error}; {REPORT}") from error


def compare_greedy(
    theirs: Any, model: GPT, prompt: Tensor, end_of_text: int | None
) -> tuple[int, bool]:
    """How many tokens both write alike after the prompt (1, T), and whether a tie ends that."""
    room = model.config.context_length - prompt.size(1) + 1  # the last one need not be read
    new = generate(model, prompt, min(MAX_GREEDY, room), Sampling(temperature=0))
    ours = torch.cat(list(new)).tolist()
    if end_of_text in ours:
        ours = ours[: ours.index(end_of_text) + 1]
    mask = torch.ones_like(prompt)
    options = {"max_new_tokens": len(ours), "do_sample": False, "attention_mask": mask}
    found = theirs.generate(prompt, **options)[0, prompt.size(1) :].tolist()
    if found == ours:
        return len(ours), False
    pairs = zip(ours, found, strict=False)
    same = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(ours), len(found)))
    if same < len(found):
        with torch.inference_mode():
            logits = model(torch.cat([prompt[0], torch.tensor(ours[:same])])[None].long())[0, -1]
        if (logits[ours[same]] - logits[found[same]]).abs() < TOLERANCE:
            return same, True
    raise UserError(
        f"the exported model's greedy text is another from token {same + 1} of {len(ours)} on; "
        f"{REPORT}"
    )
