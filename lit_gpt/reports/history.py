"""A run's history: what history.json in its folder holds, and what its report is made from."""

from __future__ import annotations

import json
import math
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from lit_gpt.errors import UserError
from lit_gpt.reports.run_files import EVENTS, read_curves
from lit_gpt.storage import atomic_write_text, read_limited

Value = TypeVar("Value")
Number = TypeVar("Number", int, float)
Point = tuple[int, float]  # step, value

HISTORY = "history.json"
EVALUATED = ("train/eval_loss", "val/loss", "val/bits_per_byte")  # kept of every evaluation
LOGGED = ("train/loss", "learning_rate", "gradient_norm", "tokens_per_second")  # thinned
MAX_POINTS = 1000  # that thinning leaves of a logged curve
MAX_SAMPLES = 40
MAX_HISTORY = 1 << 25  # bytes: a run of 100,000 steps has 300,000
MAX_STEP = 1e15  # no run gets there: a larger one is damage
MAX_TIME = 1e11  # seconds since 1970


@dataclass(frozen=True)
class Session:
    """One start of the training command.

    Args:
        versions: of Python and the packages that matter, by name.
    """

    step: int  # where the run was
    time: float  # seconds since 1970
    command: str
    versions: dict[str, str]


@dataclass(frozen=True)
class FinalResult:
    """The evaluation over the whole validation split, after the last step."""

    loss: float  # nats/token
    bits_per_byte: float  # comparable between tokenizers
    num_tokens: int  # predicted
    of_tokens: int | None = None  # that could have been; None: as many

    @property
    def is_whole(self) -> bool:
        return self.of_tokens in (None, self.num_tokens)

    @property
    def extent(self) -> str:
        """How many tokens were predicted, of how many."""
        which = "all" if self.is_whole else f"{self.num_tokens:,} of"
        return f"{which} {self.of_tokens or self.num_tokens:,} tokens"

    @property
    def perplexity(self) -> float:
        return perplexity(self.loss)


