"""How a command runs: options, Ctrl-C, one-line errors, exit status."""

from __future__ import annotations

import argparse
import errno
import io
import re
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from inspect import Parameter, signature
from pathlib import Path
from typing import Any, NoReturn, get_args, get_type_hints

import docstring_parser
import jsonargparse

from lit_gpt.errors import UserError

KINDS = {"int": "a whole number", "float": "a number", "bool": "true or false", "NoneType": "null"}
METAVARS = {int: "INT", float: "FLOAT", str: "TEXT"}


class OneLineErrors:
    """Makes an argument parser raise wrong options as a UserError."""

    positional: str | None = None  # the argument that has no option's name

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        hint = "--help lists all options"
        if required := re.match("(the following arguments are required: )(.+)", message):
            names = required[2].split(", ")
            names = [name if name == self.positional else f"`{name}`" for name in names]
            message = required[1] + ", ".join(names)
        if (key := re.match('Parser key "(.+?)": *', message)) is None:
            raise UserError(message, hint=hint)
        problem = message[key.end() :]
        expected = re.findall(r"Expected an? <class '(\w+)'>", problem)
        value = re.search(r"(?:Given|Got) value: (.+)", problem)
        if not expected or not value or not set(expected) <= set(KINDS):
            raise UserError(problem, field=key[1], hint=hint)
        problem = f"must be {' or '.join(KINDS[name] for name in expected)}"
        raise UserError(problem, field=key[1], value=value[1], hint=hint)


class ShortHelp(jsonargparse.DefaultHelpFormatter):
    """Help with one description and default per option; the metavar tells its type."""

    def _get_help_string(self, action: argparse.Action) -> str:
        if "--print_config" in action.option_strings:
            return "print the options as YAML for --config, and exit"
        text = (action.help or "").rstrip(".")
        if action.required:
            return f"{text} (required)" if action.option_strings else text
        has_default = str(action.default) not in ("None", "False", "[]", argparse.SUPPRESS)
        return f"{text} (default: %(default)s)" if has_default else text


class Parser(OneLineErrors, jsonargparse.ArgumentParser):
    """Options of a command, made from the signature of the function that it calls."""


def parser_of(
    function: Callable[..., Any], *settings: type, positional: str | None = None, **kwargs: Any
) -> Parser:
    """The options of a command: its function's parameters, with their types and defaults.

    Descriptions are those of the docstrings. `--config FILE` reads options from YAML. A bool that
    is off by default is a flag, and several texts (`tuple[str, ...]`) are a repeated option.

    Args:
        function: called by the command.
        settings: dataclasses; where a parameter or field is annotated with one, its fields are
            options, except those that `function` has a parameter of the same name for.
        positional: a parameter of type `list[str]`, given without the option's name.
        kwargs: of the parser, such as `prog`.
    """
    description = docstring_parser.parse(function.__doc__ or "").short_description
    values = f" {_metavar(positional)} ..." if positional else ""
    kwargs = {"prog": program(), "usage": f"%(prog)s [options]{values}"} | kwargs
    parser = Parser(description=description, default_env=False, formatter_class=ShortHelp, **kwargs)
    parser.positional = positional
    if "config" not in signature(function).parameters:  # else that is for other commands' options
        parser.add_argument("--config", action="config", metavar="FILE", help="YAML of options")
    _add_options(parser, function, settings, positional)
    return parser


def _add_options(
    parser: Parser,
    source: Callable[..., Any],
    settings: Sequence[type],
    positional: str | None = None,
    skip: Collection[str] = (),
) -> None:
    """Adds the parameters of a function or dataclass, and those of `settings` among them."""
    docs = {p.arg_name: p.description for p in docstring_parser.parse(source.__doc__ or "").params}
    hints = get_type_hints(source)
    parameters = signature(source).parameters
    for name, parameter in parameters.items():
        hint = hints[name]
        details: dict[str, Any] = {"help": docs.get(name, "")}
        if hint in settings:
            _add_options(parser, hint, settings, skip=[*skip, *parameters])
            continue
        if name in skip:
            continue
        if name == positional:
            parser.add_argument(name, nargs="+", metavar=_metavar(name), **details)
            continue
        is_required = parameter.default is Parameter.empty
        details |= {"required": True} if is_required else {"default": parameter.default}
        if hint is bool and parameter.default is False:
            details["action"] = "store_true"
        elif hint == tuple[str, ...]:
            details |= {"action": "extend", "type": _texts, "metavar": "TEXT"}
            details["default"] = list(parameter.default)
        else:
            details["type"] = hint
            metavars = {METAVARS.get(kind) for kind in (hint, *get_args(hint))} - {None}
            if len(metavars) == 1:
                details["metavar"] = metavars.pop()
        parser.add_argument(f"--{name}", **details)


