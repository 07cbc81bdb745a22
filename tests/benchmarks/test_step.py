"""benchmarks/run.py step and gpu: the parts of a step, the machine's limit, the loss in parts."""

from __future__ import annotations

import json
import math

import pytest
import torch

from benchmarks import limits
from benchmarks.gpu import compare_layouts, compare_losses, flash_attention, losses, time_bare_steps
from benchmarks.limits import operation_rate, product_rate, shape_rate
from benchmarks.step import BesideTheTrainer, time_steps
from lit_gpt.model import GPT, GPTConfig
from tests.benchmarks.test_benchmarks import here
from tests.conftest import SMALL, command_line

TINY = {"d_model": 8, "num_blocks": 1, "num_heads": 1}


def test_shares_add_up_and_the_utilization_is_of_the_measured_limit(tmp_path, text_file, capsys):
    argv = ("--path", text_file, "--repeats", 1, "--out", tmp_path)
    assert here("step", "--sizes", "classic", *argv) == 0
    out = capsys.readouterr().out
    content = json.loads((tmp_path / "step.json").read_text())
    (row,) = content["rows"]
    assert row["name"] == "classic"
    assert list(row["shares"]) == ["data", "forward", "backward", "optimizer", "Lightning"]
    assert sum(row["shares"].values()) == pytest.approx(1)
    assert min(list(row["shares"].values())[:4]) > 0
    assert row["tokens"] == 2 * 128
    assert row["gflops"] == pytest.approx(row["gflop"] / row["seconds"])
    limit = float(content["note"].split("float32 ")[1].split(". A step")[0].replace(",", ""))
    assert row["utilization"] == pytest.approx(row["gflops"] / limit, rel=0.01)
    assert f"{row['utilization']:.1%}" in out
    # 6 N for each token and 12 L C T for attention; blocks of 12 C^2 and their biases and norms.
    blocks = 6 * (12 * 80**2 + 13 * 80) + 2 * 80
    least = 256 * (6 * blocks + 12 * 6 * 80 * 128) / 1e9
    head = 256 * 6 * 80 / 1e9  # of each token of the vocabulary
    assert 256 <= (row["gflop"] - least) / head <= 400


def test_a_bare_step_computes_what_the_trainer_does(train):
    """Clipped gradients, the optimizer and its groups: the weights are the same after six steps."""
    beside = BesideTheTrainer(group=2)
    options = {
        "model.style": "modern",
        "model.optimizer": "muon",
        "model.dropout": 0.0,
        "trainer.gradient_clip_val": 0.1,
    }
    result = train(**options, callbacks=[beside])
    assert len(beside.times.inside) == len(beside.times.parts["data"]) == 3
    twin = beside.twin.state_dict()
    for name, weight in result.run.model.state_dict().items():
        torch.testing.assert_close(twin[name], weight, msg=name)


def test_the_vocabulary_can_be_larger_than_the_texts(text_file):
    small = SMALL | {"data.path": text_file}
    argv = [a for a in command_line(small) if "max_steps" not in a and "val_check" not in a]
    times, model = time_steps(argv, group=1, groups=2, vocab_size=5000)
    assert model.gpt.config.vocab_size == 5000
    assert model.gpt.config.d_model == SMALL["model.d_model"]
    assert len(times.inside) == 3


def test_rates_are_of_all_products_of_the_linear_layers(monkeypatch):
    """Three products a layer: if each took a second, the rate would be the operations of one."""
    monkeypatch.setattr(limits, "operation_rate", lambda flop, operation, device: flop)
    model = GPT(GPTConfig(20, 4, position="learned", **TINY))
    sizes = [8 * 24, 8 * 8, 8 * 32, 32 * 8, 8 * 20]  # qkv, out, up, out, head
    assert shape_rate(model, 10, torch.float32) == pytest.approx(sum(2 * 10 * n for n in sizes) / 5)


def test_the_fastest_call_is_the_limit():
    calls = []
    assert operation_rate(1e9, lambda: calls.append(1)) > 1e9
    assert len(calls) > 3
    assert product_rate(torch.float32) > 1e8


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ["--sizes", "classic,huge"],
            "--sizes 'classic,huge': must be some of classic,modern,124M",
        ),
        (["--threads", "0"], "--threads 0: must be at least 1"),
        (["--path", "nowhere.txt"], "--path 'nowhere.txt': no text file"),
        (["--accelerator", "gpus"], "gpus"),
    ],
)
def test_wrong_input_is_one_line(args, message, capsys):
    assert here("step", *args) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert len(error.splitlines()) == 1


def test_both_losses_are_the_same_and_have_the_same_gradient():
    """At random, ln of the vocabulary or a little more."""
    found = {name: loss().item() for name, loss in losses(64, 16, 100, "cpu").items()}
    assert found["in parts"] == pytest.approx(found["all logits at once"], rel=1e-3)
    assert math.log(100) < found["in parts"] < math.log(100) + 0.5
    rows = compare_losses(64, 1, "cpu", d_model=16, vocab_size=100)
    assert [(row.name, row.peak_mb) for row in rows] == [(name, None) for name in found]
    assert rows[0].ratio == 1
    assert rows[1].ratio == pytest.approx(rows[0].value / rows[1].value)


def test_the_gpus_parts_run_on_a_cpu():
    assert flash_attention("cpu")
    config = GPTConfig(50, 16, position="learned", **TINY)
    seconds, flops, memory = time_bare_steps(config, False, 2, 2, "cpu")
    assert seconds > 0
    weights = sum(p.numel() for p in GPT(config).parameters())
    assert flops == 6 * (weights - 50 * 8) + 12 * 8 * 16
    assert memory is None


@pytest.mark.slow
def test_layouts_are_compared_eager_and_compiled():
    config = GPTConfig(50, 16, position="learned", **TINY)
    rows = compare_layouts({"tiny": config}, 2, 1, 1e12, "cpu")
    assert [row.name.split(" (")[0] for row in rows] == ["tiny, eager", "tiny, compiled"]
    flops = time_bare_steps(config, False, 2, 1, "cpu")[1]
    for row in rows:
        assert row.share == pytest.approx(row.value * flops / 1e12)
        assert row.ratio == pytest.approx(row.value / rows[0].value)