@dataclass
class History:
    """A run up to now.

    Args:
        curves: points in the order of their steps, by TensorBoard's names; `time` holds when each
            evaluation was, in seconds since 1970.
        prompts: the beginnings of the samples.
        samples: steps of evaluations, and the texts then generated, one per prompt.
        card: names and values that the run prints about its data and model.
        sessions: the first start and each resume.
        final: None until the run has ended.
    """

    curves: dict[str, list[Point]] = field(default_factory=dict)
    prompts: list[str] = field(default_factory=list)
    samples: list[tuple[int, list[str]]] = field(default_factory=list)
    card: list[tuple[str, str]] = field(default_factory=list)
    sessions: list[Session] = field(default_factory=list)
    final: FinalResult | None = None

    def begin(self, session: Session) -> None:
        """Starts a session; what the history has of later steps will be trained again."""
        for name, points in self.curves.items():
            self.curves[name] = [point for point in points if point[0] <= session.step]
        self.samples = [sample for sample in self.samples if sample[0] <= session.step]
        self.sessions = [s for s in self.sessions if s.step < session.step] + [session]
        self.final = None

    def add(self, step: int, values: dict[str, float]) -> None:
        """Adds a point to each of the curves."""
        for name, value in values.items():
            _append(self.curves.setdefault(name, []), step, value)

    def add_samples(self, step: int, prompts: list[str], texts: list[str]) -> None:
        self.prompts = prompts
        _append(self.samples, step, texts)

    def save(self, folder: Path) -> None:
        """Writes history.json; a long run keeps every evaluation, but thins the logged steps."""
        for name in LOGGED:
            if len(self.curves.get(name, [])) > 2 * MAX_POINTS:
                self.curves[name] = thin(self.curves[name], MAX_POINTS)
        if len(self.samples) > 2 * MAX_SAMPLES:
            self.samples = thin(self.samples, MAX_SAMPLES)
        atomic_write_text(
            folder / HISTORY, json.dumps(vars(self), ensure_ascii=False, default=vars)
        )

    def newest(self, name: str) -> Point | None:
        points = self.curves.get(name)
        return points[-1] if points else None

    def best(self) -> Point | None:
        """The lowest validation loss, the first of equals; like best.ckpt, never that of step 0."""
        trained = [point for point in self.curves.get("val/loss", []) if point[0] > 0]
        return min(trained, key=lambda point: point[1], default=None)

    def speed(self) -> float | None:
        """Tokens/s: the median of what was logged."""
        rates = sorted(value for _, value in self.curves.get("tokens_per_second", []))
        return rates[len(rates) // 2] if rates else None

    def seconds(self) -> float:
        """Training time: the sum over sessions, each from its start to its last evaluation."""
        times = [time for _, time in self.curves.get("time", [])]
        ends = [*(session.time for session in self.sessions[1:]), math.inf]
        total = 0.0
        for start, end in zip((session.time for session in self.sessions), ends, strict=True):
            total += max((time for time in times if start <= time < end), default=start) - start
        return total


def perplexity(loss: float) -> float:
    """exp(loss), finite for any finite loss."""
    return math.exp(min(loss, 700))


def _append(entries: list[tuple[int, Value]], step: int, value: Value) -> None:
    """Appends an entry in place of those of the same step and later ones."""
    while entries and entries[-1][0] >= step:
        entries.pop()
    entries.append((step, value))


def thin(entries: list[tuple[int, Value]], most: int) -> list[tuple[int, Value]]:
    """The first entry, and the last one of every `width` steps, so that about `most` are left.

    The width is a power of two: thinning twice gives the same as thinning once.
    """
    width = 1
    kept = entries
    while len(kept) > most:
        width *= 2
        kept = list({-(-entry[0] // width): entry for entry in entries}.values())
    return kept if kept[0] == entries[0] else [entries[0], *kept]


def read_history(folder: Path) -> History:
    """Reads history.json.

    Raises:
        UserError: it is damaged or unreadable.
        FileNotFoundError: there is none.
    """
    path = folder / HISTORY
    try:
        return _from_json(json.loads(read_limited(path, MAX_HISTORY)))
    except OSError as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError):
        raise UserError(
            f"{path} is damaged or not the history of a run",
            hint="delete it: the report can be made from the TensorBoard events beside it",
        ) from None


def _from_json(content: Any) -> History:
    """Raises all kinds of errors unless the content is what `History.save` writes."""
    history = History(
        prompts=[str(text) for text in content["prompts"]],
        card=[(str(name), str(value)) for name, value in content["card"]],
    )
    for name, points in content["curves"].items():  # steps in order, each once
        values = {_checked(int(step), MAX_STEP): float(value) for step, value in points}
        history.curves[str(name)] = sorted(values.items())
    for _, clock in history.curves.get("time", []):
        _checked(clock, MAX_TIME)
    for step, texts in content["samples"]:
        history.samples.append((_checked(int(step), MAX_STEP), [str(text) for text in texts]))
    for session in content["sessions"]:
        step = _checked(int(session["step"]), MAX_STEP)
        clock = _checked(float(session["time"]), MAX_TIME)
        versions = {str(name): str(value) for name, value in session["versions"].items()}
        history.sessions.append(Session(step, clock, str(session["command"]), versions))
    if final := content["final"]:
        num_tokens = _checked(int(final["num_tokens"]), MAX_STEP)
        of_tokens = final.get("of_tokens")  # not in 0.1.0's
        of_tokens = _checked(int(of_tokens), MAX_STEP) if of_tokens else None
        loss = float(final["loss"])
        history.final = FinalResult(loss, float(final["bits_per_byte"]), num_tokens, of_tokens)
    return history


def _checked(number: Number, limit: float) -> Number:
    """Refuses a step or time that no run can have."""
    if not 0 <= number < limit:
        raise ValueError
    return number


def read_run(folder: Path) -> History:
    """A run's history, or that of a run without history.json from its TensorBoard events.

    Raises:
        UserError: the folder is not a run's, or its files are damaged.
    """
    with suppress(FileNotFoundError):
        return read_history(folder)
    history = History()
    if any(folder.glob(EVENTS)):
        for name, values in read_curves(folder, {*EVALUATED, *LOGGED}).items():
            points = sorted(values.items())
            history.curves[name] = [point for point in points if 0 <= point[0] < MAX_STEP]
    if not any(history.curves.values()):
        raise UserError(
            f"{folder} has no {HISTORY} and no curves in TensorBoard events",
            hint="choose the folder of a run that has been evaluated at least once",
        )
    return history
