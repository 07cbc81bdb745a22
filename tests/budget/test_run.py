"""--budget on the command line: a run of it, its options, its resume, its plan, what is refused."""

from __future__ import annotations

import json
import os
import shlex
import signal
import time
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch.callbacks import Callback

from lit_gpt.budget import planner, recipe
from lit_gpt.budget import trial as trial_module
from lit_gpt.budget.choice import CHOSEN
from lit_gpt.callbacks.budget_clock import BudgetClock
from lit_gpt.checkpoint import Checkpoint
from lit_gpt.command import run as run_command
from lit_gpt.errors import UserError
from lit_gpt.planning import plan
from lit_gpt.training import budget
from lit_gpt.training import train as train_command
from lit_gpt.training.options import TrainOptions, option_name
from lit_gpt.tuning.search_space import read_sweep
from tests.conftest import command_line

SMALL = {"model.d_model": 16, "model.num_blocks": 1, "data.tokenizer": "bytes"}
QUIET = {"samples.num_tokens": 0, "trainer.accelerator": "cpu"}
DOTTED = [option_name(name).removeprefix("--") for name in CHOSEN]


@pytest.fixture(autouse=True)
def process(monkeypatch):
    """A process that has just started, on a machine whose trial is over at once."""
    start = time.monotonic()

    def seconds_since_start() -> float:
        return time.monotonic() - start

    monkeypatch.setattr(planner, "seconds_since_start", seconds_since_start)
    clock = partial(BudgetClock, clock=seconds_since_start)
    monkeypatch.setattr(train_command, "BudgetClock", clock)
    monkeypatch.setattr(trial_module, "ENOUGH", (0.0, 0.0))
    monkeypatch.setattr(trial_module, "PROBES", trial_module.PROBES[:4])
    monkeypatch.setattr(recipe, "MOST_EPOCHS", 0.5)


@pytest.fixture
def budget_run(train, places):
    return partial(train, defaults=places | QUIET | SMALL)


def options_of(run: Path) -> dict:
    options = yaml.safe_load((run / "config.yaml").read_text())
    return options | {
        f"{group}.{name}": value
        for group, values in options.items()
        if isinstance(values, dict)
        for name, value in values.items()
    }


def weights_of(run: Path) -> dict:
    return Checkpoint.read(run / "checkpoints" / "last.ckpt").weights


def same(one: Path, other: Path) -> bool:
    first, second = weights_of(one), weights_of(other)
    return all(torch.equal(first[name], second[name]) for name in first)


def pasted(out: str) -> list[str]:
    """The arguments of the command that is the same without a budget."""
    (line,) = (line for line in out.splitlines() if line.startswith("The same without --budget:"))
    words = shlex.split(line.partition(":")[2])
    assert words[:2] == ["python", "scripts/train.py"]
    return words[2:]


def test_a_budget_makes_an_ordinary_run(budget_run, train, tmp_path):
    """Its options are in config.yaml, the checkpoint and a command: each gives the same numbers."""
    first = budget_run("--budget=40s")
    assert (first.status, first.err) == (0, "")
    run = tmp_path / "logs" / "version_0"
    options = options_of(run)
    assert options["budget"] is None
    steps = options["trainer.max_steps"]
    assert f"Steps: {steps:,}, " in first.out
    assert f"Last checkpoint: {run}/checkpoints/last.ckpt (step {steps})" in first.out
    assert Checkpoint.read(run / "checkpoints" / "last.ckpt").options["budget"] is None
    words = pasted(first.out)
    assert not any(word.startswith("--budget") for word in words)

    again = train(*words, defaults={})
    assert again.status == 0
    assert same(run, tmp_path / "logs" / "version_1")
    assert again.steps == first.steps
    config = train(defaults={"config": run / "config.yaml"})
    assert config.status == 0
    assert same(run, tmp_path / "logs" / "version_2")


