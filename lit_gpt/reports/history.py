"""Owns what a run remembers of itself: history.json in its folder, which its report is made of."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lit_gpt.errors import UserError
from lit_gpt.reports.charts import Point
from lit_gpt.storage import write_whole

HISTORY = "history.json"
EVALUATED = ("train/eval_loss", "val/loss", "val/bits_per_byte")  # kept of every evaluation
FINAL = ("loss", "bits_per_byte", "num_tokens")
LOGGED = ("train/loss", "learning_rate", "gradient_norm", "tokens_per_second")  # thinned
MAX_POINTS, MAX_SAMPLES = 1000, 40  # what thinning leaves at the most


@dataclass
class Session:
    """One start of the training command.

    Args:
        step: the run was at.
        time: of the start, in seconds since 1970.
    """

    step: int
    time: float
    command: str
    versions: dict[str, str]


@dataclass
class History:
    """A run, as far as it has come.

    Args:
        curves: points in the order of the steps, by the names that TensorBoard shows; `time` has
            when each evaluation was, in seconds since 1970.
        prompts: what the samples go on from.
        samples: the texts of evaluations, with their step.
        card: what the run says of its data and model at the start: names and values.
        sessions: what made it, the continuations too.
        final: loss, bits_per_byte and num_tokens over the whole validation split, at the end.
    """

    curves: dict[str, list[Point]] = field(default_factory=dict)
    prompts: list[str] = field(default_factory=list)
    samples: list[tuple[int, list[str]]] = field(default_factory=list)
    card: list[tuple[str, str]] = field(default_factory=list)
    sessions: list[Session] = field(default_factory=list)
    final: dict[str, float] | None = None

    def begin(self, session: Session) -> None:
        """Goes on from the session's step: what came after it, is to come again."""
        for entries in (*self.curves.values(), self.samples):
            entries[:] = [entry for entry in entries if entry[0] <= session.step]
        self.sessions = [s for s in self.sessions if s.step < session.step] + [session]
        self.final = None

    def add(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            put(self.curves.setdefault(name, []), (step, value))

    def add_samples(self, step: int, prompts: list[str], texts: list[str]) -> None:
        self.prompts = prompts
        put(self.samples, (step, texts))

    def save(self, folder: Path) -> None:
        """Writes history.json; of a long run it keeps every evaluation, but fewer of the steps."""
        for name in LOGGED:
            if len(self.curves.get(name, [])) > 2 * MAX_POINTS:
                self.curves[name] = thin(self.curves[name], MAX_POINTS)
        if len(self.samples) > 2 * MAX_SAMPLES:
            self.samples = thin(self.samples, MAX_SAMPLES)
        content = vars(self) | {"sessions": [vars(session) for session in self.sessions]}
        write_whole(folder / HISTORY, json.dumps(content, ensure_ascii=False))

    def newest(self, name: str) -> Point | None:
        return (self.curves.get(name) or [None])[-1]

    def best(self) -> Point | None:
        """The lowest validation loss; the first of equals. best.ckpt never is of step 0."""
        trained = [point for point in self.curves.get("val/loss", []) if point[0] > 0]
        return min(trained, key=lambda point: point[1], default=None)

    def speed(self) -> float | None:
        """Tokens a second: the median of what was logged."""
        rates = sorted(value for _, value in self.curves.get("tokens_per_second", []))
        return rates[len(rates) // 2] if rates else None

    def seconds(self) -> float:
        """From each start to the last evaluation before the next."""
        times = [time for _, time in self.curves.get("time", [])]
        ends = [session.time for session in self.sessions[1:]] + [math.inf]
        return sum(
            max((time for time in times if session.time <= time < end), default=session.time)
            - session.time
            for session, end in zip(self.sessions, ends, strict=True)
        )


def put(entries: list, entry: tuple[int, Any]) -> None:
    """Adds it at the end, in the place of what is there of its step and later ones."""
    while entries and entries[-1][0] >= entry[0]:
        entries.pop()
    entries.append(entry)


def thin(entries: list, most: int) -> list:
    """The first, and the last of each `width` steps; the same, if thinned more than once."""
    width, kept = 1, entries
    while len(kept) > most:
        width *= 2
        kept = list({-(-entry[0] // width): entry for entry in entries}.values())
    return kept if kept[0] == entries[0] else [entries[0], *kept]


def read_history(folder: Path) -> History:
    """What history.json says.

    Raises:
        UserError: it is damaged or can't be read.
        FileNotFoundError: there is none.
    """
    path = folder / HISTORY
    try:
        return from_json(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError):
        raise UserError(
            f"{path} is damaged or no history of a run: delete it, and the report is made of the "
            "TensorBoard events beside it"
        ) from None


def from_json(content: Any) -> History:
    """Raises all kinds of errors where it is not what `save` wrote."""
    curves = {
        name: sorted({within(1e15, int(step)): float(value) for step, value in points}.items())
        for name, points in content["curves"].items()
    }
    sessions = [
        Session(
            within(1e15, int(session["step"])),
            within(1e11, float(session["time"])),
            str(session["command"]),
            {str(name): str(value) for name, value in session["versions"].items()},
        )
        for session in content["sessions"]
    ]
    for _, when in curves.get("time", []):
        within(1e11, when)
    final = content["final"]
    return History(
        curves=curves,
        prompts=[str(text) for text in content["prompts"]],
        samples=[
            (within(1e15, int(step)), [str(text) for text in texts])
            for step, texts in content["samples"]
        ],
        card=[(str(name), str(value)) for name, value in content["card"]],
        sessions=sessions,
        final=final and {name: float(final[name]) for name in FINAL},
    )


def within(limit: float, number: float) -> float:
    """A step or time as it is; one that no run can have is a ValueError."""
    if not 0 <= number < limit:
        raise ValueError(number)
    return number


def read_run(folder: Path) -> History:
    """A run's history; that of a run made before there was any, from its TensorBoard events.

    Raises:
        UserError: the folder is no run's, or its files are damaged.
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
            f"{folder} has no {HISTORY} and no curves in TensorBoard events, so it is no run, or "
            "one without an evaluation yet"
        )
    return history
