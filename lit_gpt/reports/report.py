"""Owns the report: a run's history and options in, HTML out; the report command."""

from __future__ import annotations

import json
import math
import os
import shlex
import time
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from lit_gpt.command import call
from lit_gpt.errors import UserError
from lit_gpt.reports import html
from lit_gpt.reports.charts import Line, chart
from lit_gpt.reports.history import History, read_run
from lit_gpt.storage import write_whole

REPORT = "report.html"
NUM_COLORS = 8
NUM_SAMPLES = 9  # evaluations whose samples are seen at once; the others are folded
ABSENT = "–"
SMALL_CHARTS = (  # curve, title, values as text, whether the axis begins at 0
    ("val/bits_per_byte", "Bits per byte, validation", "{:.4f}".format, False),
    ("learning_rate", "Learning rate", "{:.3g}".format, True),
    ("tokens_per_second", "Tokens a second", "{:,.0f}".format, True),
    ("gradient_norm", "Gradient norm", "{:.3g}".format, True),
)


@dataclass(frozen=True)
class Run:
    """A run to be shown: its history, and its options by their full names."""

    name: str
    history: History
    options: dict[str, str]


def read(folder: Path, name: str | None = None) -> Run:
    """The run of a folder.

    Raises:
        UserError: it holds none, or what it holds is damaged.
    """
    return Run(name or folder.resolve().name, read_run(folder), read_options(folder))


def read_options(folder: Path) -> dict[str, str]:
    """config.yaml, flat; empty where there is none."""
    import yaml

    path = folder / "config.yaml"
    try:
        return flatten(yaml.safe_load(path.read_text(encoding="utf-8")) or {})
    except yaml.YAMLError as error:
        raise UserError(f"{path} is no YAML: mend or delete it") from error
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"cannot read {path} ({reason}): mend or delete it") from error


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """{"model": {"d_model": 80}} to {"model.d_model": "80"}; values as one types them."""
    options = {}
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            options |= flatten(value, f"{prefix}{name}.")
        elif isinstance(value, str):
            options[f"{prefix}{name}"] = value
        else:
            options[f"{prefix}{name}"] = json.dumps(value, ensure_ascii=False, default=str)
    return options


def run_page(run: Run) -> str:
    """The report of one run."""
    history = run.history
    losses = [
        Line("validation", history.curves.get("val/loss", []), 0, best=history.best()),
        Line("training", history.curves.get("train/eval_loss", []), 1),
        Line("training, of the steps", history.curves.get("train/loss", []), 1, faint=True),
    ]
    small = "".join(
        f'<div class="card">{drawing}</div>'
        for name, title, show, from_zero in SMALL_CHARTS
        if (drawing := chart(title, [Line(title, history.curves.get(name, []))], show, from_zero))
    )
    loss = chart("Loss, nats a token", losses, tall=True)
    versions = history.sessions[-1].versions if history.sessions else {}
    body = (
        f"<header><h1>{escape(run.name)}</h1><p class='soft'>{escape(where(run))}</p></header>"
        f"{html.tiles(headline(run))}"
        f'<div class="card">{loss}{evaluations(history)}</div><div class="small">{small}</div>'
        f"{html.section('Samples', samples(history))}"
        '<div class="grid">'
        f"{html.section('Data and model', html.facts(history.card))}"
        f"{html.section('Versions', html.facts(versions.items()))}</div>"
        f"{html.section('Commands', commands(history))}"
        f"{html.section('Configuration', configuration(run.options))}"
    )
    return html.page(f"{run.name} - lit_gpt", body)


def where(run: Run) -> str:
    """How far it is, and when that was."""
    history, planned = run.history, run.options.get("trainer.max_steps", "")
    step = max((points[-1][0] for points in history.curves.values() if points), default=0)
    of = f" of {int(planned):,}" if planned.isdecimal() else ""
    words = [f"Step {step:,}{of}"]
    if newest := history.newest("time"):
        words.append(time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(newest[1])))
    if starts := len(history.sessions) - 1:
        words.append(f"continued {'once' if starts == 1 else f'{starts} times'}")
    return ", ".join(words)


def headline(run: Run) -> list[tuple[str, str, str]]:
    history, numbers = run.history, []
    if best := history.best():
        numbers.append(("Best validation loss", f"{best[1]:.3f}", f"at step {best[0]:,}"))
    if final := history.final:
        loss = final["loss"]
        more = f"whole split, perplexity {perplexity(loss)}"
        numbers.append(("Final validation loss", f"{loss:.4f}", more))
        numbers.append(("Bits per byte", f"{final['bits_per_byte']:.4f}", "whole validation split"))
    elif newest := history.newest("val/bits_per_byte"):
        numbers.append(("Bits per byte", f"{newest[1]:.4f}", f"at step {newest[0]:,}"))
    if speed := history.speed():
        numbers.append(("Tokens a second", f"{speed:,.0f}", "median of training"))
    if history.sessions:
        numbers.append(("Time", duration(history.seconds()), "evaluations included"))
    return numbers


def perplexity(loss: float) -> str:
    return f"{math.exp(min(loss, 700)):.2f}"


def duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def samples(history: History) -> str:
    """What the model wrote, early evaluations denser: that is where it changes most."""
    losses = dict(history.curves.get("val/loss", []))
    rows = [sample(step, losses.get(step), history.prompts, t) for step, t in history.samples]
    if len(rows) <= NUM_SAMPLES:
        return "".join(rows)
    last = len(rows) - 1
    chosen = sorted({round(last * (i / (NUM_SAMPLES - 1)) ** 2) for i in range(NUM_SAMPLES)})
    shown = "".join(rows[i] for i in chosen)
    return shown + html.folded(f"All {len(rows)} evaluations", "".join(rows))


