"""Odd options and combinations of them, on every command: done, or refused in one line.

What runs is real, in processes of their own on a terminal. A few of each in the main suite, 600 in
all with `pytest -m fuzz`.
"""

from __future__ import annotations

import re
import signal
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from lit_gpt.__main__ import COMMANDS
from tests.conftest import SMALL, command_line, write_text
from tests.fuzz import child
from tests.fuzz.examples import examples, numbers
from tests.kill_test.recorder import compare_checkpoints

LIMITS = [0, 1, 3, 7, 0.1, 0.5, 1.0, 1.5, -1]
FLAGS = ["true", "false", "null", "warn"]
CALLBACKS = [
    "null",
    "Timer",
    "{class_path: Timer, init_args: {duration: 00:00:00:01}}",
    "EarlyStopping",
    "{class_path: EarlyStopping, init_args: {monitor: val/loss, patience: 1}}",
    "{class_path: EarlyStopping, init_args: {monitor: nothing}}",
    "{class_path: GradientAccumulationScheduler, init_args: {scheduling: {0: 2}}}",
    "[LearningRateMonitor, RichModelSummary]",
    "ModelCheckpoint",
    "{class_path: ModelCheckpoint, init_args: {every_n_train_steps: 1, save_top_k: -1}}",
    "RichProgressBar",
    "DeviceStatsMonitor",
    "{class_path: StochasticWeightAveraging, init_args: {swa_lrs: 0.01}}",
    "EMAWeightAveraging",
    "BatchSizeFinder",
    "LearningRateFinder",
    "OnExceptionCheckpoint",
    "Nothing",
]
# Values to try, fit or unfit. Left out: what waits for other machines, downloads, or takes minutes.
VALUES: dict[str, list[Any]] = {
    "trainer.accelerator": ["auto", "cpu", "gpu", "cuda", "mps", "tpu", "x", "null"],
    "trainer.strategy": ["auto", "ddp", "fsdp", "dp", "deepspeed", "single_device", "x"],
    "trainer.devices": [1, 0, -1, "auto", "0", "[0]", "[]", "x", 1.5],
    "trainer.num_nodes": [1, 0, -1],
    "trainer.precision": ["32-true", 32, "64-true", "bf16-mixed", "bf16-true", "16-true", "x"],
    "trainer.logger": [*FLAGS, "CSVLogger", "[CSVLogger, TensorBoardLogger]", "Nothing"],
    "trainer.callbacks": CALLBACKS,
    "trainer.fast_dev_run": [*FLAGS, 0, 1, 3, -1],
    "trainer.max_epochs": [0, 1, 2, -1, 1000],
    "trainer.min_epochs": [0, 1, 3, -1],
    "trainer.max_steps": [0, 1, 3, 7, -2],
    "trainer.min_steps": [0, 3, 6, 9, -1],
    "trainer.max_time": ["00:00:00:01", "00:00:00:00", 1, "{seconds: 1}", "x"],
    "trainer.limit_train_batches": LIMITS,
    "trainer.limit_val_batches": LIMITS,
    "trainer.limit_test_batches": LIMITS,
    "trainer.limit_predict_batches": LIMITS,
    "trainer.overfit_batches": [0, 1, 2, 0.01, 0.5, 1.0, -1, 2.5],
    "trainer.val_check_interval": [1, 2, 5, 100, 0.5, 1.0, 0, -1, "00:00:00:01", "x"],
    "trainer.check_val_every_n_epoch": [1, 2, 0, -1, "null"],
    "trainer.num_sanity_val_steps": [0, 2, -1],
    "trainer.log_every_n_steps": [0, 1, 3, 50, -1],
    "trainer.accumulate_grad_batches": [1, 2, 3, 0, -1],
    "trainer.gradient_clip_val": [0, 0.1, 1, -1, "nan", "x"],
    "trainer.gradient_clip_algorithm": ["norm", "value", "x"],
    "trainer.profiler": ["simple", "advanced", "x"],
    "trainer.reload_dataloaders_every_n_epochs": [0, 1, -1],
    "trainer.model_registry": ["x"],
    "trainer.plugins": ["null", "x", "[]"],
    "model.learning_rate": [0, 1e-3, 1, 1e20, -1, "nan", "inf"],
    "model.optimizer": ["adamw", "muon", "sgd"],
    "model.weight_decay": [0, 0.1, -1, 1e20],
    "model.betas": ["[0.9, 0.99]", "[0, 0]", "[1, 0.9]", "[0.9]", "[-1, 2]"],
    "model.schedule": ["constant", "linear", "cosine", "x"],
    "model.warmup_steps": [0, 3, 100, -1],
    "model.min_learning_rate": [0, 1e-4, 1, -1],
    "model.compile": ["false", "x"],
    "model.skip_bad_steps": [0, 2, -1],
    "model.init_from": ["null", "nowhere", "last"],
    "model.d_model": [16, 15, 1, 0, -1],
    "model.num_blocks": [1, 2, 0, -1],
    "model.num_heads": [1, 2, 3, 0],
    "model.dropout": [0, 0.5, 1, -0.1, 2],
    "model.style": ["classic", "modern", "fast", "x"],
    "model.position": ["sinusoidal", "learned", "rotary", "x"],
    "model.norm": ["layer", "rms"],
    "model.activation": ["relu", "gelu", "gelu_tanh", "swiglu"],
    "model.num_kv_heads": [1, 2, 3, 0],
    "model.head_size": [8, 7, 1, 0],
    "model.hidden_size": [8, 1, 0],
    "model.rotary_base": [10000, 1, 0, -1],
    "model.rotary_fraction": [1, 0.5, 0, -1, 2],
    "model.rope_scaling": ["linear", "llama3", "null", "x"],
    "model.rope_factor": [1, 8, 0.5],
    "model.rope_high_freq_factor": [4, 1, 0],
    "model.rope_original_context": [8, 0, -1],
    "model.norm_eps": [1e-5, 0, 1, -1],
    "model.sliding_window": [5, 1, 0, -1],
    "data.tokenizer": ["bytes", "cl100k_base", "bpe:300", "bpe:1", "x", "chars"],
    "data.encoding": ["utf-8", "gbk", "x"],
    "data.text_field": ["text"],
    "data.train_fraction": [0.5, 0.9, 0.999, 0, 1, 1.5],
    "data.batch_size": [1, 3, 47, 0, -1, 1000],
    "data.context_length": [16, 1, 2, 500, 0, 100_000],
    "data.order": ["random", "shuffled", "x"],
    "ckpt_path": ["last", "nowhere", "null"],
    "seed_everything": [0, 1, "true", "false", -1, 2**32],
    "samples.prompts": ['["the cat"]', "[]", '[""]', "x"],
    "samples.num_tokens": [0, 1, 100, -1],
    "overfit.patience": [0, 1, -1],
    "checkpoints.every_n_steps": [0, 1, 2, -1],
    "checkpoints.keep": [0, 1, -1, -2],
}
OTHERS = [0, 1, -1, 2, 0.5, "true", "false", "null", "x", "nan"]  # of any other option
PLACES = {"data.path", "data.cache", "trainer.default_root_dir", "config"}
EXACT = {  # what a stopped and continued run must not be changed by
    name: VALUES[name]
    for name in VALUES
    if name not in ("trainer.max_steps", "trainer.max_time", "ckpt_path", "trainer.fast_dev_run")
}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> dict[str, Any]:
    """Options of a run on a small text; the folder of its runs is for a test to add."""
    folder = tmp_path_factory.mktemp("fuzz")
    small = SMALL | {"model.num_blocks": 1, "samples.num_tokens": 4}
    return small | {"data.path": write_text(folder / "text.txt"), "data.cache": folder / "cache"}


