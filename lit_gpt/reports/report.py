"""The report: a page about one run, or one that compares several."""

from __future__ import annotations

import os
import shlex
import time
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from lit_gpt.command import call
from lit_gpt.errors import UserError
from lit_gpt.reports.charts import Chart, Series
from lit_gpt.reports.history import HISTORY, History, perplexity, read_run
from lit_gpt.reports.html import charts_page
from lit_gpt.reports.run_files import MAX_OPTIONS, load_options
from lit_gpt.storage import atomic_write_text, read_limited

REPORT = "report.html"
NUM_COLORS = 8
NUM_SAMPLES = 9  # evaluations whose samples are shown at once; the others are folded away
ABSENT = "–"
SMALL_CHARTS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("val/bits_per_byte", {"title": "Validation bits per byte", "decimals": 4}),
    ("learning_rate", {"title": "Learning rate", "decimals": None, "from_zero": True}),
    ("tokens_per_second", {"title": "Tokens/s", "decimals": 0, "from_zero": True}),
    ("gradient_norm", {"title": "Gradient norm", "decimals": None, "from_zero": True}),
)


@dataclass(frozen=True)
class Run:
    """A run to report on: its history, and its options by their full names."""

    name: str
    history: History
    options: dict[str, str]


@dataclass(frozen=True)
class Sample:
    """What the model wrote at one evaluation: pairs of a prompt and its continuation."""

    step: int
    loss: float | None
    texts: list[tuple[str, str]]


def read_options(folder: Path) -> dict[str, str]:
    """The options in config.yaml by their full names; empty without the file."""
    import yaml

    path = folder / "config.yaml"
    damage = (ValueError, TypeError, LookupError, AttributeError, RecursionError)
    try:
        return load_options(read_limited(path, MAX_OPTIONS))
    except FileNotFoundError:
        return {}
    except (OSError, yaml.YAMLError, *damage) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"cannot read {path} ({reason})", hint="repair or delete it") from error


def run_page(run: Run) -> str:
    """The page about one run, as HTML."""
    history = run.history
    curves = history.curves
    best = history.best()
    note = f"best: {best[1]:.3f} at step {best[0]:,}" if best else ""
    losses = [
        Series("validation", curves.get("val/loss", []), mark=best, note=note),
        Series("training", curves.get("train/eval_loss", []), color=1),
        Series("training, single steps", curves.get("train/loss", []), "faint", color=1),
    ]
    samples = samples_of(history)
    # The Trainer's many options come last.
    options = sorted(run.options.items(), key=lambda option: option[0].startswith("trainer."))
    return charts_page(
        "run.html",
        title=run.name,
        progress=progress(run),
        tiles=tiles(run.history),
        loss=Chart("Loss, nats/token", losses, main=True),
        charts=[
            Chart(series=[Series(str(look["title"]), curves.get(name, []))], **look)
            for name, look in SMALL_CHARTS
        ],
        evaluations=evaluations(history),
        samples=samples,
        chosen_samples=denser_at_the_start(samples),
        card=history.card,
        sessions=history.sessions,
        options=[(name, value) for name, value in options if value != "null"],
    )


def progress(run: Run) -> str:
    """How far the run is, and when it got there."""
    history = run.history
    step = max((points[-1][0] for points in history.curves.values() if points), default=0)
    planned = run.options.get("trainer.max_steps", "")
    is_known = planned.isdecimal() and len(planned) < 20
    if run.options.get("trainer.max_epochs", "null") not in ("null", "-1"):
        is_known = False  # the epochs may end first
    parts = [f"Step {step:,} of {int(planned):,}" if is_known else f"Step {step:,}"]
    if newest := history.newest("time"):
        parts.append(time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(newest[1])))
    if (resumed := len(history.sessions) - 1) > 0:
        parts.append("resumed once" if resumed == 1 else f"resumed {resumed} times")
    return ", ".join(parts)


def tiles(history: History) -> list[tuple[str, str, str]]:
    """The numbers at the top: name, number, and what belongs to it."""
    numbers = []
    if best := history.best():
        numbers.append(("Best validation loss", f"{best[1]:.3f}", f"at step {best[0]:,}"))
    if final := history.final:
        part = "whole split" if final.is_whole else final.extent
        detail = f"{part}, perplexity {final.perplexity:.2f}"
        numbers.append(("Final validation loss", f"{final.loss:.4f}", detail))
        numbers.append(("Bits per byte", f"{final.bits_per_byte:.4f}", part))
    elif newest := history.newest("val/bits_per_byte"):
        numbers.append(("Bits per byte", f"{newest[1]:.4f}", f"at step {newest[0]:,}"))
    if speed := history.speed():
        numbers.append(("Tokens/s", f"{speed:,.0f}", "median of training"))
    if history.sessions:
        numbers.append(("Time", duration(history.seconds()), "including evaluations"))
    return numbers


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def evaluations(history: History) -> list[tuple[str, ...]]:
    """The numbers of the loss chart, one row per evaluation."""
    training = dict(history.curves.get("train/eval_loss", []))
    bits_per_byte = dict(history.curves.get("val/bits_per_byte", []))
    rows: list[tuple[str, ...]] = []
    for step, loss in history.curves.get("val/loss", []):
        train = shown("{:.3f}", training.get(step))
        bits = shown("{:.4f}", bits_per_byte.get(step))
        rows.append((f"{step:,}", train, f"{loss:.3f}", f"{perplexity(loss):.2f}", bits))
    return rows