def test_options_on_the_command_line_and_in_a_file_are_kept(budget_run, tmp_path):
    file = tmp_path / "given.yaml"
    file.write_text("data: {batch_size: 5}\nmodel: {dropout: 0.1, learning_rate: 0.001}\n")
    given = {"data.context_length": 24, "model.style": "classic"}
    done = budget_run("--budget", "40s", config=file, **given)
    assert (done.status, done.err) == (0, "")
    options = options_of(tmp_path / "logs" / "version_0")
    given |= SMALL | {"data.batch_size": 5, "model.dropout": 0.1, "model.learning_rate": 1e-3}
    assert {name: options[name] for name in given} == given
    assert options["model.optimizer"] == recipe.FIXED["optimizer"]  # chosen
    words = pasted(done.out)
    assert "--budget=null" in words  # the file may have one
    assert "40s" not in words


def test_a_tokenizer_is_chosen_and_the_text_encoded_once(train, places, tmp_path):
    sizes = {"model.d_model": 16, "model.num_blocks": 1, "trainer.max_steps": 20}
    done = train("--budget=40s", defaults=places | QUIET | sizes)
    assert (done.status, done.err) == (0, "")
    name = options_of(tmp_path / "logs" / "version_0")["data.tokenizer"]
    assert f"Tokenizer: {name}, " in done.out
    assert len([path for path in (tmp_path / "cache").iterdir() if path.is_dir()]) == 1


def trial_of(argv: dict, monkeypatch) -> tuple[trial_module.Trial, int]:
    """The trial that a command makes, and the threads that it has to compute on."""
    found = []

    class Found(Exception):
        pass

    def make(*args):
        found.append((trial_module.Trial(*args), torch.get_num_threads()))
        raise Found

    monkeypatch.setattr(planner, "Trial", make)
    with pytest.raises(Found):
        TrainOptions(command_line(argv | {"budget": "40s"}))
    return found[0]


