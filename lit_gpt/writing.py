"""Owns the generate command: options in, streamed text out."""

from __future__ import annotations

import sys
from argparse import Namespace
from itertools import takewhile
from pathlib import Path

import torch

from lit_gpt.checkpoint import load_checkpoint, newest_checkpoint
from lit_gpt.errors import UserError
from lit_gpt.sampling import Sampling, generate, stream_text


def write_samples(options: Namespace) -> None:
    """Prints the prompt and what the model adds to it, as it is written; options of generate.py.

    A sample ends where the model ends the document. Without a prompt it begins a new one, or where
    the training text had no documents a new line.

    Raises:
        UserError: no checkpoint, or options out of range.
    """
    if not 0 <= options.seed < 2**63 - options.num_samples:
        raise UserError(f"--seed must be 0 or more and below 2**63, not {options.seed}")
    for name in ("max_new_tokens", "num_samples"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} must be at least 1, not {getattr(options, name)}")
    sampling = Sampling(
        options.temperature, options.top_k, options.top_p, options.repetition_penalty
    )
    model, tokenizer = load_checkpoint(options.ckpt_path or find_newest(options.logs))
    try:
        # The model needs something to go on from.
        prompt = options.prompt or ("\n" if tokenizer.end_of_text is None else "")
        ids = tokenizer.encode(prompt).astype("int64") if prompt else [tokenizer.end_of_text]
        ids = torch.as_tensor(ids)[None]  # (1, T)
    except UnicodeEncodeError as error:
        raise UserError(
            "--prompt is not valid Unicode text: check the terminal's encoding"
        ) from error
    for i in range(options.num_samples):
        seed = options.seed + i
        if options.num_samples > 1:
            print(f"--- sample {i + 1}, seed {seed}")
        print(prompt, end="", flush=True)
        new = generate(model, ids, options.max_new_tokens, sampling, seed, tokenizer)
        new_ids = takewhile(lambda i: i != tokenizer.end_of_text, map(int, new))
        for text in stream_text(tokenizer, new_ids):
            print(text, end="", flush=True)
        print()


def find_newest(logs: str) -> Path:
    path = newest_checkpoint(logs, "best") or newest_checkpoint(logs, "last")
    if path is None:
        raise UserError(
            f"no checkpoint below {logs!r}: train a model first, or name one with --ckpt_path"
        )
    print(f"Using {path}", file=sys.stderr)
    return path