def shown(template: str, number: float | None) -> str:
    return ABSENT if number is None else template.format(number)


def samples_of(history: History) -> list[Sample]:
    losses = dict(history.curves.get("val/loss", []))
    samples = []
    for step, texts in history.samples:
        pairs = []
        for prompt, text in zip_longest(history.prompts[: len(texts)], texts, fillvalue=""):
            size = len(prompt) if text.startswith(prompt) else 0
            pairs.append((text[:size], text[size:]))
        samples.append(Sample(step, losses.get(step), pairs))
    return samples


def denser_at_the_start(samples: list[Sample]) -> list[Sample]:
    """Up to NUM_SAMPLES of them, mostly early ones: the text changes fastest there."""
    if len(samples) <= NUM_SAMPLES:
        return samples
    last = NUM_SAMPLES - 1
    chosen = {round((len(samples) - 1) * (n / last) ** 2) for n in range(NUM_SAMPLES)}
    return [samples[i] for i in sorted(chosen)]


def comparison_page(runs: list[Run]) -> str:
    """The page that compares several runs, as HTML."""

    def overlay(curve: str, **look: Any) -> Chart:
        lines = []
        for i, run in enumerate(runs):
            best = run.history.best() if look.get("main") else None
            points = run.history.curves.get(curve, [])
            lines.append(Series(run.name, points, color=i % NUM_COLORS, mark=best))
        return Chart(series=lines, **look)

    option_names = dict.fromkeys(name for run in runs for name in run.options)
    options = [(name, *(run.options.get(name, ABSENT) for run in runs)) for name in option_names]
    return charts_page(
        "comparison.html",
        title=f"{len(runs)} runs",
        loss=overlay("val/loss", title="Validation loss, nats/token", main=True),
        charts=[
            overlay("train/eval_loss", title="Training loss, nats/token"),
            *(overlay(name, **look) for name, look in SMALL_CHARTS[:3]),
        ],
        results=[results(run) for run in runs],
        names=[run.name for run in runs],
        differences=[option for option in options if len(set(option[1:])) > 1],
    )


def results(run: Run) -> tuple[str, ...]:
    """A run's row in the table of results."""
    history = run.history
    absent = (None, None)
    best_step, best_loss = history.best() or absent
    step, loss = history.newest("val/loss") or absent
    _, bits = history.newest("val/bits_per_byte") or absent
    final = history.final
    return (
        run.name,
        shown("{:.3f}", best_loss),
        shown("{:,}", best_step),
        shown("{:.3f}", loss),
        shown("{:,}", step),
        shown("{:.4f}", final.loss if final else None),
        shown("{:.4f}", final.bits_per_byte if final else bits),
        shown("{:,.0f}", history.speed()),
        duration(history.seconds()) if history.sessions else ABSENT,
    )


def find_run(name: str, logs: Path) -> Path:
    """The folder that a path, `version_3`, `3` or, for the newest run, `last` stands for."""
    if name == "last" and (found := [*logs.rglob(HISTORY)]):
        return max(found, key=lambda path: path.stat().st_mtime).parent
    places = [Path(name), logs / name, logs / f"version_{name}"]
    for place in places[::-1] if name.isdecimal() else places:
        if place.is_dir():
            return place
    raise UserError(
        f"no run {name!r}",
        hint=f"name a folder such as {logs / 'version_0'}, or its number there "
        "(`logs` names another place)",
    )


def write_report(runs: list[str], logs: str = "logs", out: str | None = None) -> None:
    """Write a page about one run, or one that compares several.

    Args:
        runs: a run's folder, or its number below --logs; last: the newest.
        logs: where numbered runs are.
        out: the page to write; default: report.html in the run's folder, or in --logs.

    Raises:
        UserError: no such run, a damaged one, or a page that can't be written.
    """
    folders = [find_run(name, Path(logs)) for name in runs]
    names = [folder.resolve().name for folder in folders]
    if len(set(names)) < len(names):  # they lie in different folders
        names = [os.path.relpath(folder) for folder in folders]
    loaded = [
        Run(name, read_run(folder), read_options(folder))
        for folder, name in zip(folders, names, strict=True)
    ]
    is_single = len(loaded) == 1
    page = run_page(loaded[0]) if is_single else comparison_page(loaded)
    path = Path(out or (folders[0] if is_single else Path(logs)) / REPORT)
    try:
        atomic_write_text(path, page)
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror}", hint="choose another file with `out`"
        ) from error
    print(f"Report: {shlex.quote(str(path))}")


def main(argv: list[str]) -> int:
    call(write_report, argv)
    return 0
