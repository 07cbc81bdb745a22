"""How a command runs: options, Ctrl-C, one-line errors, exit status."""

from __future__ import annotations

import argparse
import errno
import io
import os
import re
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from inspect import Parameter, signature
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, get_args, get_type_hints

import docstring_parser
import jsonargparse
import psutil
import yaml

from lit_gpt.errors import UserError

KINDS = {"int": "a whole number", "float": "a number", "bool": "true or false", "NoneType": "null"}
KINDS |= {"list": "a list", "collections.abc.Iterable": "a list"}
KINDS |= {"dot import path string": "the name of a class"}
WITH_EXPONENT = re.compile(r"(?:^|(?<==))\d+(\.\d+)?[eE]\+?\d\d?$")
MAX_PARTS = 100_000  # of values in YAML, each counted wherever an alias repeats it
HIDDEN = {"is_hidden": True}  # metadata of a dataclass's field that is not an option
METAVARS = {int: "INT", float: "FLOAT", str: "TEXT"}


def load_yaml(text: str) -> Any:
    """Loads YAML, except what `check_parts` refuses: jsonargparse would never finish with it."""
    value = jsonargparse.get_loader("yaml")(text)
    try:
        check_parts(value)
    except ValueError as error:
        raise yaml.YAMLError(str(error)) from error
    return value


def check_parts(tree: Any) -> None:
    """Raises a ValueError for values loaded from YAML that repeat others without end."""
    todo = [tree]
    num_parts = 1
    while todo:
        part = todo.pop()
        inner = [*part.keys(), *part.values()] if isinstance(part, dict) else part
        if isinstance(inner, list | tuple | set):
            num_parts += len(inner)
            if num_parts > MAX_PARTS:
                raise ValueError("too many values, or one that contains itself")
            todo += inner


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


