"""The generate command: completes prompts and prints them, as streamed text or JSON lines."""

from __future__ import annotations

import re
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import islice
from json import dumps
from pathlib import Path
from typing import Any

from lit_gpt.checkpoint import load_checkpoint
from lit_gpt.command import call
from lit_gpt.errors import UserError, check_least
from lit_gpt.generation.completion import CompletionChunk, Request, complete
from lit_gpt.generation.language_model import find_checkpoint
from lit_gpt.generation.sampling import Sampling
from lit_gpt.generation.trace import as_dict, as_table
from lit_gpt.model import GPT
from lit_gpt.text.tokenizer import Tokenizer

ESCAPES = {"n": "\n", "t": "\t", "\\": "\\"}
BATCH_SIZE = 32  # requests completed side by side


def print_completions(
    *,
    ckpt_path: str | None = None,
    logs: str = "logs",
    prompt: tuple[str, ...] = (),
    prompt_file: str | None = None,
    num_samples: int = 1,
    request: Request,
    stop: tuple[str, ...] = (),
    interactive: bool = False,
    chat: bool = False,
    system: str | None = None,
    json: bool = False,
) -> None:
    r"""Write text with a trained model.

    Args:
        ckpt_path: checkpoint, run's folder, best or last; default: the newest run's best.
        logs: where to look for the newest run.
        prompt: text to continue, may be repeated; default: a new document or line.
        prompt_file: a text file with a prompt in each line.
        num_samples: completions of each prompt.
        request: how the first sample is drawn.
        stop: stop sequence, may be repeated; \n: the end of the line.
        interactive: ask for prompts; /help lists the commands.
        chat: treat each prompt as a chat message and answer it with the model's chat template.
        system: what a chat model is told first; default: what its template says, if anything.
        json: print each completion as a line of JSON.

    Raises:
        UserError: no checkpoint, a prompt that can't be read, or a value out of range.
    """
    check_least(1, num_samples=num_samples)
    if system is not None and not chat:
        raise UserError("only applies to chats", field="system", hint="add `chat`")
    request = replace(request, stop=tuple(map(unescape, stop)))
    if interactive:
        if prompt or prompt_file or num_samples > 1 or json:
            hint = "leave out `prompt`, `prompt_file`, `num_samples` and `json`"
            problem = "reads prompts from the terminal and completes each one once"
            raise UserError(problem, field="interactive", hint=hint)
        model, tokenizer = load_checkpoint(find_checkpoint(ckpt_path, logs))
        start_session(model, tokenizer, request, chat, system)
        return
    if chat and not (prompt or prompt_file):
        hint = "give one with `prompt`, or add `interactive`"
        raise UserError("needs a message to answer", field="chat", hint=hint)
    prompts = read_prompts(prompt, prompt_file)
    replace(request, seed=request.seed + num_samples - 1)  # checks the last seed
    model, tokenizer = load_checkpoint(find_checkpoint(ckpt_path, logs))
    asked = [
        as_chat(request, model, tokenizer, text, system) if chat else replace(request, prompt=text)
        for text in prompts
    ]
    requests = (
        replace(one, seed=one.seed + sample) for one in asked for sample in range(num_samples)
    )
    print_one = print_json if json else print_text
    has_headings = (len(prompts) > 1 or num_samples > 1) and not json
    for number, (one, pieces) in enumerate(complete_all(model, tokenizer, requests)):
        if has_headings:
            index, sample = divmod(number, num_samples)
            which = f"prompt {index + 1}, " if len(prompts) > 1 else ""
            print(f"--- {which}sample {sample + 1}, seed {one.seed}")
        print_one(one, pieces, tokenizer)


def start_session(
    model: GPT, tokenizer: Tokenizer, request: Request, chat: bool, system: str | None
) -> None:
    """Answers at the terminal."""
    # These import this module.
    from lit_gpt.generation.chat import ChatSession
    from lit_gpt.generation.interactive import Session

    if chat:
        ChatSession(model, tokenizer, request, system=system).run()
    else:
        Session(model, tokenizer, request).run()


