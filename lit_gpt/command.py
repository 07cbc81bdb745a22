"""How a command runs: options, Ctrl-C, one-line errors, exit status."""

from __future__ import annotations

import errno
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any, NoReturn, get_type_hints

import docstring_parser
import jsonargparse

from lit_gpt.errors import UserError


class OneLineErrors:
    """For argument parsers: wrong options are a UserError."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        message = re.sub('Parser key "(.+?)"', r"--\1", message)  # as it was typed
        raise UserError(message, hint="--help lists all options")


class Parser(OneLineErrors, jsonargparse.ArgumentParser):
    """Options of a command, made from the signature of the function that it calls."""


def parser_of(
    function: Callable[..., Any], *settings: type, positional: str | None = None, **kwargs: Any
) -> Parser:
    """The options of a command: its function's parameters, with their types and defaults.

    Descriptions are those of the docstrings. `--config FILE` reads options from YAML.

    Args:
        function: called by the command; a parameter annotated with one of `settings` is left out.
        settings: dataclasses whose fields are options too, side by side with the function's.
        positional: a parameter whose values, one or more, stand without an option's name.
        kwargs: of the parser, such as `prog`.
    """
    parser = Parser(default_env=False, **kwargs)
    parser.add_argument("--config", action="config", help="YAML file of options")
    hints = get_type_hints(function)
    owned = {name for name, hint in hints.items() if hint in settings}
    if positional is not None:
        owned.add(positional)
        described = {
            p.arg_name: p.description for p in docstring_parser.parse_from_object(function).params
        }
        metavar = positional.upper().removesuffix("S")
        parser.add_argument(positional, nargs="+", metavar=metavar, help=described[positional])
    parser.add_function_arguments(function, skip=owned)
    for setting in settings:
        parser.add_class_arguments(setting)
    return parser


def call(function: Callable[..., Any], argv: list[str], *settings: type, **kwargs: Any) -> Any:
    """Calls `function` with what the command line says; arguments as for `parser_of`."""
    options = dict(parser_of(function, *settings, **kwargs).parse_args(argv))
    options.pop("config")
    for name, hint in get_type_hints(function).items():
        if hint in settings:
            names = [field.name for field in fields(hint)]
            options[name] = hint(**{field: options.pop(field) for field in names})
    return function(**options)


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
