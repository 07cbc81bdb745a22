"""What a sweep shows of its trials: a table in the terminal, and a page of charts."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import accumulate
from math import inf, isfinite
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from lit_gpt.reports.charts import XY, Chart, Series
from lit_gpt.reports.html import charts_page
from lit_gpt.storage import atomic_write_text

if TYPE_CHECKING:
    import optuna
    from optuna.distributions import BaseDistribution


@dataclass(frozen=True)
class Result:
    """A trial that was completed, was pruned or failed.

    Args:
        number: from 1.
        values: of the searched options, as typed on the command line.
        bits_per_byte: of the whole validation split; of a pruned trial, that of its last
            evaluation; infinite if there was none.
        outcome: bits per byte, or why the trial was not completed.
        run: folder.
    """

    number: int
    is_complete: bool
    values: dict[str, str]
    bits_per_byte: float
    outcome: str
    run: str


def results_of(study: optuna.Study) -> list[Result]:
    """The results in the order of the trials, without those that were interrupted."""
    states = ("COMPLETE", "PRUNED")
    trials = [t for t in study.get_trials(deepcopy=False) if t.state.name in states]
    return [
        Result(
            number,
            trial.state.name == "COMPLETE",
            bits_per_byte=inf if trial.value is None else trial.value,
            **trial.user_attrs,
        )
        for number, trial in enumerate(trials, 1)
    ]


def ranking(results: list[Result]) -> list[Result]:
    """The completed trials, the best first."""
    completed = [result for result in results if result.is_complete]
    return sorted(completed, key=lambda result: result.bits_per_byte)


def print_table(results: list[Result]) -> None:
    """Prints the trials, the best first, and those not completed below in their order."""
    table = Table("rank", "trial", *results[0].values, "bits per byte", "run")
    ranks = {result.number: rank for rank, result in enumerate(ranking(results), 1)}
    for result in sorted(results, key=lambda r: ranks.get(r.number, len(results) + r.number)):
        table.add_row(
            str(ranks.get(result.number, "")),
            str(result.number),
            *result.values.values(),
            result.outcome,
            Path(result.run).name,
        )
    Console(width=None if sys.stdout.isatty() else 120, markup=False).print(table)


def save_charts(results: list[Result], spaces: Mapping[str, BaseDistribution], path: Path) -> None:
    """Writes a page with bits per byte by trial, and by the value of each option."""
    completed = [result for result in results if result.is_complete]
    lowest = accumulate((result.bits_per_byte for result in completed), min)
    best_so_far = [(r.number, low) for r, low in zip(completed, lowest, strict=True)]
    best = min(best_so_far, key=lambda point: point[1], default=None)
    note = f"best: {best[1]:.4f}" if best else ""
    line = Series("best so far", best_so_far, "steps", color=1, mark=best, note=note)
    by_trial = [*dots(results, lambda result: result.number), line]
    charts = [Chart("Validation bits per byte", by_trial, x_name="trial", decimals=4, main=True)]
    for name, space in spaces.items():
        names = getattr(space, "choices", ())
        is_log = getattr(space, "log", False)

        def place(result: Result, name: str = name, names: tuple[str, ...] = names) -> float:
            value = result.values[name]
            return names.index(value) if names else float(value)

        series = dots(results, place)
        charts.append(Chart(name, series, x_name=name, x_names=names, log_x=is_log, decimals=4))
    subtitle = f"{len(results)} trials, {len(completed)} completed. Lower is better."
    title = f"Sweep {path.parent.name}"
    atomic_write_text(
        path, charts_page("charts.html", title=title, subtitle=subtitle, charts=charts)
    )


def dots(results: list[Result], place: Callable[[Result], float]) -> list[Series]:
    """Completed and pruned trials, at `place` on the x-axis."""

    def points(are_complete: bool) -> list[XY]:
        chosen = [result for result in results if result.is_complete == are_complete]
        return sorted((place(r), r.bits_per_byte) for r in chosen if isfinite(r.bits_per_byte))

    return [
        Series("completed", points(True), "dots"),
        Series("pruned", points(False), "rings", color=6),
    ]