def as_chat(
    request: Request, model: GPT, tokenizer: Tokenizer, prompt: str, system: str | None
) -> Request:
    """The request for the answer to one message."""
    from lit_gpt.generation.chat import chat_request, check_fits, conversation

    request = chat_request(request, tokenizer, conversation(system, prompt))
    check_fits(request, model)
    return request


def read_prompts(prompts: tuple[str, ...], file: str | None) -> list[str]:
    """The prompts and the lines of the file; one empty prompt if there are neither."""
    found = list(prompts)
    if file is not None:
        try:
            lines = Path(file).read_text(encoding="utf-8-sig").split("\n")
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
            problem = f"can't be read ({reason})"
            hint = "give a UTF-8 text file with a prompt in each line"
            raise UserError(problem, field="prompt_file", value=file, hint=hint) from error
        found += [line for line in lines if line.strip()]
        if not found:
            raise UserError("has no line with a prompt", field="prompt_file", value=file)
    try:
        "".join(found).encode()
    except UnicodeEncodeError as error:
        hint = "check the terminal's encoding"
        raise UserError("is not valid Unicode text", field="prompt", hint=hint) from error
    return found or [""]


def complete_all(
    model: GPT, tokenizer: Tokenizer, requests: Iterable[Request]
) -> Iterator[tuple[Request, Iterator[CompletionChunk]]]:
    """Yields each request with its pieces, in order; BATCH_SIZE of them are computed at once."""
    requests = iter(requests)
    while batch := list(islice(requests, BATCH_SIZE)):
        waiting: list[deque[CompletionChunk]] = [deque() for _ in batch]
        pieces = complete(model, tokenizer, batch)
        for index, request in enumerate(batch):
            yield request, _pieces_of(index, waiting, pieces)


def _pieces_of(
    index: int, waiting: list[deque[CompletionChunk]], pieces: Iterator[CompletionChunk]
) -> Iterator[CompletionChunk]:
    """Yields the pieces of one request as they come; those of others join `waiting`."""
    is_finished = False
    while not is_finished:
        while not waiting[index]:
            piece = next(pieces)
            waiting[piece.index].append(piece)
        piece = waiting[index].popleft()
        is_finished = piece.finish_reason is not None
        yield piece


def print_text(request: Request, pieces: Iterable[CompletionChunk], tokenizer: Tokenizer) -> None:
    """Prints the prompt, its completion piece by piece, and the trace if there is one.

    Of a chat, only the answer is printed.
    """
    starts_line = not request.prompt and tokenizer.learnt_end is None
    if not request.ids:
        print("\n" if starts_line else request.prompt, end="", flush=True)
    choices = []
    try:
        for piece in pieces:
            print(piece.text, end="", flush=True)
            if piece.choice:
                choices.append(piece.choice)
    finally:  # Ctrl-C
        print()
        if choices:
            from rich.console import Console

            console = Console(width=None if sys.stdout.isatty() else 120)
            console.print(as_table(choices, tokenizer))


def print_json(request: Request, pieces: Iterable[CompletionChunk], tokenizer: Tokenizer) -> None:
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
        line["trace"] = [as_dict(piece.choice, tokenizer) for piece in pieces if piece.choice]
    is_unicode = (sys.stdout.encoding or "").lower().startswith("utf")
    print(dumps(line, ensure_ascii=not is_unicode), flush=True)


def unescape(text: str) -> str:
    r"""Replaces \n, \t and \\ by a newline, a tab and a backslash."""
    return re.sub(r"\\([nt\\])", lambda match: ESCAPES[match[1]], text)


def escape(text: str) -> str:
    """The inverse of `unescape`."""
    return text.translate({ord(value): f"\\{letter}" for letter, value in ESCAPES.items()})


def main(argv: list[str]) -> int:
    call(print_completions, argv, Request, Sampling)
    return 0
