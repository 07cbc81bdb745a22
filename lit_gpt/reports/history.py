"""A run's history: what history.json in its folder holds, and what its report is made from."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from lit_gpt.errors import UserError
from lit_gpt.storage import write_whole

Value = TypeVar("Value")
Point = tuple[int, float]  # step, value

HISTORY = "history.json"
EVALUATED = ("train/eval_loss", "val/loss", "val/bits_per_byte")  # kept of every evaluation
LOGGED = ("train/loss", "learning_rate", "gradient_norm", "tokens_per_second")  # thinned
MAX_POINTS = 1000  # that thinning leaves of a logged curve
MAX_SAMPLES = 40
MAX_STEP = 1e15  # no run gets there: a larger one is damage
MAX_TIME = 1e11  # seconds since 1970


@dataclass(frozen=True)
class Session:
    """One start of the training command.

    Args:
        step: where the run was at the start.
        time: of the start, in seconds since 1970.
        command: as typed.
        versions: of Python and the packages that matter, by name.
    """

    step: int
    time: float
    command: str
    versions: dict[str, str]


@dataclass(frozen=True)
class FinalResult:
    """The evaluation over the whole validation split, after the last step.

    Args:
        loss: nats/token.
        bits_per_byte: comparable between tokenizers.
        num_tokens: predicted.
    """

    loss: float
    bits_per_byte: float
    num_tokens: int

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
        samples: the generated texts, one per prompt, with the step of their evaluation.
        card: what the run prints about its data and model at the start: names and values.
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
        content = vars(self) | {"sessions": [vars(session) for session in self.sessions]}
        content["final"] = self.final and vars(self.final)
        write_whole(folder / HISTORY, json.dumps(content, ensure_ascii=False))

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
        for session, end in zip(self.sessions, ends, strict=True):
            within = [time for time in times if session.time <= time < end]
            total += max(within, default=session.time) - session.time
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
        return _from_json(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError):
        raise UserError(
            f"{path} is damaged or not the history of a run",
            hint="delete it: the report can be made from the TensorBoard events beside it",
        ) from None


def _from_json(content: Any) -> History:
    """Raises all kinds of errors unless the content is what `History.save` writes."""
    curves = {}
    for name, points in content["curves"].items():
        # Steps in order, each once.
        curves[str(name)] = sorted({_step(step): float(value) for step, value in points}.items())
    _check((time for _, time in curves.get("time", [])), MAX_TIME)
    sessions = [
        Session(
            step=_step(session["step"]),
            time=float(session["time"]),
            command=str(session["command"]),
            versions={str(name): str(value) for name, value in session["versions"].items()},
        )
        for session in content["sessions"]
    ]
    _check((session.time for session in sessions), MAX_TIME)
    final = content["final"]
    return History(
        curves=curves,
        prompts=[str(text) for text in content["prompts"]],
        samples=[
            (_step(step), [str(text) for text in texts]) for step, texts in content["samples"]
        ],
        card=[(str(name), str(value)) for name, value in content["card"]],
        sessions=sessions,
        final=final
        and FinalResult(
            float(final["loss"]), float(final["bits_per_byte"]), int(final["num_tokens"])
        ),
    )


def _step(value: Any) -> int:
    step = int(value)
    _check([step], MAX_STEP)
    return step


def _check(numbers: Iterable[float], limit: float) -> None:
    """Refuses steps and times that no run can have."""
    if not all(0 <= number < limit for number in numbers):
        raise ValueError


def read_run(folder: Path) -> History:
    """A run's history, or that of a run without history.json from its TensorBoard events.

    Raises:
        UserError: the folder is not a run's, or its files are damaged.
    """
    try:
        return read_history(folder)
    except FileNotFoundError:
        pass
    history = History()
    if any(folder.glob("events.out.tfevents.*")):
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
        for name in {*EVALUATED, *LOGGED} & set(events.Tags()["scalars"]):
            points = {event.step: event.value for event in events.Scalars(name)}
            history.curves[name] = sorted(points.items())
    if not history.curves:
        raise UserError(
            f"{folder} has no {HISTORY} and no curves in TensorBoard events",
            hint="choose the folder of a run that has been evaluated at least once",
        )
    return history
