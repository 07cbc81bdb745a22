"""The promise of several devices: N processes have one process's numbers, and resume as one run."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch

from lit_gpt.checkpoint import Checkpoint
from lit_gpt.data import TextDataModule
from lit_gpt.module import LitGPT, LossTotals
from tests.conftest import ROOT
from tests.training.window_recorder import windows_of

SEED = 1337
OPTIONS = {  # 37 validation windows, which nothing divides; 8 windows a step
    "data.order": "shuffled",
    "data.train_fraction": 0.7,
    "model.dropout": 0,
    "model.learning_rate": 0.01,
    "trainer.accumulate_grad_batches": 2,
    "trainer.gradient_clip_val": 0.5,
    "trainer.limit_val_batches": 1.0,
    "trainer.val_check_interval": 3,
    "samples.num_tokens": 0,
}
STEP = 8  # windows


@pytest.fixture
def run_on(train, start, tmp_path, monkeypatch):
    """`run_on(2, "folder", 6)`: six steps of eight windows on two processes; its history."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # finds the recorder

    def run(devices: int, name: str, steps: int, **options: Any) -> dict[str, Any]:
        folder = tmp_path / name
        callback = {
            "class_path": "tests.training.window_recorder.WindowRecorder",
            "init_args": {"folder": str(folder / "windows")},
        }
        given = OPTIONS | {
            "trainer.default_root_dir": folder,
            "trainer.max_steps": steps,
            "trainer.callbacks": json.dumps([callback]),
            "data.batch_size": STEP // 2 // devices,
        }
        if (folder / "version_0").exists():
            given["ckpt_path"] = "last"
        if devices > 1:
            given |= {"trainer.devices": devices, "trainer.strategy": "ddp"}
            status, out, err = start(**given | options).end()
        else:
            result = train(**given | options)
            status, out, err = result.status, result.out.splitlines(), result.err
        assert status == 0, err
        path = folder / "version_0" / "history.json"
        return json.loads(path.read_text(encoding="utf-8")) | {"out": out}

    return run


def assert_same_numbers(found: dict, expected: dict, tolerance: float) -> None:
    """Every point of the losses' curves, and the final loss."""
    for name in ("train/loss", "train/eval_loss", "val/loss", "val/bits_per_byte"):
        steps, values = zip(*expected["curves"][name], strict=True)
        found_steps, found_values = zip(*found["curves"][name], strict=True)
        assert found_steps == steps, name
        assert found_values == pytest.approx(values, abs=tolerance), name
    assert found["final"]["num_tokens"] == expected["final"]["num_tokens"]
    assert found["final"]["loss"] == pytest.approx(expected["final"]["loss"], abs=tolerance)


def expected_windows(places: dict, count: int) -> list[list[int]]:
    """The first windows of the shuffled order, drawn as docs/scaling.md says, by other code."""
    data = TextDataModule(
        str(places["data.path"]), train_fraction=0.7, cache=str(places["data.cache"])
    )
    tokens = data.train_tokens.tolist()
    in_epoch = (len(tokens) - 16) // 16
    found: list[list[int]] = []
    epoch = 0
    while len(found) < count:
        rng = np.random.default_rng((SEED, epoch))
        offset = int(rng.integers(0, 15, endpoint=True))
        starts = [offset + 16 * int(place) for place in rng.permutation(in_epoch)]
        found += [tokens[start : start + 16] for start in starts]
        epoch += 1
    return found[:count]