def sample(step: int, loss: float | None, prompts: list[str], texts: list[str]) -> str:
    cells = []
    for i, text in enumerate(texts):
        prompt = prompts[i] if i < len(prompts) and text.startswith(prompts[i]) else ""
        written = text[len(prompt) :]
        cells.append(f"<div><mark>{escape(prompt)}</mark>{escape(written)}</div>")
    shown = f'<div class="soft">validation {loss:.3f}</div>' if loss is not None else ""
    return (
        f'<div class="sample"><div><b>Step {step:,}</b>{shown}</div>'
        f'<div class="texts">{"".join(cells)}</div></div>'
    )


def evaluations(history: History) -> str:
    """The numbers of the main chart, folded away."""
    train, bits = (
        dict(history.curves.get(n, [])) for n in ("train/eval_loss", "val/bits_per_byte")
    )
    rows = [
        (
            f"{step:,}",
            f"{train[step]:.3f}" if step in train else ABSENT,
            f"{loss:.3f}",
            perplexity(loss),
            f"{bits[step]:.4f}" if step in bits else ABSENT,
        )
        for step, loss in history.curves.get("val/loss", [])
    ]
    head = ("Step", "Training loss", "Validation loss", "Perplexity", "Bits per byte")
    return html.folded(f"All {len(rows)} evaluations", html.table(head, rows)) if rows else ""


def commands(history: History) -> str:
    several = len(history.sessions) > 1
    return "".join(
        f"<p>{f'<span class=soft>from step {s.step:,}: </span>' if several else ''}"
        f"<code>{escape(s.command)}</code></p>"
        for s in history.sessions
    )


def configuration(options: dict[str, str]) -> str:
    """All options but those that are off; of the Trainer's there are many, so they come last."""
    options = dict(sorted(options.items(), key=lambda item: item[0].startswith("trainer.")))
    rows = "".join(
        f"<div><span>{escape(name)}</span> {escape(value)}</div>"
        for name, value in options.items()
        if value != "null"
    )
    return f'<div class="options">{rows}</div>' if rows else ""


def comparison_page(runs: list[Run]) -> str:
    """The report of several runs, laid over each other."""

    def overlay(curve: str, title: str, *options: Any, tall: bool = False) -> str:
        lines = []
        for i, run in enumerate(runs):
            best = run.history.best() if tall else None
            points = run.history.curves.get(curve, [])
            lines.append(Line(run.name, points, i % NUM_COLORS, best=best))
        drawing = chart(title, lines, *options, tall=tall)
        return drawing and f'<div class="card">{drawing}</div>'

    small = overlay("train/eval_loss", "Training loss, nats a token", "{:.3f}".format)
    small += "".join(overlay(*spec) for spec in SMALL_CHARTS[:3])
    body = (
        f"<header><h1>{len(runs)} runs</h1><p class='soft'>Bits per byte can be compared between "
        "texts cut into other tokens, losses can't.</p></header>"
        f"{overlay('val/loss', 'Validation loss, nats a token', '{:.3f}'.format, tall=True)}"
        f'<div class="small">{small}</div>'
        f"{html.section('Results', results(runs))}"
        f"{html.section('Options that differ', differences(runs))}"
    )
    return html.page(f"{len(runs)} runs - lit_gpt", body)


def results(runs: list[Run]) -> str:
    rows = []
    for run in runs:
        history = run.history
        best, newest, final = history.best(), history.newest("val/loss"), history.final
        bits, speed = history.newest("val/bits_per_byte"), history.speed()
        rows.append(
            (
                run.name,
                f"{best[1]:.3f}" if best else ABSENT,
                f"{best[0]:,}" if best else ABSENT,
                f"{newest[1]:.3f}" if newest else ABSENT,
                f"{newest[0]:,}" if newest else ABSENT,
                f"{final['loss']:.4f}" if final else ABSENT,
                f"{final['bits_per_byte']:.4f}" if final else f"{bits[1]:.4f}" if bits else ABSENT,
                f"{speed:,.0f}" if speed else ABSENT,
                duration(history.seconds()) if history.sessions else ABSENT,
            )
        )
    losses = ("Best loss", "at step", "Last loss", "at step", "Whole split")
    return html.table(("Run", *losses, "Bits per byte", "Tokens a second", "Time"), rows)


def differences(runs: list[Run]) -> str:
    names = dict.fromkeys(name for run in runs for name in run.options)
    rows = [
        (name, *values)
        for name in names
        if len(set(values := [run.options.get(name, ABSENT) for run in runs])) > 1
    ]
    if not rows:
        return "<p>None.</p>"
    return html.table(("Option", *(run.name for run in runs)), rows)


def find_run(name: str, logs: Path) -> Path:
    """The folder that a path, `version_3` or `3` stands for."""
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
        runs: a run's folder, or its number below --logs.
        logs: where numbered runs are.
        out: the page to write; default: report.html in the run's folder, or in --logs.

    Raises:
        UserError: no such run, a damaged one, or a page that can't be written.
    """
    folders = [find_run(name, Path(logs)) for name in runs]
    names = [folder.resolve().name for folder in folders]
    if len(set(names)) < len(names):  # they lie in different folders
        names = [os.path.relpath(folder) for folder in folders]
    loaded = [read(folder, name) for folder, name in zip(folders, names, strict=True)]
    if len(loaded) == 1:
        path = Path(out or folders[0] / REPORT)
        page = run_page(loaded[0])
    else:
        path = Path(out or Path(logs) / REPORT)
        page = comparison_page(loaded)
    try:
        write_whole(path, page)
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror}", hint="choose another file with `out`"
        ) from error
    print(f"Report: {shlex.quote(str(path))}")


def main(argv: list[str]) -> int:
    call(write_report, argv, positional="runs")
    return 0
