"""Targets that count nothing: in the loss, in sums over batches, in steps of unequal batches."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from lit_gpt import output_layer
from lit_gpt.data import EvalBatches, TextDataModule, TrainBatches, read_windows
from lit_gpt.evaluation.whole_text import WholeText, whole_loss
from lit_gpt.model import GPT, GPTConfig
from lit_gpt.module import LossTotals, next_token_loss
from lit_gpt.text.packing import Packs
from tests.chats import write_chats

T = 40


@pytest.fixture
def data(tmp_path) -> TextDataModule:
    path = str(write_chats(tmp_path / "x.jsonl"))
    return TextDataModule(path, "bytes", context_length=T, cache=str(tmp_path / "cache"))


@pytest.fixture
def model(data) -> GPT:
    torch.manual_seed(0)
    config = GPTConfig(vocab_size=data.vocab_size, context_length=T, d_model=16, num_heads=2)
    return GPT(config).eval()


def nats_of(model: GPT, packs: Packs, number: int) -> list[float]:
    """Of each target that counts in a window, computed one by one."""
    ids, is_counted = packs.windows(np.array([number]))
    logits = model(torch.from_numpy(ids[:, :-1]))[0].double().log_softmax(-1)
    places = np.flatnonzero(is_counted[0])
    return [-logits[i - 1, ids[0, i]].item() for i in places]


@pytest.mark.parametrize("limit", [1 << 28, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_loss_is_the_mean_over_the_targets_that_count(dtype, limit, data, model, monkeypatch):
    """At once and in parts."""
    monkeypatch.setattr(output_layer, "MAX_LOGITS", limit)
    packs = data.windows["train"]
    x, y = read_windows(packs, np.arange(4), T)
    assert x.shape == y.shape == (4, T)
    expected = np.mean([nats for i in range(4) for nats in nats_of(model, packs, i)])
    model = model.to(dtype).requires_grad_(True)
    loss = next_token_loss(model, x, y)
    tolerance = {"rel": 2e-2} if dtype == torch.bfloat16 else {"rel": 1e-5}
    assert loss.item() == pytest.approx(expected, **tolerance)
    # Nothing of what does not count has a gradient: the same with other ids there.
    (gradient,) = torch.autograd.grad(loss, model.head.weight)
    logits = model(x).flatten(0, 1)
    keep = y.flatten() >= 0
    again = F.cross_entropy(logits[keep].float(), y.flatten()[keep])
    (other,) = torch.autograd.grad(again, model.head.weight)
    assert torch.allclose(gradient, other, atol=2e-2 if dtype == torch.bfloat16 else 1e-6)


def test_targets_are_answers_and_their_end_shifted_once(data):
    packs = data.windows["train"]
    last = len(packs) - 1  # the first one is truncated
    _, y = read_windows(packs, np.array([last]), T)
    text = data.tokenizer.decode_bytes(y[y >= 0].tolist()).decode()
    ids, is_counted = packs.windows(np.array([last]))
    assert y[0][is_counted[0, 1:]].tolist() == ids[0, 1:][is_counted[0, 1:]].tolist()
    assert (y[0] >= 0).sum() == packs.counts[last] == is_counted.sum()
    assert "User" not in text
    assert "1" in text
    assert y[0][(y[0] >= 0).nonzero()[-1]].item() == data.tokenizer.end_of_text


def test_a_single_window_keeps_its_ids(data):
    """Its x and y are parts of the same memory."""
    packs = data.windows["train"]
    both, y_of_both = read_windows(packs, np.array([0, 1]), T)
    for number in (0, 1):
        x, y = read_windows(packs, np.array([number]), T)
        assert x[0].tolist() == both[number].tolist()
        assert y[0].tolist() == y_of_both[number].tolist()
        assert x.min() >= 0


def test_sums_count_nothing_else():
    totals = LossTotals()
    totals.start(torch.device("cpu"))
    lengths = torch.tensor([1, 2, 3])
    totals.update(torch.tensor(2.0), torch.tensor([[0, -100, 2]]), lengths)
    totals.update(torch.tensor(5.0), torch.tensor([[-100, 1, -100]]), lengths)
    totals.update(torch.tensor(9.0), torch.zeros(0, 3, dtype=torch.int64), lengths)
    loss, bits_per_byte, number = totals.compute()
    assert (loss.item(), number.item()) == (3.0, 3)
    assert bits_per_byte.item() == pytest.approx(9 / math.log(2) / 6)


def test_the_whole_split_is_predicted_once(data, model):
    packs = data.windows["val"]
    nats = [nats for i in range(len(packs)) for nats in nats_of(model, packs, i)]
    lengths = torch.from_numpy(data.tokenizer.token_lengths())
    for world_size in (1, 2):
        sizes = (4, T, None)
        whole = [WholeText(packs, *sizes, rank, world_size) for rank in range(world_size)]
        batches = [batch for of_rank in whole for batch in of_rank]
        assert len({len(w) for w in whole}) == 1
        result = whole_loss(model, batches, lengths, whole[0].num_targets)
        assert result.loss == pytest.approx(np.mean(nats), rel=1e-6)
        assert result.num_tokens == result.of_tokens == len(nats) == packs.num_counted
        _, y = read_windows(packs, np.arange(len(packs)), T)
        num_bytes = (y >= 0).sum() - (y == data.tokenizer.end_of_text).sum()  # which has none
        expected = sum(nats) / math.log(2) / num_bytes.item()
        assert result.bits_per_byte == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("most", [0, 1, 20, 60, 10_000])
def test_a_limit_takes_whole_windows(most, data):
    packs = data.windows["train"]
    whole = WholeText(packs, 4, T, most)
    counted = packs.counts[whole.starts].sum()
    assert len(set(whole.starts)) == len(whole.starts)
    assert counted <= most or len(whole.starts) == 1
    assert (len(whole.starts) == 0) == (most == 0)
    if most >= 20:
        assert counted > most / 2 or len(whole.starts) == len(packs)


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("parts", [1, 3])
def test_a_step_of_unequal_batches_has_the_mean_over_all_its_targets(
    world_size, parts, data, model
):
    """As one batch of all windows has it, whatever devices and parts it is divided into."""
    packs, order = data.windows["train"], data.order
    weights = []
    for step in range(3):
        first = step * world_size * parts * 2
        starts = order.starts(first, world_size * parts * 2)
        expected = next_token_loss(model, *read_windows(packs, starts, T))
        seen = []
        losses = []
        for rank in range(world_size):
            batches = TrainBatches(packs, order, 2, T, rank, world_size, step_batches=parts)
            resumed = TrainBatches(packs, order, 2, T, rank, world_size, first, None, parts)
            for i in range(parts):
                x, y, weight = batches[step * parts + i]
                assert all(map(torch.equal, resumed[i], (x, y, weight)))
                seen += batches.starts(step * parts + i).tolist()
                assert weight.dtype == torch.int64
                weights.append((weight[0] / weight[1]).item())
                losses.append(next_token_loss(model, x, y) * weights[-1])
        assert sorted(seen) == sorted(starts)
        # Lightning divides by the parts, and takes the mean over the devices.
        mean = sum(losses) / parts / world_size
        assert mean.item() == pytest.approx(expected.item(), rel=1e-5)
    assert (min(weights) < 0.9) == (world_size * parts > 1)


def test_evaluations_are_spread_over_the_windows(data):
    packs = data.windows["train"]
    batches = EvalBatches(packs, 2, T, max_windows=len(packs), limit=3)
    assert batches.starts.tolist() == np.linspace(0, len(packs) - 1, 6).astype(int).tolist()
    for x, y in batches:
        assert x.shape == y.shape == (2, T)
        assert ((y >= 0).sum(1) > 0).all()
    everything = EvalBatches(packs, 2, T, max_windows=len(packs))
    assert sorted(set(everything.starts)) == list(range(len(packs)))


@pytest.mark.parametrize("kind", ["random", "shuffled"])
def test_the_order_is_one_of_windows(kind, tmp_path):
    path = str(write_chats(tmp_path / "x.jsonl"))
    data = TextDataModule(
        path, "bytes", context_length=T, order=kind, cache=str(tmp_path / "cache")
    )
    number = len(data.windows["train"])
    assert data.order.epoch_windows == number
    starts = data.order.starts(0, 40 * number)
    assert set(starts) == set(range(number))
    if kind == "shuffled":
        for epoch in starts.reshape(40, number):
            assert sorted(epoch) == list(range(number))


def test_what_does_not_fit_is_refused(tmp_path):
    from lit_gpt.errors import UserError

    path = str(write_chats(tmp_path / "x.jsonl"))
    data = TextDataModule(path, "bytes", context_length=8, cache=str(tmp_path / "cache"))
    with pytest.raises(UserError, match="no conversation of the training split has an answer with"):
        _ = data.order


def test_tokens_per_second_are_those_to_learn(data):
    from lit_gpt.callbacks.progress import Throughput

    throughput = Throughput()
    trainer = SimpleNamespace(world_size=2)
    logged = SimpleNamespace(is_logged=lambda step: False)
    trainer.global_step = 1
    from unittest.mock import patch

    with patch("lit_gpt.callbacks.progress.LitGPT", SimpleNamespace):
        x, y = read_windows(data.windows["train"], np.array([0, 1]), T)
        throughput.on_train_batch_end(trainer, logged, None, (x, y, torch.ones(())), 0)
        assert throughput.tokens == 2 * data.windows["train"].counts[:2].sum()
        throughput.on_train_batch_end(trainer, logged, None, (x, x), 0)
    assert throughput.tokens == 2 * (data.windows["train"].counts[:2].sum() + x.numel())
