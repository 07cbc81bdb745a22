"""Runs with Muon: what it computes in is said, shared by all processes and kept."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy

from lit_gpt import module
from lit_gpt.checkpoint import Checkpoint
from lit_gpt.training import summary

MUON = {"model.optimizer": "muon", "model.style": "modern", "samples.num_tokens": 0}


@pytest.fixture
def fastest(monkeypatch):
    """`fastest(torch.bfloat16)`: what a measurement finds."""

    def find(dtype: torch.dtype) -> None:
        for place in (module, summary):
            monkeypatch.setattr(place, "fastest_dtype", lambda device: dtype)

    return find


def saved_type(run) -> str:
    checkpoint = Checkpoint.read(run.last.dirpath + "/last.ckpt")
    return checkpoint.optimizer_state["param_groups"][0]["ns_dtype"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_run_says_what_it_computes_in_and_keeps_it(train, fastest, dtype):
    name = str(dtype).removeprefix("torch.")
    fastest(dtype)
    result = train(**MUON)
    assert f"Device: cpu, precision 32-true, Muon in {name}\n" in result.out
    assert saved_type(result.run) == name
    other = {torch.float32: torch.bfloat16, torch.bfloat16: torch.float32}[dtype]
    fastest(other)  # another machine
    resumed = train(**MUON, **{"ckpt_path": "last", "trainer.max_steps": 8})
    assert resumed.status == 0, resumed.err
    assert "Device: cpu, precision 32-true\n" in resumed.out
    assert saved_type(resumed.run) == name


def test_weights_in_bfloat16_are_said_to_keep_to_it(train, fastest):
    fastest(torch.float32)
    result = train(**MUON, **{"trainer.precision": "bf16-true"})
    assert "precision bf16-true, Muon in bfloat16\n" in result.out
    assert saved_type(result.run) == "bfloat16"


def test_all_processes_take_what_the_first_one_found(train, fastest, monkeypatch):
    fastest(torch.float32)
    asked = []

    def broadcast(self, value, src=0):
        if value is torch.float32:
            asked.append(src)
            return torch.bfloat16  # what another process found
        return value

    monkeypatch.setattr(SingleDeviceStrategy, "broadcast", broadcast)
    assert saved_type(train(**MUON).run) == "bfloat16"
    assert asked == [0]


def test_adamw_is_measured_for_nothing(train, monkeypatch):
    def measured(device):
        raise AssertionError("a second of start-up for nothing")

    for place in (module, summary):
        monkeypatch.setattr(place, "fastest_dtype", measured)
    result = train()
    assert result.status == 0, result.err
    assert "Muon" not in result.out