@pytest.fixture(scope="module")
def names(base) -> list[str]:
    """Of all options of train, but for those of places."""
    listed = yaml.safe_load(child.run("train", "--print_config").out)

    def walk(tree: dict[str, Any], prefix: str = "") -> list[str]:
        found = []
        for key, value in tree.items():
            found += walk(value, f"{prefix}{key}.") if isinstance(value, dict) else [prefix + key]
        return found

    return sorted(set(walk(listed)) - PLACES)


def options_of(names: list[str], values: dict[str, list[Any]], most: int) -> st.SearchStrategy:
    """Up to so many options, each with one of its values."""
    name = st.sampled_from(sorted(names))
    one = name.flatmap(lambda n: st.tuples(st.just(n), st.sampled_from(values.get(n, OTHERS))))
    return st.lists(one, min_size=1, max_size=most, unique_by=lambda pair: pair[0]).map(dict)


@numbers(6, 300)
def test_a_run_is_done_or_refused(number, base, names, tmp_path):
    folders = (tmp_path / str(n) for n in count())

    @examples(number)
    @given(options_of(names, VALUES, 4))
    def check(options):
        places = {"trainer.default_root_dir": next(folders)}
        child.run("train", *command_line(base | places | options)).check()

    check()


def steps(ended: child.Ended) -> list[str]:
    """The lines of its evaluations and of its final loss."""
    return re.findall(r"(?:Step: |Final validation).*", ended.out)


