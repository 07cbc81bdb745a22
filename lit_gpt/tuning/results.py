"""Owns what a sweep shows: the table of its trials and the plot."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from lit_gpt.reports.plots import Panel, Series, save_svg
from lit_gpt.tuning.search_space import Choices, Range

if TYPE_CHECKING:
    import optuna

    Trials = list[optuna.trial.FrozenTrial]

Y_LABEL = "validation bits per byte"


def counted(study: optuna.Study) -> Trials:
    """The trials that came to their end, were pruned or failed, in their order."""
    states = ("COMPLETE", "PRUNED")  # Optuna's FAIL are those that were interrupted
    return [t for t in study.get_trials(deepcopy=False) if t.state.name in states]


def complete(trials: Trials) -> Trials:
    """Those that came to their end, so that their value is of the whole validation split."""
    return [trial for trial in trials if trial.state.name == "COMPLETE"]


def values_of(trial: optuna.trial.FrozenTrial) -> dict[str, str]:
    """What the trial gave its options, as typed."""
    return trial.user_attrs["values"]


def print_table(trials: Trials) -> None:
    """The best first; below those without a result, in their order."""
    numbers = {id(trial): n for n, trial in enumerate(trials, 1)}
    ended = sorted(complete(trials), key=lambda trial: trial.value)
    rest = [trial for trial in trials if trial.state.name != "COMPLETE"]
    names = list(values_of(trials[0]))
    table = Table("rank", "trial", *names, "bits per byte", "run")
    for rank, trial in enumerate([*ended, *rest], 1):
        values = (values_of(trial)[name] for name in names)
        cells = (str(numbers[id(trial)]), *values, trial.user_attrs["outcome"])
        run = Path(trial.user_attrs["run"]).name
        table.add_row(str(rank) if rank <= len(ended) else "", *cells, run)
    Console(width=None if sys.stdout.isatty() else 120, markup=False).print(table)


def save_plot(trials: Trials, spaces: Mapping[str, Choices | Range], path: Path) -> Path:
    """The results by trial, with the best so far, and by the value of each option."""
    ended = complete(trials)
    numbers = {id(trial): n for n, trial in enumerate(trials, 1)}
    best = list(accumulate((trial.value for trial in ended), min))
    corners: list[tuple[float, float]] = []
    for trial, value in zip(ended, best, strict=True):
        corners += [(numbers[id(trial)], corners[-1][1] if corners else value)]
        corners += [(numbers[id(trial)], value)]
    history = [*series_of(trials, lambda trial: numbers[id(trial)], ("complete", "pruned"))]
    history.append(Series(corners, "line", 1, "best so far"))
    panels = [Panel("trial", Y_LABEL, history)]
    for name, space in spaces.items():
        if isinstance(space, Choices):
            place = partial(lambda name, at, t: at(values_of(t)[name]), name, space.values.index)
            panels.append(Panel(name, Y_LABEL, series_of(trials, place), names=space.values))
        else:
            place = partial(lambda name, t: float(values_of(t)[name]), name)
            panels.append(Panel(name, Y_LABEL, series_of(trials, place), log_x=space.log))
    save_svg(panels, path)
    return path


def series_of(
    trials: Trials,
    place: Callable[[optuna.trial.FrozenTrial], float],
    labels: tuple[str, str] = ("", ""),
) -> list[Series]:
    """Trials that ended and trials that were pruned, those at their last evaluation."""
    ended = complete(trials)
    cut = [t for t in trials if t.state.name != "COMPLETE" and t.value is not None]
    return [
        Series([(place(t), t.value) for t in ended], "dot", 0, labels[0]),
        Series([(place(t), t.value) for t in cut], "cross", 2, labels[1]),
    ]
