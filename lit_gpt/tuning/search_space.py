"""Owns what a sweep searches: the file that describes it, its spaces, the options of a trial."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lit_gpt.errors import UserError

KEYS = ("options", "fixed", "trials", "study")
# Options of train.py that make no sense for all trials.
OWN = ("trainer.default_root_dir", "ckpt_path", "find_lr", "print_config")


def text_of(value: Any) -> str:
    """A value as it is typed on the command line."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


@dataclass(frozen=True)
class Choices:
    """One of several values, in no order."""

    values: tuple[str, ...]

    def suggest(self, trial: Any, name: str) -> str:
        return trial.suggest_categorical(name, self.values)

    def __str__(self) -> str:
        return f"one of {', '.join(self.values)}"

    def typical(self) -> tuple[str, ...]:
        """Values that are to be checked before the first trial, a plain one first."""
        return self.values


@dataclass(frozen=True)
class Range:
    """Numbers from low to high, both included; whole ones where both are."""

    low: int | float
    high: int | float
    log: bool = False
    step: int | float | None = None

    def suggest(self, trial: Any, name: str) -> str:
        if isinstance(self.low, int):
            step = 1 if self.step is None else self.step
            return str(trial.suggest_int(name, self.low, self.high, step=step, log=self.log))
        value = trial.suggest_float(name, self.low, self.high, step=self.step, log=self.log)
        # Four digits can be read and typed, and what is typed is what is tried.
        return text_of(min(max(float(f"{value:.4g}"), self.low), self.high))

    def __str__(self) -> str:
        step = "" if self.step is None else f", step {self.step}"
        return f"{self.low} to {self.high}{', log' if self.log else ''}{step}"

    def typical(self) -> tuple[str, ...]:
        return text_of(self.low), text_of(self.high)


@dataclass(frozen=True)
class Sweep:
    """Spaces by option, the other options of train.py as they are typed, how many trials, where."""

    spaces: dict[str, Choices | Range]
    fixed: dict[str, list[str]]
    trials: int
    folder: Path

    def words(self, values: Mapping[str, str]) -> list[str]:
        """The options of train.py, files first, for a trial with these values."""
        files = [f"--config={path}" for path in self.fixed.get("config", ())]
        rest = ((name, text) for name, texts in self.fixed.items() for text in texts)
        return [
            *files,
            *(f"--{name}={text}" for name, text in rest if name != "config"),
            *(f"--{name}={text}" for name, text in values.items()),
        ]

    def typical(self) -> Iterator[list[str]]:
        """Options of runs in which each end and choice appears, with the first of the others."""
        first = {name: space.typical()[0] for name, space in self.spaces.items()}
        yield self.words(first)
        for name, space in self.spaces.items():
            for value in space.typical()[1:]:
                yield self.words(first | {name: value})

    def described(self) -> dict[str, str]:
        """What makes trials comparable, by option; a study goes on only with the same."""
        spaces = {name: f"{space}" for name, space in self.spaces.items()}
        return spaces | {name: " ".join(texts) for name, texts in self.fixed.items()}