@numbers(3, 150)
def test_a_stopped_run_continues_exactly_or_not_at_all(number, base, names, tmp_path):
    """By Ctrl-C with two steps to go at least, or by SIGKILL after the second evaluation."""
    folders = (tmp_path / str(n) for n in count())
    moments = st.tuples(st.just(signal.SIGINT), st.integers(1, 4))
    moments |= st.tuples(st.just(signal.SIGKILL), st.integers(3, 6))

    @examples(number)
    @given(options_of([*EXACT], EXACT, 3), moments)
    def check(options, moment):
        roots = [next(folders), next(folders)]
        whole, broken = (
            command_line(base | options | {"trainer.default_root_dir": root}) for root in roots
        )
        unbroken = child.run("train", *whole)
        unbroken.check()
        if unbroken.status:
            return
        stopped = child.run("train", *broken, signal_at=moment)
        if stopped.status == 0 or not list(roots[1].rglob("last.ckpt")):
            return  # it had ended before, or it saves nothing
        assert stopped.status in (130, -signal.SIGKILL), stopped
        continued = child.run("train", *broken, "--ckpt_path=last")
        continued.check()
        if continued.status:
            return
        found, expected = steps(continued), steps(unbroken)
        assert found == expected[len(expected) - len(found) :], (stopped, continued)
        last = [sorted(root.rglob("last.ckpt"))[-1] for root in roots]
        assert compare_checkpoints(last[1], last[0]) is None

    check()


COMMAND_VALUES: dict[str, list[Any]] = {
    "max_new_tokens": [0, 1, 5, -1, "x"],
    "num_samples": [0, 1, 3, -1],
    "prompt": ["", "the cat", "猫", "\\n"],
    "prompt_file": ["nowhere", "/dev/null"],
    "temperature": [0, 0.5, 2, -1, "nan", "inf"],
    "ckpt_path": ["last", "best", "nowhere", "null", "."],
    "logs": [".", "nowhere", "/dev/null"],
    "out": ["nowhere/x", "/dev/null/x", "", "."],
    "host": ["127.0.0.1", "x.invalid", ""],
    "port": [0, -1, 70000, "x"],
    "trials": [0, 1, -1, "x"],
    "data_path": ["nowhere", "null"],
    "data.path": ["nowhere", "null", ""],
}
"""Values of options of other commands, by name; any other takes one of OTHERS."""


@pytest.fixture(scope="module")
def finished(base, tmp_path_factory) -> Path:
    """The folder of a run that other commands use."""
    folder = tmp_path_factory.mktemp("finished")
    ended = child.run("train", *command_line(base | {"trainer.default_root_dir": folder}))
    assert ended.status == 0, ended
    return folder / "version_0"


@pytest.mark.parametrize("command", sorted(set(COMMANDS) - {"train"}))
@numbers(2, 30)
def test_a_command_is_done_or_refused(number, command, base, names, finished, tmp_path):
    path = finished / "checkpoints" / "best.ckpt"
    outs = (tmp_path / str(n) for n in count())
    known = sorted(set(re.findall(r"--([\w.]+)", child.run(command, "--help").out)) - PLACES)
    values = COMMAND_VALUES
    if command == "plan":
        known, values = names, VALUES
    (tmp_path / "sweep.yaml").write_text(
        yaml.safe_dump({"options": {"model.dropout": {"low": 0.0, "high": 0.2}}, "trials": 1})
    )

    @examples(number)
    @given(options_of([n for n in known if n != "help"], values, 3))
    def check(options):
        fixed = {
            "generate": {"ckpt_path": path, "max_new_tokens": 4},
            "evaluate": {"ckpt_path": path, "data.path": base["data.path"]},
            "export": {"ckpt_path": path, "out": next(outs)},
            "serve": {"ckpt_path": path, "port": 0},
            "report": {"out": next(outs)},
            "consolidate": {},
            "prepare": {"data.path": base["data.path"], "out": next(outs)},
            "plan": base | {"trainer.default_root_dir": next(outs)},
            "sweep": {"config": tmp_path / "sweep.yaml", "study": next(outs)},
        }[command]
        argv = [f"{finished}"] if command in ("report", "consolidate") else []
        if command == "sweep":
            argv += command_line(base)
        argv += command_line(fixed | options)
        child.run(command, *argv, ends=5 if command == "serve" else None).check()

    check()
