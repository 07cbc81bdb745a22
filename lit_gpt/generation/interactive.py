"""The conversation of `generate --interactive`: prompts, answers, commands, history."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from typing import Any

from lit_gpt.errors import UserError
from lit_gpt.generation.completion import CompletionChunk, Request, complete
from lit_gpt.generation.generate import escape, print_text, unescape
from lit_gpt.generation.sampling import Sampling
from lit_gpt.model import GPT
from lit_gpt.text.tokenizer import Tokenizer

HELP = """\
Type some text, and the model continues it. Ctrl-C stops the answer, /quit or Ctrl-D the program.
/temperature 0.5   also /top_k (none: all), /top_p, /min_p, /repetition_penalty,
                   /frequency_penalty, /presence_penalty
/max_new_tokens 50 maximum tokens per answer
/seed 7            of the next answer; each answer adds 1
/stop \\n           end before this text; add several, /stop alone removes them
/trace on          show the likeliest tokens of each step; /trace off
/more              continue the last answer
/options           show the current options
/history           show all prompts and answers
//text             a prompt that starts with /"""
SAMPLING = {field.name for field in fields(Sampling)}
OPTIONS: dict[str, Callable[[str], Any]] = {  # with the parser of its value
    "temperature": float,
    "top_k": lambda value: None if value == "none" else int(value),
    "top_p": float,
    "min_p": float,
    "repetition_penalty": float,
    "frequency_penalty": float,
    "presence_penalty": float,
    "max_new_tokens": int,
    "seed": int,
    "stop": lambda value: (unescape(value),) if value else (),
    "trace": ["off", "on"].index,
}


@dataclass
class Session:
    """One conversation; a prompt doesn't see earlier ones, and /more continues the last answer.

    Args:
        model: in eval mode.
        tokenizer: the model's.
        request: how the next answer is drawn; each answer adds 1 to the seed.
        history: prompts and answers.
    """

    model: GPT
    tokenizer: Tokenizer
    request: Request
    history: list[tuple[str, str]] = field(default_factory=list)

    greeting = "Type some text to continue; /help lists the commands."
    help = HELP

    def run(self) -> None:
        """Reads lines until /quit or the end of the input."""
        with suppress(ImportError):  # lets arrow keys edit the line and recall earlier ones
            import readline  # noqa: F401
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(errors="surrogateescape")  # `answer` reports invalid text
        print(self.greeting)
        while True:
            try:
                line = input("> ").rstrip("\r")
            except EOFError:
                print()
                return
            except KeyboardInterrupt:  # drops the line, as in a shell
                if not sys.stdin.isatty():
                    raise
                print()
                continue
            if line in ("/quit", "/exit"):
                return
            try:
                self.handle(line)
            except UserError as error:
                print(f"error: {error.render('/{}'.format)}")

    def handle(self, line: str) -> None:
        """Answers a prompt or executes a command.

        Raises:
            UserError: an unknown command, or a value that it doesn't take.
        """
        if line.startswith("/") and not line.startswith("//"):
            name, _, value = line[1:].partition(" ")
            self.execute(name, value if name == "stop" else value.strip())
        elif line:
            self.answer(line.removeprefix("/"))

    def execute(self, name: str, value: str) -> None:
        if name == "help":
            print(self.help)
        elif name == "options":
            print(self.options())
        elif name == "history":
            for prompt, text in self.history:
                print(f"> {prompt}\n{text}")
        elif name == "more" and not self.history:
            raise UserError("there is no answer to continue yet", field=name)
        elif name == "more":
            self.answer("".join(self.history[-1]))
        elif name in OPTIONS:
            self.request = self.changed(name, value)
        else:
            hint = f"/help lists the commands, //{name} is a prompt"
            raise UserError(f"unknown command /{name}", hint=hint)

    def changed(self, name: str, value: str) -> Request:
        """The request with one option changed."""
        try:
            new = OPTIONS[name](value)
        except ValueError as error:
            wanted = "on or off" if name == "trace" else "a number"
            raise UserError(f"must be {wanted}", field=name, value=value) from error
        if name in SAMPLING:
            return replace(self.request, sampling=replace(self.request.sampling, **{name: new}))
        if name == "stop" and value:
            new = self.request.stop + new
        return replace(self.request, **{name: new})

    def options(self) -> str:
        """The current options, as the commands that set them."""
        values = vars(self.request.sampling) | vars(self.request)
        values["top_k"] = values["top_k"] or "none"
        values["stop"] = " ".join(map(escape, values["stop"]))
        values["trace"] = "on" if values["trace"] else "off"
        return "\n".join(f"/{name} {values[name]}".rstrip() for name in OPTIONS)

    def answer(self, prompt: str) -> None:
        """Prints the prompt and its completion."""
        text = self.write(replace(self.request, prompt=prompt))
        self.history.append((prompt, text))

    def write(self, request: Request) -> str:
        """Prints the completion; Ctrl-C ends it, and what is there is kept."""
        self.request = replace(self.request, seed=(request.seed + 1) % 2**63)
        pieces: list[CompletionChunk] = []

        def recorded() -> Iterator[CompletionChunk]:
            for piece in complete(self.model, self.tokenizer, [request]):
                pieces.append(piece)
                yield piece

        try:
            with suppress(KeyboardInterrupt):
                print_text(request, recorded(), self.tokenizer)
        except UnicodeEncodeError as error:
            hint = "check the terminal's encoding"
            raise UserError("the prompt is not valid Unicode text", hint=hint) from error
        text = "".join(piece.text for piece in pieces)
        if self.request.stop and not text and pieces and pieces[-1].finish_reason == "stop":
            print("(The answer starts with a stop sequence; /stop removes them all.)")
        return text
