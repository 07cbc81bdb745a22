"""The sweep: which options are tried next, what is kept of a trial, and how a sweep continues.

Each trial is a process of its own, forked from one that has already imported torch and Lightning:
it starts at once, returns all its memory, and neither a crash nor compiled code of other shapes
reaches the next. What is tried depends only on the trials completed before, whose number seeds the
sampler. So a killed sweep, continued, tries what it would have tried.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lit_gpt.command import Parser, command_line, stop_at_once
from lit_gpt.errors import UserError
from lit_gpt.storage import locked
from lit_gpt.tuning.results import print_table, ranking, results_of, save_charts
from lit_gpt.tuning.search_space import Sweep, read_options, read_sweep

if TYPE_CHECKING:
    import optuna

SEED = 1337  # of the search; the runs have --seed_everything
FULL_TRIALS = 5  # that are completed before any is pruned
OWN_OPTIONS = ("config", "trials", "study")
FREE_SHARE = 0.25  # of a run's steps before it may be pruned


def option_name(field: str) -> str:
    """A field as the command line spells it: its own options, and those of train."""
    if field in OWN_OPTIONS:
        return f"--{field}"
    from lit_gpt.training.options import option_name as train_name  # imports torch

    return train_name(field)


def import_optuna() -> None:
    try:
        import optuna
    except ModuleNotFoundError as error:
        hint = 'pip install -e ".[sweep]"'
        raise UserError(f"{error.name} is missing, which a sweep needs", hint=hint) from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)


def run_in_process(name: str, *args: Any) -> None:
    """Calls a function of `trial`, which is imported here: the sweep itself needs no torch."""
    from lit_gpt.tuning import trial

    trial.prepare()
    getattr(trial, name)(*args)


@contextmanager
def worker_process(name: str, *args: Any) -> Iterator[tuple[Connection, Any]]:
    """A process that calls a function of `trial`, and the connection to it.

    It is killed if the block raises.
    """
    can_fork = "forkserver" in multiprocessing.get_all_start_methods()
    context: Any = multiprocessing.get_context("forkserver" if can_fork else "spawn")
    if can_fork:
        context.set_forkserver_preload(["lit_gpt.tuning.trial"])
    ours, theirs = context.Pipe()
    process = context.Process(target=run_in_process, args=(name, *args, theirs), daemon=True)
    process.start()
    theirs.close()  # so that the end of the process ends the connection
    try:
        yield ours, process
    except BaseException:
        process.kill()
        raise
    finally:
        process.join()
        ours.close()


def check(runs: list[list[str]], path: str) -> None:
    """Checks, before anything is written, that train accepts these options.

    Raises:
        UserError: what train says of the first that it refuses.
    """
    with worker_process("check_options", runs) as (connection, process):
        try:
            problem = connection.recv()
        except EOFError:
            process.join()
            problem = f"the process that checks the options ended with status {process.exitcode}"
    if problem:
        raise UserError(problem, field="config", value=path)


@contextmanager
def open_study(plan: Sweep) -> Iterator[optuna.Study]:
    """The study in the sweep's folder, new or continued, for this process alone.

    Raises:
        UserError: another process uses it, or it is not a study of these options.
    """
    import optuna
    from optuna.exceptions import StorageInternalError
    from sqlalchemy import URL
    from sqlalchemy.exc import SQLAlchemyError

    path = plan.folder / "study.db"
    try:
        plan.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        problem = f"can't use the folder {plan.folder}: {error.strerror}"
        raise UserError(problem, hint="name another folder with `study`") from error
    with locked(plan.folder, hint="wait until it ends, or name another folder with `study`"):
        try:
            study = optuna.create_study(
                storage=URL.create("sqlite", database=str(path)).render_as_string(),
                study_name="sweep",
                pruner=optuna.pruners.MedianPruner(FULL_TRIALS),
                load_if_exists=True,
            )
        except (SQLAlchemyError, StorageInternalError, RuntimeError) as error:
            problem = f"{path} can't be used as a study: {str(error).splitlines()[0]}"
            raise UserError(problem, hint="name another folder with `study`") from error
        refuse_other_options(study, plan)
        try:
            yield study
        except StorageInternalError as error:
            raise UserError(f"can't write to {path}: {error.__cause__ or error}") from error


def refuse_other_options(study: optuna.Study, plan: Sweep) -> None:
    """Notes the options of a new study, and checks those of an old one."""
    given = plan.described()
    saved = study.user_attrs.get("options")
    if saved is None:
        study.set_user_attr("options", given)
    elif saved != given:
        name = next(n for n in (*given, *saved) if given.get(n) != saved.get(n))
        raise UserError(
            f"belongs to a different sweep: {name} is {saved.get(name)} there and "
            f"{given.get(name)} here",
            field="study",
            value=str(plan.folder),
            hint="give the same options, or another folder",
        )


def retry_interrupted(study: optuna.Study) -> None:
    """Queues the trials that a killed sweep left running, to be tried before any other."""
    from optuna.trial import TrialState

    for trial in study.get_trials(states=(TrialState.RUNNING,)):
        study.tell(trial.number, state=TrialState.FAIL)
        if trial.params:
            study.enqueue_trial(trial.params)


def try_next(study: optuna.Study, plan: Sweep) -> None:
    """Runs one more trial and keeps its result."""
    import optuna

    done = results_of(study)
    seed = int(np.random.SeedSequence((SEED, len(done))).generate_state(1)[0])
    study.sampler = optuna.samplers.TPESampler(seed=seed)
    trial = study.ask(plan.spaces)
    number = len(done) + 1
    values = plan.texts(trial.params)
    trial.set_user_attr("values", values)
    options = " ".join(f"--{name}={text}" for name, text in values.items())
    print(f"Trial {number} of {plan.trials}: {options}", flush=True)
    twin = next((result for result in ranking(done) if result.values == values), None)
    value: float | None
    if twin:  # with few choices some come twice, and the same run would end the same
        value = twin.bits_per_byte
        outcome = twin.outcome
        run = twin.run
    else:
        argv = [*plan.argv(values), f"--trainer.default_root_dir={plan.folder}"]
        value, outcome, run = train(trial, argv, plan.folder / f"trial_{number}.txt")
    trial.set_user_attr("outcome", outcome)
    trial.set_user_attr("run", run)
    # A failed trial counts as pruned, so that the sampler avoids its values.
    study.tell(trial, value, state=optuna.trial.TrialState.PRUNED if value is None else None)
    print(f"  bits per byte: {outcome}", flush=True)


def train(trial: optuna.Trial, argv: list[str], log: Path) -> tuple[float | None, str, str]:
    """One run: bits per byte of the whole validation split, the outcome as text, its folder."""
    with worker_process("run_trial", argv, log) as (connection, process):
        try:
            while (message := connection.recv())[0] == "evaluated":
                _, step, evaluated, share = message
                trial.report(evaluated, step)
                connection.send(FREE_SHARE <= share < 1 and trial.should_prune())
        except (EOFError, ConnectionError):
            process.join()
            message = ("failed", f"its process ended with status {process.exitcode}", "")
    kind, result, run = message
    if kind == "done":
        return result, f"{result:.4f}", run
    if kind == "pruned":
        return None, f"{evaluated:.4f}, pruned at step {step}", run
    return None, f"failed: {result} ({log})", run


def report(study: optuna.Study, plan: Sweep) -> None:
    """Prints the table and the best run's options, and saves the charts, if there are trials.

    Raises:
        UserError: all trials are done, and none was completed.
    """
    results = results_of(study)
    if not results:
        return
    print_table(results)
    charts = plan.folder / "sweep.html"
    save_charts(results, plan.spaces, charts)
    print(f"Charts: {charts}")
    if completed := ranking(results):
        best = completed[0]
        print(f"Best: {best.bits_per_byte:.4f} bits per byte ({best.run}), with")
        print(command_line("train", *plan.argv(best.values)))
    elif len(results) >= plan.trials:
        problem = f"none of {len(results)} trials was completed; the last one: "
        raise UserError(problem + results[-1].outcome)


def sweep(
    more: list[str],
    config: str = "configs/sweep.yaml",
    trials: int | None = None,
    study: str | None = None,
) -> None:
    """Search for good options with Optuna; more options are those of train, for all trials.

    Args:
        more: further options of train.
        config: what to search, and how
        trials: how many in total, those already done included
        study: folder of the study and its runs; a study there is continued
    """
    import_optuna()
    plan = read_sweep(config, trials, study, more)
    with stop_at_once():
        check(list(plan.examples()), config)
        with open_study(plan) as optuna_study:
            retry_interrupted(optuna_study)
            try:
                while len(results_of(optuna_study)) < plan.trials:
                    try_next(optuna_study, plan)
            except SystemExit:
                report(optuna_study, plan)
                given = {"config": config, "trials": trials, "study": study}
                own = [f"--{name}={value}" for name, value in given.items() if value is not None]
                print(f"Stopped. Continue:  {command_line('sweep', *own, *more)}")
                raise
            report(optuna_study, plan)


def main(argv: list[str]) -> int:
    """Runs the command; all options that are not its own are train's."""
    parser = Parser(
        usage="%(prog)s [options] [options of train]",
        description="Search for good options with Optuna. Further options are those of train, for "
        "all trials: --trainer.max_steps=100.",
    )
    parser.add_function_arguments(sweep, skip={"more"})
    own: list[str] = []
    more: list[str] = []
    if {"-h", "--help"} & set(argv):
        own = ["--help"]
    else:
        for name, value in read_options(argv):
            (own if name in OWN_OPTIONS else more).append(f"--{name}={value}")
    sweep(more, **parser.parse_args(own))
    return 0
