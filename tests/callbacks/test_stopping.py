"""How a run is stopped: real processes, real signals, and what is left behind."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import time
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch

from lit_gpt.checkpoint import read_checkpoint

SIGNALS = pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["SIGINT", "SIGTERM"]
)
ENDLESS = {"trainer.max_steps": 100_000, "trainer.val_check_interval": 20}
SAVING = {  # nearly all of the time
    **{"trainer.max_steps": 100_000, "trainer.val_check_interval": 1, "samples.num_tokens": 0},
    **{"model.d_model": 256, "model.num_blocks": 4},
}


def step_of(tmp_path: Path) -> int:
    """Of a last.ckpt that is whole; nothing half-written lies beside it."""
    folder = tmp_path / "logs" / "version_0" / "checkpoints"
    assert [path.name for path in folder.iterdir() if path.suffix != ".ckpt"] == []
    return read_checkpoint(folder / "last.ckpt")["global_step"]


def final_line(out: str) -> str:
    return next(line for line in out.splitlines() if line.startswith("Final validation loss"))


@SIGNALS
def test_a_signal_ends_the_step_saves_and_says_how_to_go_on(start, tmp_path, number, status):
    running = start(**ENDLESS)
    running.until("Step: 40,")
    running.send(number)
    code, out, err = running.end()
    assert code == status
    step = step_of(tmp_path)
    assert step >= 40
    assert f"Stopped by {signal.Signals(number).name} after step {step}" in out
    assert any(line.startswith("Continue:") for line in out)
    for beginning in ("Final validation loss", "For comparison", "Copied word for word"):
        assert not any(line.startswith(beginning) for line in out)
    assert err == ""


def test_a_second_ctrl_c_while_saving_leaves_the_earlier_file_whole(start, tmp_path):
    running = start(**SAVING)
    running.until("Step: 2,")  # said before it is saved
    running.send(signal.SIGINT)
    time.sleep(0.005)  # signals that come together are one
    running.send(signal.SIGINT)
    code, _, err = running.end()
    assert (code, err) == (130, "")
    assert step_of(tmp_path) >= 1


@pytest.mark.slow
@pytest.mark.parametrize("delay", [i / 15 for i in range(8)])
@SIGNALS
def test_a_second_signal_at_any_moment(start, tmp_path, number, status, delay):
    running = start(**SAVING)
    running.until("Step: 3,")
    time.sleep(delay)
    running.send(number)
    time.sleep(delay / 40)
    running.send(number)
    code, _, err = running.end()
    assert (code, err) == (status, "")
    assert step_of(tmp_path) >= 2


@pytest.mark.slow
def test_ctrl_c_during_the_evaluation_at_step_0(start, tmp_path, text_file):
    text_file.write_text(text_file.read_text(encoding="utf-8") * 20, encoding="utf-8")  # seconds
    running = start(**ENDLESS, **{"trainer.limit_val_batches": 1.0, "data.batch_size": 1})
    running.until("Parameters:")
    time.sleep(0.3)
    running.send(signal.SIGINT)
    code, out, err = running.end()
    assert (code, err) == (130, "")
    assert "Stopped by SIGINT after step 1" in out
    assert step_of(tmp_path) == 1


def test_ctrl_c_during_the_final_evaluation(start, tmp_path, text_file):
    text_file.write_text(text_file.read_text(encoding="utf-8") * 20, encoding="utf-8")
    options = {"data.train_fraction": 0.5, "data.batch_size": 1, "model.num_blocks": 16}
    running = start(**options, **{"samples.num_tokens": 0})
    running.until("Step: 6,")
    running.send(signal.SIGINT)
    code, out, err = running.end()
    assert (code, err) == (130, "")
    assert "Stopped by SIGINT after step 6" in out
    assert not any(line.startswith("Final validation loss") for line in out)
    assert step_of(tmp_path) == 6


def test_sigterm_while_the_text_is_encoded_leaves_no_file(start, tmp_path):
    text = tmp_path / "large.txt"
    with text.open("w") as file:
        for i in range(60):
            file.write(
                "".join(f"{n * 7919 % 1000003} and " for n in range(60_000 * i, 60_000 * (i + 1)))
            )
    cache = tmp_path / "cache"
    running = start(**{"data.path": text})
    while not (cache.exists() and any(cache.rglob("*.bin"))):
        assert running.process.poll() is None
        time.sleep(0.01)
    running.send(signal.SIGTERM)
    code, _, err = running.end()
    assert (code, err) == (143, "")
    assert list(cache.rglob("*.bin")) == []


def test_max_time_stops_between_steps_and_its_command_goes_on(train, tmp_path):
    options = {"trainer.accumulate_grad_batches": 3, "model.dropout": 0.2}
    whole = train(**options, **{"trainer.default_root_dir": tmp_path / "whole"})
    result = train(**options, **{"trainer.max_time": "00:00:00:00"})  # each run takes one step
    run = tmp_path / "logs" / "version_0"
    config = (run / "config.yaml").read_text(encoding="utf-8")
    assert re.search(r"^  max_time: 00:00:00:00$", config, re.MULTILINE)
    steps, lines = 1, result.steps
    while f"Stopped by --trainer.max_time after step {steps}\n" in result.out:
        assert (result.status, result.err) == (0, "")
        assert "Final validation loss" not in result.out
        assert step_of(tmp_path) == steps
        command = re.search(r"^Continue: +python \S+ (.*)$", result.out, re.MULTILINE)[1]
        result = train(*shlex.split(command), defaults={})
        steps, lines = steps + 1, lines + result.steps
    assert (result.status, result.err) == (0, "")
    assert steps == 6
    assert lines == whole.steps
    assert final_line(result.out) == final_line(whole.out)
    others = whole.run.model.gpt.state_dict()
    for name, weight in result.run.model.gpt.state_dict().items():
        assert torch.equal(weight, others[name])


class DuringEvaluation(pl.Callback):
    """Sends SIGINT in the evaluation after step 4; keeps the run's folder as it is then."""

    def __init__(self, folder: Path, kept: Path) -> None:
        self.folder, self.kept = folder, kept

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, i, loader=0) -> None:
        if trainer.global_step == 4 and loader == 0:
            if i == 0:
                signal.raise_signal(signal.SIGINT)
            else:
                shutil.copytree(self.folder, self.kept)


