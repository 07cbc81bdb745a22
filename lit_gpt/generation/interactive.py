"""Owns the conversation of generate.py --interactive: prompts, answers, commands, history."""

from __future__ import annotations

import io
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from typing import Any

from lit_gpt.checkpoint import find_newest, load_checkpoint
from lit_gpt.errors import UserError
from lit_gpt.generation.completion import Piece, Request, complete
from lit_gpt.generation.generate import escape, first_request, print_text, unescape
from lit_gpt.generation.sampling import Sampling
from lit_gpt.model import GPT
from lit_gpt.text.tokenizer import Tokenizer

HELP = """\
Type a text, and the model goes on from it. Ctrl-C ends the answer, /quit or Ctrl-D the program.
/temperature 0.5   also /top_k (none: all), /top_p, /min_p, /repetition_penalty
/max_new_tokens 50 the most tokens of an answer; /seed 7 for the next one
/stop \\n           end before this text; several may be given, /stop alone forgets them
/trace on          show the likeliest tokens of each step; /trace off
/more              go on from where the last answer ended
/options           how answers are drawn now
/history           what was asked and answered
//text             a prompt that begins with /"""
SAMPLING = {field.name for field in fields(Sampling)}
OPTIONS: dict[str, Callable[[str], Any]] = {  # what reads the value of each
    "temperature": float,
    "top_k": lambda value: None if value == "none" else int(value),
    "top_p": float,
    "min_p": float,
    "repetition_penalty": float,
    "max_new_tokens": int,
    "seed": int,
    "stop": lambda value: (unescape(value),) if value else (),
    "trace": ["off", "on"].index,
}


def converse(options: Namespace) -> None:
    """Asks for prompts and completes them, until there are no more; options of generate.py.

    Raises:
        UserError: no checkpoint, or options out of range.
    """
    if options.json or options.prompt or options.prompt_file or options.num_samples > 1:
        raise UserError(
            "--interactive asks for prompts and answers each once: leave out --prompt, "
            "--prompt_file, --num_samples and --json"
        )
    request = first_request(options)
    Session(*load_checkpoint(options.ckpt_path or find_newest(options.logs)), request).run()


@dataclass
class Session:
    """One conversation; each prompt stands for itself, /more goes on.

    Args:
        model: in eval mode.
        tokenizer: the model's.
        request: how the next answer is drawn; after each answer the seed is one higher.
        history: prompts and answers.
    """

    model: GPT
    tokenizer: Tokenizer
    request: Request
    history: list[tuple[str, str]] = field(default_factory=list)

    def run(self) -> None:
        """Reads lines until the end of the input or /quit."""
        with suppress(ImportError):  # arrow keys edit the line and bring back earlier ones
            import readline  # noqa: F401
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(errors="surrogateescape")  # for `answer` to say what is wrong
        print("Type a text to go on from; /help lists the commands.")
        while True:
            try:
                line = input("> ").rstrip("\r")
            except EOFError:
                print()
                return
            except KeyboardInterrupt:  # as in a shell: what was typed is forgotten
                if not sys.stdin.isatty():
                    raise
                print()
                continue
            if line in ("/quit", "/exit"):
                return
            try:
                self.handle(line)
            except UserError as error:
                print(f"error: {error}")

    def handle(self, line: str) -> None:
        """One prompt or command."""
        if line.startswith("/") and not line.startswith("//"):
            name, _, value = line[1:].partition(" ")
            self.obey(name, value if name == "stop" else value.strip())
        elif line:
            self.answer(line.removeprefix("/"))

    def obey(self, name: str, value: str) -> None:
        if name == "help":
            print(HELP)
        elif name == "options":
            print(self.options())
        elif name == "history":
            for prompt, text in self.history:
                print(f"> {prompt}\n{text}")
        elif name == "more":
            if not self.history:
                raise UserError("/more: there is no answer yet to go on from")
            self.answer("".join(self.history[-1]))
        elif name in OPTIONS:
            self.request = self.changed(name, value)
        else:
            raise UserError(f"/{name} is no command: /help lists them, //{name} is a text")

    def changed(self, name: str, value: str) -> Request:
        """The options with one of them new."""
        try:
            new = {name: OPTIONS[name](value)}
        except ValueError as error:
            kind = "on or off" if name == "trace" else "a number"
            raise UserError(f"/{name} takes {kind}, not {value!r}") from error
        if name == "stop" and value:
            new["stop"] = self.request.stop + new["stop"]
        try:
            if name in SAMPLING:
                new = {"sampling": replace(self.request.sampling, **new)}
            return replace(self.request, **new)
        except UserError as error:
            raise UserError(str(error).replace("--", "/")) from error

    def options(self) -> str:
        """As commands."""
        values = vars(self.request.sampling) | vars(self.request)
        values["top_k"] = values["top_k"] or "none"
        values["stop"] = " ".join(map(escape, values["stop"]))
        values["trace"] = "on" if values["trace"] else "off"
        return "\n".join(f"/{name} {values[name]}".rstrip() for name in OPTIONS)

    def answer(self, prompt: str) -> None:
        """Prints the prompt and what follows; Ctrl-C ends it, and keeps what there is."""
        request = replace(self.request, prompt=prompt)
        self.request = replace(self.request, seed=(request.seed + 1) % 2**63)
        pieces: list[Piece] = []

        def kept() -> Iterator[Piece]:
            for piece in complete(self.model, self.tokenizer, [request]):
                pieces.append(piece)
                yield piece

        try:
            with suppress(KeyboardInterrupt):
                print_text(request, kept(), self.tokenizer)
        except UnicodeEncodeError as error:
            raise UserError(
                "that is not valid Unicode text: check the terminal's encoding"
            ) from error
        text = "".join(piece.text for piece in pieces)
        self.history.append((prompt, text))
        if request.stop and not text and pieces and pieces[-1].finish_reason == "stop":
            print("(A stop ends it at once; /stop forgets the stops.)")