def test_a_trial_has_the_threads_that_are_given(places, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # so that it is set back
    before = torch.get_num_threads()
    try:
        trial, threads = trial_of(places | QUIET | {"threads": 3}, monkeypatch)
    finally:
        torch.set_num_threads(before)
    assert (threads, trial.are_threads_given) == (3, True)


@pytest.mark.parametrize(
    ("given", "used"),
    [
        *(("bf16", "bf16-mixed"), ("bf16-true", "bf16-true"), ("64", "64-true"), ("32", "32-true")),
        *(("16", "bf16-mixed"), ("16-mixed", "bf16-mixed")),  # without a GPU
    ],
)
def test_a_trial_has_the_precision_that_the_trainer_makes_of_it(given, used, places, monkeypatch):
    argv = places | QUIET | {"trainer.precision": given}
    assert trial_of(argv, monkeypatch)[0].precision == used


def test_the_choices_of_the_model_that_are_given_are_fixed(places, monkeypatch):
    given = {"sliding_window": 9, "qkv_bias": True, "norm_eps": 0.01, "activation": "gelu"}
    options = {f"model.{name}": value for name, value in given.items()}
    trial, _ = trial_of(places | QUIET | options, monkeypatch)
    assert given.items() <= trial.fixed.items()


@pytest.mark.parametrize("given", [None, 0.25])
def test_a_trial_has_the_dropout_of_the_run(given, places, monkeypatch):
    argv = places | QUIET | ({} if given is None else {"model.dropout": given})
    trial, _ = trial_of(argv, monkeypatch)
    assert trial.probe(256, 32, 2, 64, 4).config.dropout == (given or 0.0)


def test_a_budget_in_a_file_of_options_works_too(budget_run, tmp_path):
    file = tmp_path / "given.yaml"
    file.write_text("budget: 40s\n")
    done = budget_run(config=file, **{"trainer.max_steps": 20})
    assert "Budget: 40 s, of which" in done.out
    assert options_of(tmp_path / "logs" / "version_0")["budget"] is None


class CtrlC(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer, *args):
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_in_the_trial_leaves_nothing(budget_run, tmp_path, monkeypatch):
    def interrupt(config):
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(trial_module, "GPT", interrupt)
    done = budget_run("--budget=40s")
    assert done.status == 130
    assert "Traceback" not in done.out + done.err
    assert not (tmp_path / "logs").exists()
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("how", ["budget", "config"])
def test_a_resumed_run_keeps_its_options_without_a_trial(
    how, budget_run, train, tmp_path, monkeypatch
):
    whole = budget_run("--budget=40s")
    run = tmp_path / "logs" / "version_0"
    options = options_of(run)
    half = options["trainer.val_check_interval"] * 4
    stopped = {"trainer.default_root_dir": tmp_path / "two"}
    words = [f"--{name}={options[name]}" for name in DOTTED if options[name] is not None]

    stops = budget_run("--budget=40s", *words, callbacks=[CtrlC(half)], **stopped)
    assert stops.status == 130
    monkeypatch.setattr(planner, "Trial", None)  # there must be none
    monkeypatch.setattr(budget, "measure_text", None)
    if how == "budget":
        done = budget_run("--budget=40s", ckpt_path="last", **stopped)
    else:
        config = tmp_path / "two" / "version_0" / "config.yaml"
        done = train(defaults={"config": config, "ckpt_path": "last"})
    assert done.status == 0
    assert "differ" not in done.out
    assert same(run, tmp_path / "two" / "version_0")
    assert done.steps == whole.steps[-len(done.steps) :]
    assert options_of(tmp_path / "two" / "version_0")["budget"] is None


def test_a_requeued_job_keeps_its_options_without_a_trial(budget_run, tmp_path, monkeypatch):
    """SLURM starts it with the same command line, which does not name the checkpoint."""
    task = {"NTASKS": "1", "NTASKS_PER_NODE": "1", "NNODES": "1", "JOB_NAME": "train"}
    task |= {"PROCID": "0", "LOCALID": "0", "NODEID": "0", "NODELIST": "127.0.0.1", "JOB_ID": "7"}
    for name, value in task.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    first = budget_run("--budget=40s", callbacks=[CtrlC(4)])
    assert first.status == 130
    run = tmp_path / "logs" / "version_0"
    before = options_of(run)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    monkeypatch.setattr(planner, "Trial", None)
    done = budget_run("--budget=40s")
    assert (done.status, done.err) == (0, "")
    assert done.out.startswith("SLURM requeued this job: resuming ")
    assert options_of(run) == before
    assert f"(step {before['trainer.max_steps']})" in done.out
    assert len(list((tmp_path / "logs").glob("version_*"))) == 1


def test_a_checkpoint_decides_nothing_but_what_a_budget_chooses(budget_run, tmp_path):
    """A stranger's may name classes to run."""
    budget_run("--budget=40s")
    path = tmp_path / "logs" / "version_0" / "checkpoints" / "last.ckpt"
    contents = torch.load(path, weights_only=True)
    contents["options"]["trainer"]["callbacks"] = [{"class_path": "os.system"}]
    contents["options"]["data"]["tokenizer"] = "/a/folder"
    contents["options"]["model"]["d_model"] = {"class_path": "os.system"}
    contents["options"]["data"]["path"] = "/other.txt"
    torch.save(contents, path)
    argv = command_line(SMALL | {"ckpt_path": path, "budget": "40s"})
    options = TrainOptions(argv)
    assert options.config.trainer.callbacks is None
    assert options.config.data.tokenizer == "bytes"
    assert options.config.model.d_model == 16
    assert options.config.data.path != "/other.txt"
    assert options.config.trainer.max_steps == contents["options"]["trainer"]["max_steps"]


def test_a_plan_shows_the_choice_and_then_the_run(places, capfd, monkeypatch, tmp_path):
    monkeypatch.setattr("sys.argv", ["plan.py"])
    monkeypatch.setattr("lit_gpt.planning.dry_run.WARM_UP", 0.02)
    monkeypatch.setattr("lit_gpt.planning.dry_run.MEASURED", 0.1)
    argv = [*command_line(places | QUIET | SMALL), "--budget=40s", "--json"]
    assert run_command(lambda: plan.main(argv), plan.option_name) == 0
    out, err = capfd.readouterr()
    assert err == ""
    numbers = json.loads(out.splitlines()[-1])
    assert "Budget: 40 s, of which" in out
    assert out.index("Expected: ") < out.index("Text length: ") < out.index("Time: about ")
    low, high = numbers["bits_per_byte_range"]
    assert low < numbers["bits_per_byte"] < high
    assert f"({low:.2f} to {high:.2f})" in out
    assert numbers["options"]["max_steps"] > 0
    (same,) = (line for line in out.splitlines() if line.startswith("The same without --budget:"))
    assert "--json" not in same  # which is the plan's
    lines = out.splitlines()
    assert lines[0] == "Choosing options for 40 s on this machine ..."
    assert numbers["reasons"] == lines[1 : 1 + len(numbers["reasons"])]
    assert not (tmp_path / "logs").exists()


REFUSED = {
    "--trainer.max_epochs=2": "max_epochs",
    "--trainer.min_epochs=2": "min_epochs",
    "--trainer.min_steps=1000": "min_steps",
    "--trainer.max_time=00:00:01:00": "max_time",
    "--trainer.fast_dev_run=true": "fast_dev_run",
    "--trainer.limit_train_batches=3": "limit_train_batches",
    "--trainer.overfit_batches=2": "overfit_batches",
    "--trainer.check_val_every_n_epoch=1": "check_val_every_n_epoch",
    "--trainer.num_nodes=2": "num_nodes",
    "--trainer.devices=2": "one device",
    "--trainer.max_steps=-1": "the run has to end",
    "--model.horizons=[[0,500],[300,480]]": "horizons: is a plan already, and --budget makes one",
    "--data.val_path=none.txt": "--data.val_path 'none.txt': no such file",
    "--find_lr": "the learning rate",
    "--model.init_from=some.ckpt": "init_from",
    "--trainer.accelerator=tpu": "must be one of",
}


@pytest.mark.parametrize("option", REFUSED)
def test_what_makes_no_sense_with_a_budget_is_one_line(option, budget_run):
    done = budget_run("--budget=40s", option)
    assert done.status == 2
    (line,) = done.err.splitlines()
    assert line.startswith("error: --")
    assert REFUSED[option] in line


def test_a_budget_without_a_unit_in_a_file_says_what_to_write(budget_run, tmp_path):
    """To YAML it is a number."""
    file = tmp_path / "given.yaml"
    file.write_text("budget: 600\n")
    done = budget_run(config=file)
    assert done.status == 2
    problem = "is not a duration with a unit; write 600s or 600m"
    assert done.err == f"error: --budget '600': {problem}\n"


@pytest.mark.parametrize("value", ["600", "fast", "20s"])
def test_a_wrong_budget_is_one_line(value, budget_run):
    done = budget_run(f"--budget={value}")
    assert done.status == 2
    assert done.err.startswith(f"error: --budget {value!r}: ")
    assert len(done.err.splitlines()) == 1


def test_a_checkpoint_without_options_says_what_to_do(budget_run):
    old = Path(__file__).parents[1] / "data" / "0.1.0"
    (path,) = sorted(old.rglob("last.ckpt"))[:1]
    done = budget_run("--budget=40s", ckpt_path=path)
    assert done.status == 2
    assert "which has no options; leave it out" in done.err


def test_a_sweep_takes_no_budget(tmp_path):
    file = tmp_path / "sweep.yaml"
    file.write_text("options: {model.dropout: [0.0, 0.1]}\nfixed: {budget: 10m}\n")
    with pytest.raises(UserError, match="can't be given to a sweep"):
        read_sweep(str(file), None, None, [])
