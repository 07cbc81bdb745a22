"""Owns the generate command: options in; prompts completed, as streamed text or as JSON lines."""

from __future__ import annotations

import json
import re
import sys
from argparse import Namespace
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from lit_gpt.checkpoint import find_newest, load_checkpoint
from lit_gpt.errors import UserError
from lit_gpt.generation.completion import Piece, Request, complete
from lit_gpt.generation.sampling import Sampling
from lit_gpt.generation.trace import as_dict, as_table
from lit_gpt.model import GPT
from lit_gpt.text.tokenizer import Tokenizer

ESCAPES = {"n": "\n", "t": "\t", "\\": "\\"}
BATCH_SIZE = 32  # completed side by side, of those that are asked for


def write_samples(options: Namespace) -> None:
    """Prints prompts and what the model adds to them, as it is written; options of generate.py.

    Raises:
        UserError: no checkpoint, a prompt that can't be read, or options out of range.
    """
    first, prompts = first_request(options), read_prompts(options)
    if options.num_samples < 1:
        raise UserError(f"--num_samples must be at least 1, not {options.num_samples}")
    replace(first, seed=options.seed + options.num_samples - 1)  # the last one's, as it is checked
    model, tokenizer = load_checkpoint(options.ckpt_path or find_newest(options.logs))
    requests = (
        replace(first, prompt=prompt, seed=options.seed + i)
        for prompt in prompts
        for i in range(options.num_samples)
    )
    print_one = print_json if options.json else print_text
    headed = (len(prompts) > 1 or options.num_samples > 1) and not options.json
    for number, (request, pieces) in enumerate(complete_all(model, tokenizer, requests)):
        if headed:
            prompt, sample = divmod(number, options.num_samples)
            of_prompt = f"prompt {prompt + 1}, " if len(prompts) > 1 else ""
            print(f"--- {of_prompt}sample {sample + 1}, seed {request.seed}")
        print_one(request, pieces, tokenizer)


def first_request(options: Namespace) -> Request:
    """How the first completion is drawn; its prompt is not there yet."""
    o = options
    sampling = Sampling(o.temperature, o.top_k, o.top_p, o.repetition_penalty, o.min_p)
    stop = tuple(map(unescape, o.stop or []))
    return Request("", o.max_new_tokens, sampling, o.seed, stop, o.trace)


def read_prompts(options: Namespace) -> list[str]:
    """Those of --prompt and the lines of --prompt_file; one without text where there are none."""
    prompts = list(options.prompt or [])
    if options.prompt_file:
        try:
            lines = Path(options.prompt_file).read_text(encoding="utf-8-sig").split("\n")
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
            raise UserError(
                f"--prompt_file {options.prompt_file} can't be read ({reason}): give a text file "
                "in UTF-8 with a prompt in each line"
            ) from error
        prompts += [line for line in lines if line.strip()]
        if not prompts:
            raise UserError(f"--prompt_file {options.prompt_file} has no line with a prompt")
    try:
        "".join(prompts).encode()
    except UnicodeEncodeError as error:
        raise UserError(
            "--prompt is not valid Unicode text: check the terminal's encoding"
        ) from error
    return prompts or [""]


def complete_all(
    model: GPT, tokenizer: Tokenizer, requests: Iterable[Request]
) -> Iterator[tuple[Request, Iterator[Piece]]]:
    """Each request with its pieces, one after the other; a batch of them is computed at once."""
    requests = iter(requests)
    while batch := list(islice(requests, BATCH_SIZE)):
        waiting: list[list[Piece]] = [[] for _ in batch]
        pieces = complete(model, tokenizer, batch)
        for index, request in enumerate(batch):
            yield request, of_request(index, waiting, pieces)


def of_request(index: int, waiting: list[list[Piece]], pieces: Iterator[Piece]) -> Iterator[Piece]:
    """The pieces of one request as they come; those of the others, on the way, wait."""
    yield from waiting[index]
    if waiting[index] and waiting[index][-1].finish_reason:
        return
    for piece in pieces:
        if piece.index != index:
            waiting[piece.index].append(piece)
            continue
        yield piece
        if piece.finish_reason:
            return


def print_text(request: Request, pieces: Iterable[Piece], tokenizer: Tokenizer) -> None:
    """Prints prompt and completion as they come, then the trace if there is one."""
    lead = "" if request.prompt or tokenizer.end_of_text is not None else "\n"
    print(lead + request.prompt, end="", flush=True)
    choices = []
    try:
        for piece in pieces:
            print(piece.text, end="", flush=True)
            choices.append(piece.choice)
    finally:  # Ctrl-C
        print()
        if request.trace and choices:
            from rich.console import Console

            width = None if sys.stdout.isatty() else 120
            Console(width=width).print(as_table(choices, tokenizer))


def print_json(request: Request, pieces: Iterable[Piece], tokenizer: Tokenizer) -> None:
    """Prints the finished completion as one line of JSON."""
    pieces = list(pieces)
    line: dict[str, Any] = {
        "prompt": request.prompt,
        "text": "".join(piece.text for piece in pieces),
        "finish_reason": pieces[-1].finish_reason,
        "num_tokens": pieces[-1].num_tokens,
        "seed": request.seed,
    }
    if request.trace:
        line["trace"] = [as_dict(piece.choice, tokenizer) for piece in pieces]
    is_unicode = (sys.stdout.encoding or "").lower().startswith("utf")
    print(json.dumps(line, ensure_ascii=not is_unicode), flush=True)


def unescape(text: str) -> str:
    r"""Of a command line, where a line end is hard to type: \n, \t and \\ are one character."""
    return re.sub(r"\\([nt\\])", lambda match: ESCAPES[match[1]], text)


def escape(text: str) -> str:
    """The text that `unescape` makes this of."""
    return text.translate({ord(value): f"\\{letter}" for letter, value in ESCAPES.items()})
