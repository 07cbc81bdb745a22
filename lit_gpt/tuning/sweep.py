"""Owns the sweep: which options are tried next, what of it is kept, and how it goes on.

Each trial is a process of its own, forked from one that has imported torch and Lightning already:
it starts at once, gives all its memory back, and neither a crash nor compiled code of other shapes
touches the next. What is tried is a function of the trials that came to an end before: the sampler
is seeded by their number. So a killed sweep, continued, tries what it would have tried.
"""

from __future__ import annotations

import multiprocessing
import shlex
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lit_gpt.command import stop_at_once
from lit_gpt.errors import UserError
from lit_gpt.storage import locked
from lit_gpt.tuning.results import complete, counted, print_table, save_charts, values_of
from lit_gpt.tuning.search_space import Sweep, read_sweep

if TYPE_CHECKING:
    import optuna

SEED = 1337  # of the search; the runs have --seed_everything
FULL_TRIALS = 5  # that come to their end before any is pruned
FREE_SHARE = 0.25  # of a run's steps before it may be pruned


def sweep(options: Namespace, more: list[str]) -> int:
    """Runs the trials that are missing and reports on all; options of scripts/sweep.py.

    Args:
        more: further options of train.py, for all trials.

    Raises:
        UserError: Optuna, the file, the options or the study can't be used.
    """
    import_optuna()
    plan = read_sweep(options.config, options.trials, options.study, more)
    words = [f"--trainer.default_root_dir={plan.folder}"]
    with stop_at_once():
        check([run + words for run in plan.typical()], options.config)
        with study_of(plan) as study:
            retry_interrupted(study)
            try:
                while len(counted(study)) < plan.trials:
                    try_next(study, plan, words)
            except SystemExit:
                report(study, plan)
                print(f"Stopped. Go on:  {command(options, more)}")
                raise
            report(study, plan)
    return 0


def import_optuna() -> None:
    try:
        import optuna
    except ModuleNotFoundError as error:
        raise UserError(
            f'{error.name} is missing, which a sweep needs: pip install -e ".[sweep]"'
        ) from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)


def run_in_process(name: str, *args: Any) -> None:
    """A function of `trial`; imported there, for this process has no need of torch."""
    from lit_gpt.tuning import trial

    getattr(trial, name)(*args)


@contextmanager
def process_of(name: str, *args: Any) -> Iterator[tuple[Connection, Any]]:
    """Such a function at work, and the connection to it; where the block is left early, its end."""
    forks = "forkserver" in multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if forks else "spawn")
    if forks:
        context.set_forkserver_preload(["lit_gpt.tuning.trial"])
    ours, theirs = context.Pipe()
    process = context.Process(target=run_in_process, args=(name, *args, theirs), daemon=True)
    process.start()
    theirs.close()  # so that its end is seen here
    try:
        yield ours, process
    except BaseException:
        process.kill()
        raise
    finally:
        process.join()
        ours.close()


def check(runs: list[list[str]], path: str) -> None:
    """That train.py can use each end and each choice, before anything is made.

    Raises:
        UserError: what it says of the first that it can't.
    """
    with process_of("check_options", runs) as (connection, process):
        try:
            problem = connection.recv()
        except EOFError:
            process.join()
            problem = f"the process that checks the options ended with status {process.exitcode}"
    if problem:
        raise UserError(f"{path}: {problem}")


@contextmanager
def study_of(plan: Sweep) -> Iterator[optuna.Study]:
    """The study in the sweep's folder, made or gone on with, for this process alone.

    Raises:
        UserError: another process holds it, it is no study, or one of other options.
    """
    import optuna
    from sqlalchemy import URL
    from sqlalchemy.exc import SQLAlchemyError

    folder, path = plan.folder, plan.folder / "study.db"
    other = "name another folder with --study"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"can't use the folder {folder}: {error.strerror}; {other}") from error
    url = URL.create("sqlite", database=str(path)).render_as_string()
    errors = (SQLAlchemyError, optuna.exceptions.StorageInternalError, RuntimeError)
    with locked(folder, hint="wait until it ends, or name another `study` folder"):
        try:
            try:
                pruner = optuna.pruners.MedianPruner(FULL_TRIALS)
                study = optuna.create_study(
                    storage=url, study_name="sweep", pruner=pruner, load_if_exists=True
                )
            except errors as error:
                problem = str(error).splitlines()[0]
                raise UserError(f"{path} can't be used as a study: {problem}; {other}") from error
            refuse_other_options(study, plan, path)
            yield study
        except optuna.exceptions.StorageInternalError as error:
            raise UserError(f"can't write to {path}: {error.__cause__ or error}") from error