def read_sweep(path: str, trials: int | None, folder: str | None, more: list[str]) -> Sweep:
    """The sweep that a YAML file describes, with what the command line says otherwise.

    Args:
        trials: None: the file's.
        folder: None: the file's.
        more: further options of train.py.

    Raises:
        UserError: names the file, and what in it is wrong.
    """
    content = read_yaml(path)
    if unknown := [str(key) for key in content if key not in KEYS]:
        raise UserError(f"{path}: unknown key {unknown[0]!r}: a sweep has {', '.join(KEYS)}")
    options, fixed = (content.get(key) or {} for key in ("options", "fixed"))
    for key, part in (("options", options), ("fixed", fixed)):
        if not isinstance(part, dict) or not all(isinstance(name, str) for name in part):
            raise UserError(f"{path}: {key} must give a value to names of options, not {part!r}")
    if not options:
        raise UserError(f"{path}: options is empty: name at least one, and where to search")
    trials = content.get("trials", 20) if trials is None else trials
    if not isinstance(trials, int) or isinstance(trials, bool) or trials < 1:
        raise UserError(f"{path}: trials (--trials) must be at least 1, not {trials!r}")
    folder = content.get("study", "logs/sweep") if folder is None else folder
    if not isinstance(folder, str) or not folder:
        raise UserError(f"{path}: study (--study) must be a folder, not {folder!r}")
    spaces = {name: read_space(path, name, space) for name, space in options.items()}
    texts = {name: as_texts(name, value) for name, value in fixed.items()} | read_words(more)
    for name in (*spaces, *texts):
        if name in OWN:
            raise UserError(f"--{name} can't be given to a sweep: leave it out (its runs go to "
                            f"{folder}; --study names another folder)")  # fmt: skip
    if twice := [name for name in texts if name in spaces]:
        raise UserError(f"--{twice[0]} is given a value, and is one of the options that {path} "
                        "searches: leave one of them out")  # fmt: skip
    return Sweep(spaces, texts, trials, Path(folder).expanduser())


def read_yaml(path: str) -> dict[Any, Any]:
    try:
        content = yaml.safe_load(Path(path).expanduser().read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"can't read {path}: {error.strerror}; name the sweep's file with "
                        "--config") from error  # fmt: skip
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is no YAML file: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} describes no sweep: it must have options (see configs/sweep.yaml)")
    return content


def as_texts(name: str, value: Any) -> list[str]:
    return [text_of(v) for v in value] if name == "config" and isinstance(value, list) else [
        text_of(value)
    ]  # fmt: skip


def read_words(words: list[str]) -> dict[str, list[str]]:
    """`--name=value` and `--name value` as values by name; of several only files are all kept."""
    texts: dict[str, list[str]] = {}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--") or word == "--":
            raise UserError(f"unrecognized argument {word!r} (--help lists the options)")
        name, equals, text = word[2:].partition("=")
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise UserError(f"--{name} needs a value (--{name}=...)")
            text = rest.pop(0)
        texts[name] = [text]
    return texts


def read_space(path: str, name: str, space: Any) -> Choices | Range:
    where = f"{path}: options: {name}"
    if isinstance(space, list) and space:
        values = tuple(dict.fromkeys(map(text_of, space)))
        return Choices(values)
    if not isinstance(space, dict) or not {"low", "high"} <= set(space):
        raise UserError(
            f"{where} must be a list of values, or a range such as "
            f"{{low: 0.001, high: 0.01, log: true}}, not {text_of(space)}"
        )
    if unknown := set(space) - {"low", "high", "log", "step"}:
        raise UserError(f"{where}: unknown {min(unknown, key=str)!r}: a range has low, high, log "
                        "and step")  # fmt: skip
    low, high, step = (number(where, key, space.get(key)) for key in ("low", "high", "step"))
    log = space.get("log", False)
    if not isinstance(log, bool):
        raise UserError(f"{where}: log must be true or false, not {log!r}")
    if low is None or high is None or low >= high:
        raise UserError(f"{where}: low must be below high, not {low} and {high}")
    if log and (low <= 0 or step is not None):
        raise UserError(f"{where}: log needs a low above 0, and no step")
    if step is not None and step <= 0:
        raise UserError(f"{where}: step must be above 0, not {step}")
    if not all(isinstance(end, int) for end in (low, high, step or 1)):
        low, high = float(low), float(high)
    return Range(low, high, log, step)


def number(where: str, key: str, value: Any) -> int | float | None:
    if value is None:
        return None
    if isinstance(value, str):  # YAML takes 1e-4, without a point, for text
        with suppress(ValueError):
            value = float(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"{where}: {key} must be a number, not {value!r}")
    return value
