"""What a sweep searches: the file that describes it, its spaces, and the options of a trial."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from lit_gpt.errors import UserError

if TYPE_CHECKING:
    import optuna

KEYS = ("options", "fixed", "trials", "study")
RANGE_KEYS = {"low", "high", "log", "step"}
OWN = ("trainer.default_root_dir", "ckpt_path", "find_lr", "print_config")  # can't be a trial's


def text_of(value: Any) -> str:
    """A value as the command line takes it."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


@dataclass(frozen=True)
class Choices:
    """One of several values, in no order."""

    values: tuple[str, ...]

    def suggest(self, trial: optuna.Trial, name: str) -> str:
        return trial.suggest_categorical(name, self.values)

    def __str__(self) -> str:
        return f"one of {', '.join(self.values)}"

    def examples(self) -> tuple[str, ...]:
        """Values to check before the first trial."""
        return self.values


@dataclass(frozen=True)
class Range:
    """Numbers from low to high, both included; whole numbers if both are."""

    low: int | float
    high: int | float
    log: bool = False
    step: int | float | None = None

    def suggest(self, trial: optuna.Trial, name: str) -> str:
        if isinstance(self.low, int) and isinstance(self.high, int):
            step = int(self.step or 1)
            return str(trial.suggest_int(name, self.low, self.high, step=step, log=self.log))
        value = trial.suggest_float(name, self.low, self.high, step=self.step, log=self.log)
        # Four digits can be read and typed, and the trial uses what is shown.
        return text_of(min(max(float(f"{value:.4g}"), self.low), self.high))

    def __str__(self) -> str:
        step = "" if self.step is None else f", step {self.step}"
        return f"{self.low} to {self.high}{', log' if self.log else ''}{step}"

    def examples(self) -> tuple[str, ...]:
        return text_of(self.low), text_of(self.high)


@dataclass(frozen=True)
class Sweep:
    """Spaces by option, the other options of train as texts, how many trials, and where."""

    spaces: dict[str, Choices | Range]
    fixed: dict[str, list[str]]
    trials: int
    folder: Path

    def argv(self, values: Mapping[str, str]) -> list[str]:
        """The options of train, files first, for a trial with these values."""
        fixed = [(name, text) for name, texts in self.fixed.items() for text in texts]
        fixed.sort(key=lambda pair: pair[0] != "config")
        return [f"--{name}={text}" for name, text in (*fixed, *values.items())]

    def examples(self) -> Iterator[list[str]]:
        """Options of trials in which each end and choice appears, with the first of the others."""
        first = {name: space.examples()[0] for name, space in self.spaces.items()}
        yield self.argv(first)
        for name, space in self.spaces.items():
            for value in space.examples()[1:]:
                yield self.argv(first | {name: value})

    def described(self) -> dict[str, str]:
        """What makes trials comparable, by option: a study is only continued with the same."""
        spaces = {name: str(space) for name, space in self.spaces.items()}
        return spaces | {name: " ".join(texts) for name, texts in self.fixed.items()}


def read_sweep(path: str, trials: int | None, study: str | None, more: list[str]) -> Sweep:
    """The sweep that a YAML file describes; what the command line says wins.

    Args:
        trials: None: the file's.
        study: folder; None: the file's.
        more: further options of train.

    Raises:
        UserError: the file, or what is wrong in it.
    """

    def refuse(problem: str) -> UserError:
        return UserError(problem, field="config", value=path)

    content = read_yaml(path)
    if unknown := [str(key) for key in content if key not in KEYS]:
        raise refuse(f"unknown key {unknown[0]!r}: a sweep has {', '.join(KEYS)}")
    options = content.get("options") or {}
    fixed = content.get("fixed") or {}
    for key, part in (("options", options), ("fixed", fixed)):
        if not isinstance(part, dict) or not all(isinstance(name, str) for name in part):
            raise refuse(f"{key} must map option names to values, not {part!r}")
    if not options:
        raise refuse("options is empty: give at least one option and its search space")
    trials = content.get("trials", 20) if trials is None else trials
    if not isinstance(trials, int) or isinstance(trials, bool) or trials < 1:
        raise refuse(f"trials (`trials`) must be at least 1, not {trials!r}")
    folder = content.get("study", "logs/sweep") if study is None else study
    if not isinstance(folder, str) or not folder:
        raise refuse(f"study (`study`) must be a folder, not {folder!r}")
    spaces = {name: read_space(name, space, refuse) for name, space in options.items()}
    texts = {name: texts_of(name, value) for name, value in fixed.items()}
    for name, text in read_options(more):
        texts[name] = [text]
    for name in (*spaces, *texts):
        if name in OWN:
            hint = f"leave it out (the runs go to {folder}; `study` names another folder)"
            raise UserError("can't be given to a sweep", field=name, hint=hint)
    if twice := [name for name in texts if name in spaces]:
        raise UserError(
            f"has a fixed value, but {path} also searches it",
            field=twice[0],
            hint="leave one of them out",
        )
    return Sweep(spaces, texts, trials, Path(folder).expanduser())


def read_yaml(path: str) -> dict[Any, Any]:
    try:
        content = yaml.safe_load(Path(path).expanduser().read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"can't be read: {error.strerror}", field="config", value=path) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"is not a YAML file: {error}", field="config", value=path) from error
    if not isinstance(content, dict):
        hint = "it must have options (see configs/sweep.yaml)"
        raise UserError("does not describe a sweep", field="config", value=path, hint=hint)
    return content


def texts_of(name: str, value: Any) -> list[str]:
    """The values of an option as the command line takes them; `config` may have several."""
    several = name == "config" and isinstance(value, list)
    return [text_of(part) for part in (value if several else [value])]


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


def read_space(name: str, space: Any, refuse: Callable[[str], UserError]) -> Choices | Range:
    """The space that a value in the file's `options` describes.

    Args:
        refuse: makes an error of what is wrong.
    """

    def refuse_it(problem: str) -> UserError:
        return refuse(f"options: {name}{problem}")

    if isinstance(space, list) and space:
        return Choices(tuple(dict.fromkeys(map(text_of, space))))
    if not isinstance(space, dict) or not {"low", "high"} <= set(space):
        raise refuse_it(
            " must be a list of values, or a range such as "
            f"{{low: 0.001, high: 0.01, log: true}}, not {text_of(space)}",
        )
    if unknown := set(space) - RANGE_KEYS:
        problem = f": unknown {min(unknown, key=str)!r}: a range has low, high, log and step"
        raise refuse_it(problem)
    low = read_number(space, "low", refuse_it)
    high = read_number(space, "high", refuse_it)
    step = None if space.get("step") is None else read_number(space, "step", refuse_it)
    log = space.get("log", False)
    if not isinstance(log, bool):
        raise refuse_it(f": log must be true or false, not {log!r}")
    if low >= high:
        raise refuse_it(f": low must be below high, not {low} and {high}")
    if log and (low <= 0 or step is not None):
        raise refuse_it(": log needs a low above 0, and no step")
    if step is not None and step <= 0:
        raise refuse_it(f": step must be above 0, not {step}")
    if all(isinstance(number, int) for number in (low, high, step or 1)):
        return Range(low, high, log, step)
    return Range(float(low), float(high), log, step)


def read_number(space: dict[str, Any], key: str, refuse: Callable[[str], UserError]) -> int | float:
    value = space[key]
    if isinstance(value, str):  # YAML reads 1e-4, without a point, as text
        with suppress(ValueError):
            value = float(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise refuse(f": {key} must be a number, not {value!r}")
    return value
