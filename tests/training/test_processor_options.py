"""--threads and precisions on a CPU, in runs."""

from __future__ import annotations

import pytest
import torch
import yaml

from lit_gpt.checkpoint import Checkpoint
from lit_gpt.training import summary

QUIET = {"samples.num_tokens": 0}


@pytest.fixture
def one_thread(four_cores):
    four_cores(1)


def test_a_run_computes_on_so_many_threads_and_keeps_the_number(train, one_thread):
    result = train(**QUIET, threads=2)
    assert result.status == 0, result.err
    assert torch.get_num_threads() == 2
    config = yaml.safe_load((result.run.folder / "config.yaml").read_text(encoding="utf-8"))
    assert config["threads"] == 2
    checkpoint = Checkpoint.read(result.run.folder / "checkpoints" / "last.ckpt")
    assert checkpoint.options["threads"] == 2


def test_without_the_option_pytorch_chooses(train, one_thread):
    result = train(**QUIET)
    assert torch.get_num_threads() == 1
    checkpoint = Checkpoint.read(result.run.folder / "checkpoints" / "last.ckpt")
    assert checkpoint.options["threads"] is None


def test_a_resume_on_another_number_is_said_once(train, one_thread):
    train(**QUIET, threads=2)
    more = {"ckpt_path": "last", "trainer.max_steps": 8}
    same = train(**QUIET, **more, threads=2)
    assert "different options" not in same.out
    more["trainer.max_steps"] = 10
    other = train(**QUIET, **more, threads=1)
    line = "Resumed with different options, so results may differ: threads 2 -> 1\n"
    assert other.out.count(line) == 1


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (0, "--threads 0: must be between 1 and 4, the number of this machine's cores"),
        (5, "--threads 5: must be between 1 and 4"),
        ("many", "--threads 'many': must be a whole number or null"),
        (1.5, "--threads '1.5': must be a whole number or null"),
    ],
)
def test_numbers_that_can_only_be_wrong_are_one_line(train, one_thread, number, message):
    result = train(threads=number)
    assert result.status == 2
    assert result.err.startswith(f"error: {message}")
    assert len(result.err.splitlines()) == 1


@pytest.mark.parametrize(
    ("precision", "slowdown", "expected"),
    [
        ("bf16-mixed", 6.13, "6.1 times as long in bf16-mixed as in 32-true: "),
        ("bf16-true", 2.0, "use --trainer.precision=32-true, if the memory is enough\n"),
        ("bf16-mixed", 1.05, None),
        ("32-true", 6.13, None),
    ],
)
def test_bfloat16_is_advised_against_where_it_is_slower(
    train, monkeypatch, precision, slowdown, expected
):
    asked = []

    def measured(config, precision, batch_size):
        asked.append((config.d_model, precision, batch_size))
        return slowdown

    monkeypatch.setattr(summary, "bfloat16_slowdown", measured)
    result = train(**QUIET, **{"trainer.precision": precision})
    assert result.status == 0, result.err
    if expected:
        assert expected in result.out
    assert result.out.count("On this processor a block takes") == (1 if expected else 0)
    assert asked == ([] if precision == "32-true" else [(16, precision, 2)])
