"""Owns how options are read, from the command line and YAML files, and what is refused there."""

from __future__ import annotations

import re
import sys
from typing import Any

import jsonargparse
import yaml
from lightning.pytorch.cli import LightningArgumentParser

from lit_gpt.errors import UserError

MAX_DEPTH, MAX_VALUES = 50, 100_000  # of a YAML value; what refers to itself has no end
NOT_OPTIONS = "a file for --config holds options by name, as `model: {d_model: 64}`"
NO_TEXT = re.compile("[\0\ud800-\udfff]")  # can be in no name of a file, nor in a saved config


class Parser(LightningArgumentParser):
    """Wrong options and files of them are a UserError."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        jsonargparse.set_loader("finite_yaml", load_yaml, exceptions=(yaml.YAMLError,))
        super().__init__(*args, **kwargs | {"parser_mode": "finite_yaml"})

    def error(self, message: str, ex: Exception | None = None) -> None:
        message = re.sub('Parser key "(.+?)"', r"--\1", message)  # as it was typed
        message = re.sub("(?s)Unexpected config: .*", NOT_OPTIONS, message)  # the whole of it
        raise UserError(f"{message} (--help lists all options)")

    def parse_args(self, args: Any = None, *others: Any, **kwargs: Any) -> jsonargparse.Namespace:
        self._check("", sys.argv[1:] if args is None else args)
        try:
            config = super().parse_args(args, *others, **kwargs)
            self.validate(config, False)  # once more: at first it lets null pass as any value
        except (TypeError, KeyError) as error:
            self.error(str(error))
        for name in self.groups:
            if not isinstance(config.get(name), jsonargparse.Namespace):
                self.error(f"--{name} has options of its own, so it can't be {config.get(name)}")
        for name, value in config.items():
            self._check(f" in --{name}", value)
        return config

    def parse_path(self, path: Any, *args: Any, **kwargs: Any) -> jsonargparse.Namespace:
        try:
            return super().parse_path(path, *args, **kwargs)
        except UnicodeDecodeError as error:
            raise UserError(f"--config {path} is not UTF-8 text ({error}): convert it") from error

    def _check(self, where: str, value: Any) -> None:
        for part in values_in(value):
            if isinstance(part, str) and NO_TEXT.search(part):
                self.error(f"{part!r}{where} is not valid Unicode text without NUL characters")
            if isinstance(part, int) and abs(part) >= 1 << 63:
                self.error(f"{part}{where} is beyond 64 bits")


def load_yaml(text: str) -> Any:
    """A YAML value; one that Python or jsonargparse would choke on is a YAMLError."""
    try:
        value = jsonargparse.get_loader("yaml")(text)
        for _ in values_in(value):
            pass
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise yaml.YAMLError(str(error)) from error
    return value


def values_in(value: Any) -> list[Any]:
    """All values in lists and dicts, keys included.

    Raises:
        ValueError: there is no end to them, or they are too many.
    """
    found, todo = [], [(value, 0)]
    while todo:
        value, depth = todo.pop()
        found.append(value)
        if depth > MAX_DEPTH or len(found) > MAX_VALUES:
            raise ValueError("nested too deeply, too large or part of itself")
        if isinstance(value, jsonargparse.Namespace):
            value = vars(value)
        if isinstance(value, dict):
            todo += [(part, depth + 1) for pair in value.items() for part in pair]
        elif isinstance(value, list | tuple | set):
            todo += [(part, depth + 1) for part in value]
    return found