class Parser(jsonargparse.ArgumentParser):
    """Has short help, and raises wrong options as a UserError."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        jsonargparse.set_loader("finite_yaml", load_yaml, exceptions=(yaml.YAMLError,))
        kwargs["parser_mode"] = "finite_yaml"
        kwargs.setdefault("usage", "%(prog)s [options]")
        kwargs.setdefault("formatter_class", ShortHelp)
        program = Path(sys.argv[0]).name if is_script() else " ".join(["lit-gpt", *sys.argv[1:2]])
        kwargs.setdefault("prog", program)
        super().__init__(*args, **kwargs)

    def parse_args(  # type: ignore[override]
        self, args: Any = None, *others: Any, **kwargs: Any
    ) -> jsonargparse.Namespace:
        """Takes 1e5 for a whole number too, where an option needs one."""
        words = list(args)
        for i, word in enumerate(words):
            name = word.partition("=")[0] if "=" in word else words[i - 1]
            kind = getattr(self._option_string_actions.get(name), "_typehint", None)
            number = WITH_EXPONENT.search(word)
            if number and int in (kind, *get_args(kind)) and float(number[0]).is_integer():
                words[i] = word[: number.start()] + f"{float(number[0]):.0f}"
        return super().parse_args(words, *others, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        hint = "--help lists all options"
        if required := re.match("(the following arguments are required: )(.+)", message):
            positionals = [action.dest for action in self._get_positional_actions()]
            names = [n if n in positionals else f"`{n}`" for n in required[2].split(", ")]
            message = required[1] + ", ".join(names)
        key = re.match('Parser key "(.+?)": *', message)
        if key is None:
            raise UserError(message, hint=hint)
        problem = message[key.end() :]
        if wrong := re.match(r"\s*Expected a typing.Literal\[(.+)\]\.\s+Got value: (.+)", problem):
            choices = wrong[1].replace("'", "")
            raise UserError(f"must be one of {choices}", field=key[1], value=wrong[2])
        found = re.findall(r"Expected an? (?:<class '([\w.]+)'>|(dot import path string))", problem)
        expected = list(dict.fromkeys(KINDS.get("".join(pair), "") for pair in found))
        value = re.search(r"(?:Given|Got) value: (.+)", problem)
        if not all(expected) or not expected or not value:
            raise UserError(problem, field=key[1], hint=hint)
        problem = f"must be {' or '.join(expected)}"
        raise UserError(problem, field=key[1], value=value[1], hint=hint)


def call(
    function: Callable[..., Any],
    argv: list[str],
    *settings: type,
    groups: Collection[type] = (),
    **kwargs: Any,
) -> Any:
    """Calls a function with the options on a command line.

    The options are its parameters: their types, defaults, and descriptions in the docstring.
    `--config FILE` reads them from YAML. A bool that is off by default is a flag, several texts
    (`tuple[str, ...]`) are a repeated option, and `list[str]` is given without an option's name.

    Args:
        function: the command.
        argv: the command line.
        settings: dataclasses. The fields of a parameter annotated with one are options too, except
            those that are HIDDEN or that the function has a parameter for.
        groups: dataclasses too, but a field `path` of a parameter `data` is `--data.path`.
        kwargs: of the `Parser`, such as `prog`.

    Raises:
        UserError: wrong options.
    """
    description = docstring_parser.parse(function.__doc__ or "").short_description
    parser = Parser(description=description, **kwargs)
    if "config" not in signature(function).parameters:  # else that is for other commands' options
        parser.add_argument("--config", action="config", metavar="FILE", help="YAML of options")
    settings = (*settings, *groups)
    _add_options(parser, function, settings, groups)
    return _apply(function, vars(parser.parse_args(argv)), settings, groups)


def _add_options(
    parser: Parser,
    source: Callable[..., Any],
    settings: Collection[type],
    groups: Collection[type] = (),
    skip: Iterable[str] = (),
    prefix: str = "",
) -> None:
    docs = {p.arg_name: p.description for p in docstring_parser.parse(source.__doc__ or "").params}
    hints = get_type_hints(source)
    parameters = signature(source).parameters
    in_dataclass = getattr(source, "__dataclass_fields__", {}).items()
    skip = {*skip, *(name for name, field in in_dataclass if field.metadata == HIDDEN)}
    for name, parameter in parameters.items():
        hint = hints[name]
        if hint in settings:
            within = f"{name}." if hint in groups else ""
            _add_options(parser, hint, settings, groups, {*skip, *parameters}, within)
            continue
        if name in skip:
            continue
        details: dict[str, Any] = {"help": docs.get(name, "")}
        if hint == list[str]:
            metavar = name.removesuffix("s").upper()
            parser.usage = f"{parser.usage} {metavar} ..."
            parser.add_argument(name, nargs="+", metavar=metavar, **details)
            continue
        if parameter.default is Parameter.empty:
            details["required"] = True
        else:
            details["default"] = parameter.default
        if hint is bool and parameter.default is False and not prefix:
            details["action"] = "store_true"
        elif hint == tuple[str, ...]:
            details["default"] = list(parameter.default)
            details |= {"action": "extend", "type": _texts, "metavar": "TEXT"}
        else:
            kinds = {hint, *get_args(hint)} & set(METAVARS)
            details |= {"type": hint, "metavar": METAVARS[kinds.pop()] if kinds else None}
        parser.add_argument(f"--{prefix}{name}", **details)


def _texts(value: str | list[str]) -> list[str]:
    """The texts of one `--option TEXT`, or those that a file of options lists."""
    return [value] if isinstance(value, str) else [str(text) for text in value]


def _apply(
    source: Callable[..., Any],
    options: dict[str, Any],
    settings: Collection[type],
    groups: Collection[type] = (),
) -> Any:
    """Calls `source` with the options it has parameters for, taking these out of `options`."""
    hints = get_type_hints(source)
    arguments = {name: options.pop(name) for name in hints if name in options}
    for name, hint in hints.items():
        if hint in groups:
            arguments[name] = _apply(hint, vars(arguments[name]), settings, groups)
        elif hint in settings:
            arguments[name] = _apply(hint, options, settings, groups)
        elif hint == tuple[str, ...] and name in arguments:
            arguments[name] = tuple(arguments[name])
    return source(**arguments)


def seconds_since_start() -> float:
    """Seconds since this process started, the imports before this one included."""
    if sys.platform == "linux":  # where psutil knows the time of the boot to the second only
        fields = Path("/proc/self/stat").read_bytes().rpartition(b")")[2].split()
        started = int(fields[19]) / os.sysconf("SC_CLK_TCK")  # field 22 of proc(5), since the boot
        return time.clock_gettime(time.CLOCK_BOOTTIME) - started
    return time.time() - psutil.Process().create_time()


def is_script() -> bool:
    """Whether this process was started as scripts/COMMAND.py, not as `lit-gpt COMMAND`."""
    return Path(sys.argv[0]).stem not in ("lit-gpt", "__main__")


def command_line(command: str, *argv: str) -> str:
    """A command to copy into a shell, started the way this process was."""
    start = ["python", f"scripts/{command}.py"] if is_script() else ["lit-gpt", command]
    return shlex.join([*start, *argv])


def option(field: str) -> str:
    """A field as most commands spell it: `seed` is `--seed`."""
    return f"--{field}"


def resource_error(error: BaseException) -> UserError | None:
    """What a disk or a device ran out of, and what to do; None for any other error."""
    in_rust = re.search(r"\(os error (\d+)\)", str(error))  # as safetensors words it
    number = error.errno if isinstance(error, OSError) else int(in_rust[1]) if in_rust else None
    if number in (errno.ENOSPC, errno.EDQUOT):
        filename = getattr(error, "filename", None)
        where = f" for {filename}" if filename else ""
        hint = "free some, or use other folders"
        return UserError(f"no space left on the disk{where}", hint=hint)
    # As torch (on CUDA, MPS and the CPU) and numpy word it.
    asked = re.search(r"(?i)(?:tried|unable) to allocate ([\d.,]+ ?\w+)", str(error))
    too_large = "Storage size calculation overflowed" in str(error)  # torch gives no number here
    if asked or too_large or isinstance(error, MemoryError):
        amount = f" (asked for {asked[1]})" if asked else ""
        hint = (
            "lower `batch_size` (`accumulate_grad_batches` makes up for it), "
            "`context_length`, `d_model` or `num_blocks`, or use `precision`=bf16-mixed"
        )
        return UserError(f"out of memory{amount}", hint=hint)
    return None


def as_user_error(error: BaseException) -> UserError | None:
    """The UserError that an exception is or amounts to; None: it is a bug."""
    return error if isinstance(error, UserError) else resource_error(error)


def is_interrupt(error: BaseException | None) -> bool:
    """Whether an error is, or was raised while handling, a Ctrl-C: libraries wrap it in theirs."""
    seen: set[int] = set()  # a library may raise one while handling itself
    while error is not None and id(error) not in seen:
        if isinstance(error, KeyboardInterrupt):
            return True
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return False


def _thread_hook(error: threading.ExceptHookArgs) -> None:
    """Hides what TensorBoard's writer can't write: the thread that wrote it is told, too."""
    if not isinstance(error.exc_value, OSError):
        threading.__excepthook__(error)


def _unraisable_hook(error: sys.UnraisableHookArgs) -> None:
    """Ends the process at a Ctrl-C inside a finalizer, where Python would drop it."""
    if isinstance(error.exc_value, KeyboardInterrupt):
        os._exit(130)
    sys.__unraisablehook__(error)


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    """Raises a KeyboardInterrupt, but ends the process at once in the middle of an import.

    There an exception becomes a traceback or, in the C code of a package, an ImportError, and
    there is nothing to clean up.
    """
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            os._exit(130)
        frame = frame.f_back
    raise KeyboardInterrupt


def _exit(number: int, frame: FrameType | None) -> NoReturn:
    sys.exit(128 + number)


@contextmanager
def stop_at_once() -> Iterator[None]:
    """Makes Ctrl-C and SIGTERM end the block at once, with the exit status of that signal."""
    old = {n: signal.signal(n, _exit) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def run(
    main: Callable[[], int | None],
    name_of: Callable[[str], str] = option,
    reports_error: Callable[[], bool] = lambda: True,
) -> int:
    """Runs a command's `main`; a UserError or a shortage is one `error: ...` line and status 2.

    Args:
        main: returns the exit status; None counts as 0.
        name_of: how the command line spells a field of a UserError.
        reports_error: whether to print that line: of several processes, only one should.
    """
    # An exception, as for Ctrl-C, removes temporary files; training handles the signal later.
    signal.signal(signal.SIGTERM, _exit)
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # in the background of some shells
        signal.signal(signal.SIGINT, _interrupt)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # "?" where the terminal lacks a character
    threading.excepthook = _thread_hook
    sys.unraisablehook = _unraisable_hook
    try:
        return main() or 0
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader has left, as in `generate.py | head`
        sys.stderr.close()
        return 141
    except Exception as error:
        if is_interrupt(error):
            return 130
        user_error = as_user_error(error)
        if user_error is None:
            raise
        if reports_error():
            print(f"error: {user_error.render(name_of)}", file=sys.stderr)
        return 2