def test_a_signal_during_an_evaluation_saves_before_its_end(train, tmp_path):
    whole = train(**{"trainer.default_root_dir": tmp_path / "whole"})
    sender = DuringEvaluation(tmp_path / "logs", tmp_path / "kept")
    stopped = train(callbacks=[sender])
    assert stopped.status == 130
    assert "Stopped by SIGINT after step 5\n" in stopped.out
    assert stopped.steps == whole.steps[:3]  # 0, 2, 4: step 5 is off the interval
    for logs, steps in (("logs", whole.steps[3:]), ("kept", whole.steps[2:])):
        last = tmp_path / logs / "version_0" / "checkpoints" / "last.ckpt"
        options = {"trainer.default_root_dir": tmp_path / logs}
        again = train(**options, ckpt_path=last)
        assert again.steps == steps
        assert final_line(again.out) == final_line(whole.out)


@pytest.mark.parametrize("value", ["soon", "1:00", "{hours: x}", "{fortnights: 1}"])
def test_a_max_time_that_is_none_is_one_line(train, value):
    result = train(**{"trainer.max_time": value})
    assert result.status == 2
    assert re.fullmatch(r"error: --\S*max_time .*: must be DD:HH:MM:SS .*\n", result.err)


def test_max_time_of_a_finished_run_changes_nothing(train):
    result = train(**{"trainer.max_time": "01:00:00:00"})
    assert result.status == 0
    assert "Stopped" not in result.out
    assert "Final validation loss" in result.out


def test_a_stop_wins_over_min_steps_and_max_time_does_not(train):
    result = train(**{"trainer.max_time": "00:00:00:00", "trainer.min_steps": 4})
    assert "Stopped by --trainer.max_time after step 4\n" in result.out
    assert result.status == 0
    assert train(**{"trainer.max_time": "00:00:00:00"}).out.count("after step 1\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("whom", "number", "times", "status"),
    [
        (os.killpg, signal.SIGINT, 1, 130),
        (os.kill, signal.SIGTERM, 1, 143),
        (os.killpg, signal.SIGINT, 2, 130),
        (os.kill, signal.SIGTERM, 2, 143),
    ],
)
def test_two_processes_stop_together(start, tmp_path, whom, number, times, status):
    running = start("--trainer.strategy=ddp", "--trainer.devices=2", **ENDLESS)
    running.until("Step: 40,")
    for _ in range(times):
        whom(running.process.pid, number)
        time.sleep(0.003)
    code, out, err = running.end()  # stdout is closed by both
    assert code == status
    assert "Traceback" not in err
    assert "Error" not in err
    step = step_of(tmp_path)
    assert step >= 20
    if times == 1:
        assert f"Stopped by {signal.Signals(number).name} after step {step}" in out


@pytest.mark.slow
def test_two_processes_keep_max_time_together(start, tmp_path):
    options = ENDLESS | {"trainer.max_time": "00:00:00:02"}
    code, out, _ = start("--trainer.strategy=ddp", "--trainer.devices=2", **options).end()
    assert code == 0
    assert f"Stopped by --trainer.max_time after step {step_of(tmp_path)}" in out
