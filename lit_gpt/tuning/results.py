"""What a sweep shows of its trials: a table in the terminal, and a page of charts."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from lit_gpt.reports.charts import XY, Chart, Series
from lit_gpt.reports.html import charts_page
from lit_gpt.storage import atomic_write_text
from lit_gpt.tuning.search_space import Choices, Range

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial


def counted(study: optuna.Study) -> list[FrozenTrial]:
    """The trials that were completed, were pruned or failed, in their order."""
    states = ("COMPLETE", "PRUNED")  # Optuna's FAIL are those that were interrupted
    return [t for t in study.get_trials(deepcopy=False) if t.state.name in states]


def complete(trials: list[FrozenTrial]) -> list[FrozenTrial]:
    """The completed trials, whose value is that of the whole validation split."""
    return [trial for trial in trials if trial.state.name == "COMPLETE"]


def values_of(trial: FrozenTrial) -> dict[str, str]:
    """The values of the searched options, as typed on the command line."""
    values: dict[str, str] = trial.user_attrs["values"]
    return values


def bits_per_byte(trial: FrozenTrial) -> float:
    """Of a pruned trial, that of its last evaluation."""
    assert trial.value is not None
    return trial.value


def print_table(trials: list[FrozenTrial]) -> None:
    """Prints the trials, the best first, and those without a result below in their order."""
    numbers = {id(trial): n for n, trial in enumerate(trials, 1)}
    ranked = sorted(complete(trials), key=bits_per_byte)
    others = [trial for trial in trials if trial.state.name != "COMPLETE"]
    names = list(values_of(trials[0]))
    table = Table("rank", "trial", *names, "bits per byte", "run")
    for rank, trial in enumerate([*ranked, *others], 1):
        table.add_row(
            str(rank) if rank <= len(ranked) else "",
            str(numbers[id(trial)]),
            *(values_of(trial)[name] for name in names),
            trial.user_attrs["outcome"],
            Path(trial.user_attrs["run"]).name,
        )
    Console(width=None if sys.stdout.isatty() else 120, markup=False).print(table)


def save_charts(
    trials: list[FrozenTrial], spaces: Mapping[str, Choices | Range], path: Path
) -> None:
    """Writes a page with bits per byte by trial, and by the value of each option."""
    numbers = {id(trial): n for n, trial in enumerate(trials, 1)}
    ended = complete(trials)

    def number_of(trial: FrozenTrial) -> float:
        return numbers[id(trial)]

    lowest = accumulate((bits_per_byte(trial) for trial in ended), min)
    best_so_far = list(zip(map(number_of, ended), lowest, strict=True))
    best = best_so_far[-1][1] if best_so_far else None
    mark = next((point for point in best_so_far if point[1] == best), None)
    note = f"best: {best:.4f}" if best else ""
    line = Series("best so far", best_so_far, "steps", color=1, mark=mark, note=note)
    by_trial = [*dots(trials, number_of), line]
    charts = [Chart("Validation bits per byte", by_trial, x_name="trial", decimals=4, main=True)]
    for name, space in spaces.items():
        names = space.values if isinstance(space, Choices) else ()
        is_log = isinstance(space, Range) and space.log
        series = dots(trials, place_in(space, name))
        charts.append(Chart(name, series, x_name=name, x_names=names, log_x=is_log, decimals=4))
    subtitle = f"{len(trials)} trials, {len(ended)} completed. Lower is better."
    title = f"Sweep {path.parent.name}"
    atomic_write_text(
        path, charts_page("charts.html", title=title, subtitle=subtitle, charts=charts)
    )


def place_in(space: Choices | Range, name: str) -> Callable[[FrozenTrial], float]:
    """Where a trial's value of an option lies on the x-axis."""
    if isinstance(space, Choices):
        return lambda trial: space.values.index(values_of(trial)[name])
    return lambda trial: float(values_of(trial)[name])


def dots(trials: list[FrozenTrial], place: Callable[[FrozenTrial], float]) -> list[Series]:
    """Completed and pruned trials, at `place` on the x-axis."""

    def points(chosen: list[FrozenTrial]) -> list[XY]:
        return sorted((place(trial), bits_per_byte(trial)) for trial in chosen)

    pruned = [t for t in trials if t.state.name != "COMPLETE" and t.value is not None]
    return [
        Series("completed", points(complete(trials)), "dots"),
        Series("pruned", points(pruned), "rings", color=6),
    ]