@pytest.mark.parametrize(
    ("optimizer", "tolerance"), [("adamw", 1e-5), ("muon", 1e-4)], ids=["adamw", "muon"]
)
def test_two_processes_have_one_process_s_numbers_and_continue_as_one(
    run_on, places, tmp_path, optimizer, tolerance
):
    options = {"model.optimizer": optimizer}
    one, two = (run_on(n, str(n), 6, **options) for n in (1, 2))
    assert_same_numbers(two, one, tolerance)
    assert "Devices: 2, cpu, precision 32-true" in "\n".join(two["out"])
    line = "Windows per step: 8 (2 devices x 2 windows x 2 batches), 128 tokens"
    assert line in two["out"]
    assert "Windows per step" not in "\n".join(one["out"])
    one, two = (run_on(1, name, 12, **options) for name in "12")
    assert_same_numbers(two, one, tolerance)
    assert not [text for text in two["out"] if text.startswith("Resumed")]
    last = tmp_path / "2" / "version_0" / "checkpoints" / "last.ckpt"
    assert Checkpoint.read(last).data_state == {"windows_seen": 12 * STEP}
    record = tmp_path / "2" / "windows"
    read = windows_of(record, 0) + windows_of(record, 6)
    assert read == expected_windows(places, 12 * STEP)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("optimizer", "tolerance"), [("adamw", 1e-5), ("muon", 1e-4)], ids=["adamw", "muon"]
)
def test_four_processes_have_one_process_s_numbers(run_on, optimizer, tolerance):
    options = {"model.optimizer": optimizer}
    assert_same_numbers(run_on(4, "4", 12, **options), run_on(1, "1", 12, **options), tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("order", ["random", "shuffled"])
def test_a_run_goes_from_two_processes_to_one_to_four(run_on, places, tmp_path, order):
    """Each window once, in the order of one process."""
    options = {"data.order": order}
    whole = run_on(1, "whole", 12, **options)
    for devices, steps in ((2, 3), (1, 9), (4, 12)):
        moved = run_on(devices, "moved", steps, **options)
    assert_same_numbers(moved, whole, 1e-5)
    record = tmp_path / "moved" / "windows"
    read = [window for step in (0, 3, 9) for window in windows_of(record, step)]
    assert read == windows_of(tmp_path / "whole" / "windows", 0)
    if order == "shuffled":
        assert read == expected_windows(places, 12 * STEP)


def test_another_batch_size_continues_at_the_next_window(run_on, places, tmp_path):
    """Three windows a batch, six a step: no window is lost, none is read twice."""
    run_on(1, "run", 3)
    run_on(1, "run", 7, **{"data.batch_size": 3})
    record = tmp_path / "run" / "windows"
    read = windows_of(record, 0) + windows_of(record, 3)
    assert read == expected_windows(places, 3 * STEP + 4 * 6)


def test_another_accumulation_continues_at_the_next_window_and_with_whole_steps(
    run_on, places, tmp_path
):
    """Twice as many batches a step, or batches twice as large: the same steps and evaluations."""
    for name in ("batches", "sizes"):
        run_on(1, name, 3)
    batches = run_on(1, "batches", 7, **{"trainer.accumulate_grad_batches": 4})
    sizes = run_on(1, "sizes", 7, **{"data.batch_size": STEP})
    assert_same_numbers(batches, sizes, 1e-5)
    assert [step for step, _ in batches["curves"]["val/loss"]] == [0, 3, 6, 7]
    record = tmp_path / "batches" / "windows"
    read = windows_of(record, 0) + windows_of(record, 3)
    assert read == expected_windows(places, 3 * STEP + 4 * 2 * STEP)
    last = tmp_path / "batches" / "version_0" / "checkpoints" / "last.ckpt"
    assert Checkpoint.read(last).data_state == {"windows_seen": len(read)}


def test_a_batch_without_targets_counts_nothing():
    """Not even a NaN, which would stay in the sum."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 11, "context_length": 4, "d_model": 8, "num_blocks": 1, "num_heads": 1}
    model = LitGPT(**sizes)
    x = torch.randint(11, (3, 4))
    y = torch.randint(11, (3, 4))
    model.on_validation_epoch_start()
    model.validation_step((x, y), 0, 1)
    alone = model._totals[1].compute()
    model.validation_step((x[:1], y[:0]), 1, 1)
    assert model._totals[1].compute() == alone
    totals = LossTotals()
    totals.update(torch.tensor(torch.nan), y[:0], None)
    assert totals.compute()[2] == 0


def test_the_place_is_kept_where_steps_were_skipped_or_batches_come_round(run_on, tmp_path):
    """Five batches of four windows come round: on one process as on what was saved by it."""
    options = {"trainer.limit_train_batches": 5}
    whole = run_on(1, "whole", 6, **options)
    run_on(1, "run", 3, **options)
    found = run_on(1, "run", 6, **options)
    assert_same_numbers(found, whole, 1e-7)
    record = tmp_path / "run" / "windows"
    read = windows_of(record, 0) + windows_of(record, 3)
    assert read == windows_of(tmp_path / "whole" / "windows", 0) == (read[:20] * 3)[: 6 * STEP]