def refuse_other_options(study: optuna.Study, plan: Sweep, path: Path) -> None:
    now, then = plan.described(), study.user_attrs.get("options")
    if then is None:
        study.set_user_attr("options", now)
    elif then != now:
        name = next(n for n in (*now, *then) if now.get(n) != then.get(n))
        raise UserError(
            f"{path} has trials of another sweep: {name} is {then.get(name)} there and "
            f"{now.get(name)} here: give the same options, or another folder with --study"
        )


def retry_interrupted(study: optuna.Study) -> None:
    """Trials that a killed sweep left running are tried again, before any other."""
    import optuna

    for trial in study.get_trials(states=(optuna.trial.TrialState.RUNNING,)):
        study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
        if trial.params:
            study.enqueue_trial(trial.params)


def try_next(study: optuna.Study, plan: Sweep, words: list[str]) -> None:
    import optuna

    done = counted(study)
    seed = int(np.random.SeedSequence((SEED, len(done))).generate_state(1)[0])
    study.sampler = optuna.samplers.TPESampler(seed=seed)
    trial = study.ask()
    values = {name: space.suggest(trial, name) for name, space in plan.spaces.items()}
    trial.set_user_attr("values", values)
    number, tried = len(done) + 1, " ".join(f"--{name}={text}" for name, text in values.items())
    print(f"Trial {number} of {plan.trials}: {tried}", flush=True)
    twin = next((t for t in complete(done) if values_of(t) == values), None)
    if twin:  # of few choices some come twice; the same run would end the same
        value, outcome, run = twin.value, twin.user_attrs["outcome"], twin.user_attrs["run"]
    else:
        log = plan.folder / f"trial_{number}.txt"
        value, outcome, run = train(trial, [*plan.words(values), *words], log)
    trial.set_user_attr("outcome", outcome)
    trial.set_user_attr("run", run)
    # What failed counts as pruned, so that the sampler keeps away from there.
    pruned = optuna.trial.TrialState.PRUNED
    study.tell(trial, value, state=pruned if value is None else None)
    print(f"  bits per byte: {outcome}", flush=True)


def train(trial: optuna.Trial, words: list[str], log: Path) -> tuple[float | None, str, str]:
    """One run: bits per byte over the whole validation split, what came of it, its folder."""
    with process_of("run_trial", words, log) as (connection, process):
        try:
            while (message := connection.recv())[0] == "evaluated":
                _, step, bits_per_byte, share = message
                trial.report(bits_per_byte, step)
                connection.send(FREE_SHARE <= share < 1 and trial.should_prune())
        except (EOFError, ConnectionError):
            process.join()
            message = ("failed", f"its process ended with status {process.exitcode}", "")
    kind, result, run = message
    if kind == "done":
        return result, f"{result:.4f}", run
    if kind == "pruned":
        return None, f"{bits_per_byte:.4f}, pruned at step {step}", run
    return None, f"failed: {result} ({log})", run


def report(study: optuna.Study, plan: Sweep) -> None:
    """The table, the plot and the best run's options, as far as there are any.

    Raises:
        UserError: all trials that were asked for came to nothing.
    """
    trials = counted(study)
    if not trials:
        return
    print_table(trials)
    charts = plan.folder / "sweep.html"
    save_charts(trials, plan.spaces, charts)
    print(f"Plot: {charts}")
    ended = complete(trials)
    if not ended and len(trials) >= plan.trials:
        raise UserError(
            f"none of {len(trials)} trials came to its end; the last one: "
            f"{trials[-1].user_attrs['outcome']}"
        )
    if ended:
        best = min(ended, key=lambda trial: trial.value)
        words = shlex.join(["python", "scripts/train.py", *plan.words(values_of(best))])
        print(f"Best: {best.value:.4f} bits per byte ({best.user_attrs['run']}), with")
        print(words)


def command(options: Namespace, more: list[str]) -> str:
    """This sweep, to be pasted."""
    given = {"config": options.config, "trials": options.trials, "study": options.study}
    words = [f"--{name}={value}" for name, value in given.items() if value is not None]
    return shlex.join(["python", "scripts/sweep.py", *words, *more])