def _metavar(positional: str) -> str:
    """One of the values of a positional parameter: RUN of `runs`."""
    return positional.removesuffix("s").upper()


def _texts(value: str | list[str]) -> list[str]:
    """The texts of one `--option TEXT`, or those that a file of options lists."""
    return [value] if isinstance(value, str) else [str(text) for text in value]


def call(
    function: Callable[..., Any],
    argv: list[str],
    *settings: type,
    positional: str | None = None,
    **kwargs: Any,
) -> Any:
    """Calls `function` with what the command line says; arguments as for `parser_of`."""
    parser = parser_of(function, *settings, positional=positional, **kwargs)
    options = vars(parser.parse_args(argv))

    def arguments(source: Callable[..., Any], skip: Collection[str] = ()) -> dict[str, Any]:
        hints = get_type_hints(source)
        parameters = signature(source).parameters
        values: dict[str, Any] = {}
        for name in parameters:
            hint = hints[name]
            if hint in settings:
                values[name] = hint(**arguments(hint, [*skip, *parameters]))
            elif name not in skip:
                values[name] = tuple(options[name]) if hint == tuple[str, ...] else options[name]
        return values

    return function(**arguments(function))


def is_script() -> bool:
    """Whether this process was started as scripts/COMMAND.py, not as `lit-gpt COMMAND`."""
    return Path(sys.argv[0]).stem not in ("lit-gpt", "__main__")


def program() -> str:
    """What the usage line calls this command."""
    return Path(sys.argv[0]).name if is_script() else " ".join(["lit-gpt", *sys.argv[1:2]])


def command_line(command: str, *argv: str) -> str:
    """A command to copy into a shell, started the way this process was."""
    start = ["python", f"scripts/{command}.py"] if is_script() else ["lit-gpt", command]
    return shlex.join([*start, *argv])


def option(field: str) -> str:
    """A field as most commands spell it: `seed` is `--seed`."""
    return f"--{field}"


def shortage(error: BaseException) -> UserError | None:
    """What a disk or a device ran out of, and what to do; None for any other error."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = f" for {error.filename}" if error.filename else ""
        return UserError(
            f"no space left on the disk{where}", hint="free some, or use other folders"
        )
    # The words of torch on CUDA, MPS and the CPU, and of numpy.
    asked = re.search(r"(?i)(?:tried|unable) to allocate ([\d.,]+ ?\w+)", str(error))
    too_large = "Storage size calculation overflowed" in str(error)  # no number for so many bytes
    if asked or too_large or isinstance(error, MemoryError):
        amount = f" (asked for {asked[1]})" if asked else ""
        return UserError(
            f"out of memory{amount}",
            hint="lower `batch_size` (`accumulate_grad_batches` makes up for it), "
            "`context_length`, `d_model` or `num_blocks`, or use `precision`=bf16-mixed",
        )
    return None


def as_user_error(error: BaseException) -> UserError | None:
    """The UserError that an exception is or amounts to; None: it is a bug."""
    return error if isinstance(error, UserError) else shortage(error)


def _thread_hook(error: threading.ExceptHookArgs) -> None:
    """TensorBoard writes in a thread of its own; what it runs short of, `run` reports."""
    if error.exc_value is None or shortage(error.exc_value) is None:
        threading.__excepthook__(error)


@contextmanager
def stop_at_once() -> Iterator[None]:
    """Ctrl-C and SIGTERM end the block where it stands, with the exit status that says which."""

    def stop(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    old = {n: signal.signal(n, stop) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def run(main: Callable[[], int | None], name_of: Callable[[str], str] = option) -> int:
    """Runs a command's `main`; a UserError or a shortage is one `error: ...` line and status 2.

    Args:
        name_of: how the command line spells a field of a UserError.
    """
    # Like Ctrl-C an exception, until training handles it, so that no temporary file stays behind.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that can't show a character shows "?"
    threading.excepthook = _thread_hook
    try:
        return main() or 0
    except KeyboardInterrupt:  # before training handles it, or while generating
        return 130
    except BrokenPipeError:  # the reader left, as in `generate.py | head`: nobody to tell
        sys.stderr.close()
        return 141
    except Exception as error:
        told = as_user_error(error)
        if told is None:
            raise
        print(f"error: {told.render(name_of)}", file=sys.stderr)
        return 2
