"""What a sweep searches: the file that describes it, its spaces, and the options of a trial."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from lit_gpt.command import check_parts
from lit_gpt.errors import UserError

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

DEFAULTS: dict[str, Any] = {"options": {}, "fixed": {}, "trials": 20, "study": "logs/sweep"}
KINDS = {dict: "map option names to values", int: "be a whole number", str: "be a folder"}
OWN = ("trainer.default_root_dir", "ckpt_path", "find_lr", "print_config")  # can't be a trial's


def text_of(value: Any) -> str:
    """A value as the command line takes it."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


@dataclass(frozen=True)
class Sweep:
    """Spaces by option, the other options of train as texts, how many trials, and where."""

    spaces: dict[str, BaseDistribution]
    fixed: dict[str, list[str]]
    trials: int
    folder: Path

    def argv(self, values: Mapping[str, str]) -> list[str]:
        """The options of train, files first, for a trial with these values."""
        fixed = [(name, text) for name, texts in self.fixed.items() for text in texts]
        fixed.sort(key=lambda pair: pair[0] != "config")
        return [f"--{name}={text}" for name, text in (*fixed, *values.items())]

    def texts(self, params: Mapping[str, Any]) -> dict[str, str]:
        """Values that Optuna suggests, as typed on the command line."""
        return {name: text_in(space, params[name]) for name, space in self.spaces.items()}

    def examples(self) -> Iterator[list[str]]:
        """Options of trials in which each end and choice appears, with the first of the others."""
        first = {name: examples_of(space)[0] for name, space in self.spaces.items()}
        yield self.argv(first)
        for name, space in self.spaces.items():
            for value in examples_of(space)[1:]:
                yield self.argv(first | {name: value})

    def described(self) -> dict[str, str]:
        """What makes trials comparable, by option: a study is only continued with the same."""
        spaces = {name: describe(space) for name, space in self.spaces.items()}
        return spaces | {name: " ".join(texts) for name, texts in self.fixed.items()}


def text_in(space: Any, value: str | float) -> str:
    """A value within a space: of a float, four digits, which can be read and typed."""
    if isinstance(value, float):
        value = min(max(float(f"{value:.4g}"), space.low), space.high)
    return text_of(value)


def examples_of(space: Any) -> tuple[str, ...]:
    return getattr(space, "choices", None) or (text_of(space.low), text_of(space.high))


def describe(space: Any) -> str:
    if hasattr(space, "choices"):
        return f"one of {', '.join(space.choices)}"
    step = "" if space.step in (None, 1) else f", step {space.step}"
    return f"{space.low} to {space.high}{', log' if space.log else ''}{step}"


def read_sweep(path: str, trials: int | None, study: str | None, more: list[str]) -> Sweep:
    """The sweep that a YAML file describes; what the command line says wins.

    Args:
        trials: None: the file's.
        study: folder; None: the file's.
        more: further options of train.

    Raises:
        UserError: the file, or what is wrong in it.
    """
    given = {"trials": trials, "study": study}
    try:
        content = read_content(path, {k: v for k, v in given.items() if v is not None})
        spaces = {name: read_space(name, space) for name, space in content["options"].items()}
    except OSError as error:
        raise UserError(f"can't be read: {error.strerror}", field="config", value=path) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"is not a YAML file: {error}", field="config", value=path) from error
    except ValueError as error:
        raise UserError(str(error), field="config", value=path) from error
    fixed = {}
    for name, value in content["fixed"].items():
        values = value if name == "config" and isinstance(value, list) else [value]
        fixed[name] = [text_of(value) for value in values]
    fixed |= {name: [text] for name, text in read_options(more)}
    for name in (*spaces, *fixed):
        if name in OWN:
            hint = f"leave it out (the runs go to {content['study']}; `study` names another folder)"
            raise UserError("can't be given to a sweep", field=name, hint=hint)
        if name == "budget":
            raise no_budget()
        if name in spaces and name in fixed:
            problem = f"has a fixed value, but {path} also searches it"
            raise UserError(problem, field=name, hint="leave one of them out")
    return Sweep(spaces, fixed, content["trials"], Path(content["study"]).expanduser())


def no_budget() -> UserError:
    problem = "can't be given to a sweep: it would choose other options for each trial"
    return UserError(problem, field="budget", hint="give `max_steps` instead")


def read_content(path: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The parts of a sweep by key, of the right types; `given` ones replace the file's.

    Raises:
        ValueError: what is wrong in the file.
    """
    content = yaml.safe_load(Path(path).expanduser().read_text(encoding="utf-8"))
    check_parts(content)
    if not isinstance(content, dict):
        raise ValueError("does not describe a sweep; it must have options (see configs/sweep.yaml)")
    if unknown := [str(key) for key in content if key not in DEFAULTS]:
        raise ValueError(f"unknown key {unknown[0]!r}: a sweep has {', '.join(DEFAULTS)}")
    content = DEFAULTS | {k: v for k, v in content.items() if v is not None} | dict(given)
    for key, default in DEFAULTS.items():
        if type(content[key]) is not type(default):  # isinstance(True, int)
            raise ValueError(f"{key} must {KINDS[type(default)]}, not {content[key]!r}")
    if not content["options"]:
        raise ValueError("options is empty: give at least one option and its search space")
    if content["trials"] < 1:
        raise ValueError(f"trials (`trials`) must be at least 1, not {content['trials']}")
    if not content["study"]:
        raise ValueError("study (`study`) must be a folder, not ''")
    return content


def read_options(argv: list[str]) -> Iterator[tuple[str, str]]:
    """Names and values of `--name=value` and `--name value`.

    Raises:
        UserError: something else.
    """
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        name, equals, value = word[2:].partition("=")
        if not word.startswith("--") or not name:
            raise UserError(f"unrecognized argument {word!r}", hint="--help lists the options")
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise UserError("needs a value", field=name, hint=f"--{name}=...")
            value = rest.pop(0)
        yield name, value


def read_space(name: str, space: Any) -> BaseDistribution:
    """The space of an option: a list of choices, or a range, of whole numbers if its ends are.

    Raises:
        ValueError: it is neither, or the range is wrong.
    """
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if isinstance(space, list) and space:
        return CategoricalDistribution(tuple(dict.fromkeys(map(text_of, space))))
    keys = set(space) if isinstance(space, dict) else set()
    if not {"low", "high"} <= keys <= {"low", "high", "log", "step"}:
        raise ValueError(
            f"options: {name} must be a list of values, or a range such as "
            f"{{low: 0.001, high: 0.01, log: true}} or with a step, not {text_of(space)}"
        )
    low = read_number(space["low"])
    high = read_number(space["high"])
    step = None if space.get("step") is None else read_number(space["step"])
    log = space.get("log", False)
    if not isinstance(log, bool) or not all(map(math.isfinite, (low, high, step or 0))):
        problem = "low, high and step must be numbers, and log true or false"
    elif low >= high:
        problem = "low must be below high"
    elif log and (low <= 0 or step is not None):
        problem = "log needs a low above 0, and no step"
    elif step is not None and step <= 0:
        problem = "step must be above 0"
    elif isinstance(low, int) and isinstance(high, int) and isinstance(step, int | None):
        return IntDistribution(low, high, log, step or 1)
    else:
        return FloatDistribution(low, high, log, step)
    raise ValueError(f"options: {name}: {problem}, not {text_of(space)}")


def read_number(value: Any) -> int | float:
    """The number, or NaN for anything else; YAML reads 1e-4, without a point, as text."""
    if isinstance(value, str):
        with suppress(ValueError):
            return float(value)
    return value if type(value) in (int, float) else math.nan
