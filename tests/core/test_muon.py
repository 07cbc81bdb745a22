"""Muon: torch's own numbers in bfloat16, the right ones in float32, one type for a whole run."""

from __future__ import annotations

import copy
import os
import time

import numpy as np
import pytest
import torch

from lit_gpt import optim
from lit_gpt.optim import Muon, build_optimizer, fastest_dtype, orthogonalize, shortest_times
from tests.core.test_optim import small_model

SHAPES = [(16, 48), (48, 16), (16, 16), (16, 24), (24, 40), (4, 4)]
CPU = torch.device("cpu")


def weights_of(shapes, dtype=torch.float32) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in shapes]


def give_gradients(weights, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for weight in weights:
        weight.grad = torch.randn(weight.shape, generator=generator).to(weight.dtype)


def newton_schulz(matrix: np.ndarray) -> np.ndarray:
    """Jordan's five steps as they are defined, one matrix at a time, in float64."""
    x = matrix.astype(np.float64)
    x = x / max(np.sqrt((x * x).sum()), 1e-7)
    for _ in range(5):
        product = x @ x.T
        x = 3.4445 * x - 4.7750 * product @ x + 2.0315 * product @ product @ x
    return x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_bfloat16_it_steps_as_torchs_own_does(dtype):
    """Two weights of each shape, whatever the type of the weights."""
    ours, theirs = (weights_of(2 * SHAPES, dtype) for _ in range(2))
    options = {"lr": 0.1, "weight_decay": 0.2, "momentum": 0.9}
    our_muon = Muon(ours, torch.bfloat16, **options)
    their_muon = torch.optim.Muon(theirs, adjust_lr_fn="match_rms_adamw", **options)
    for seed in range(4):
        for weights, muon in ((ours, our_muon), (theirs, their_muon)):
            give_gradients(weights, seed)
            muon.step()
    # The largest entry of an update: 0.1 * 0.2 * sqrt(48) = 0.14. A product in bfloat16 may be
    # summed in another order, and so rounded to a neighbour.
    rtol = 0 if dtype is torch.float32 else 2 / 256
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their, atol=4 * 0.14 / 256, rtol=rtol)
        assert our_muon.state[our].keys() == their_muon.state[their].keys() == {"momentum_buffer"}
        torch.testing.assert_close(
            our_muon.state[our]["momentum_buffer"], their_muon.state[their]["momentum_buffer"]
        )


@pytest.mark.parametrize("shape", SHAPES)
def test_in_float32_the_iteration_is_that_of_float64(shape):
    rng = np.random.default_rng(0)
    full = rng.standard_normal((3, *shape))
    low_rank = rng.standard_normal((3, shape[0], 2)) @ rng.standard_normal((3, 2, shape[1]))
    for matrices in (full, low_rank, 1e6 * full, 1e-5 * full):
        found = orthogonalize(torch.from_numpy(matrices).float(), torch.float32).numpy()
        for matrix, result in zip(matrices, found, strict=True):
            np.testing.assert_allclose(result, newton_schulz(matrix), atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_zero_gradient_stays_zero(shape, dtype):
    assert not orthogonalize(torch.zeros(2, *shape), dtype).any()


@pytest.mark.parametrize("shape", [(32, 96), (96, 32), (32, 40)])
def test_large_singular_values_end_near_one(shape):
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonalize(torch.randn(2, *shape), torch.float32))
    assert values.min() > 0.65
    assert values.max() < 1.25


def test_momentum_decay_and_rate_in_numbers():
    """Two steps in float64 by hand: lr 0.1, decay 0.2, momentum 0.9, Nesterov."""
    (weight,) = weights_of([(4, 12)])
    w = weight.detach().numpy().astype(np.float64)
    muon = Muon([weight], torch.float32, lr=0.1, weight_decay=0.2, momentum=0.9)
    momentum = np.zeros_like(w)
    for seed in range(2):
        give_gradients([weight], seed)
        gradient = weight.grad.numpy().astype(np.float64)
        muon.step()
        momentum = 0.9 * momentum + 0.1 * gradient
        direction = 0.9 * momentum + 0.1 * gradient
        w = (1 - 0.1 * 0.2) * w - 0.1 * 0.2 * np.sqrt(12) * newton_schulz(direction)
    np.testing.assert_allclose(weight.detach().numpy(), w, atol=1e-4)


def test_a_weight_without_gradient_stays_as_it_is():
    weights = weights_of([(4, 8), (4, 8)])
    before = [weight.detach().clone() for weight in weights]
    give_gradients(weights, 0)
    weights[0].grad = None
    muon = Muon(weights, torch.float32, lr=0.1, weight_decay=0.2)
    muon.step()
    assert torch.equal(weights[0], before[0])
    assert not torch.equal(weights[1], before[1])
    assert weights[0] not in muon.state


def test_a_closure_is_called_with_gradients_and_its_loss_returned():
    (weight,) = weights_of([(4, 8)])
    muon = Muon([weight], torch.float32, lr=0.1)

    def closure():
        loss = weight.sum()
        loss.backward()
        return loss

    before = weight.detach().clone()
    assert muon.step(closure) == before.sum()
    assert not torch.equal(weight, before)


@pytest.mark.parametrize(("half", "single", "expected"), [(1.0, 1.4, "float32"), (1.0, 1.6, "bf")])
def test_bfloat16_has_to_be_faster_by_half(monkeypatch, half, single, expected):
    calls = []

    def times(*runs, clock):
        assert clock is optim.CPU_CLOCK
        calls.extend(run() for run in runs)
        return [half, single]

    monkeypatch.setattr(optim, "shortest_times", times)
    fastest_dtype.cache_clear()
    try:
        found = [fastest_dtype(CPU), fastest_dtype(CPU)]
    finally:
        fastest_dtype.cache_clear()
    assert found == 2 * [torch.float32 if expected == "float32" else torch.bfloat16]
    assert len(calls) == 2  # once in a process


def test_the_shortest_time_of_each_is_taken_in_turn_and_on_one_thread(monkeypatch):
    """A clock of our own: a takes 3, 2 and 3 seconds, b 5, 4 and 4, and 20 are there."""
    now = [0.0]
    order = []
    durations = {"a": iter([3, 2, 3]), "b": iter([5, 4, 4])}

    def take(name):
        order.append((name, torch.get_num_threads()))
        now[0] += next(durations[name])

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        runs = (lambda: take("a"), lambda: take("b"))
        found = shortest_times(*runs, limit=20, clock=lambda: now[0])
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert found == [2, 4]
    assert order == 3 * [("a", 1), ("b", 1)]


@pytest.mark.skipif(os.name == "nt", reason="its clock of a thread is too coarse")
def test_what_other_processes_take_is_not_counted():
    """Sleeping stands for waiting until another process gives the core back."""
    found = shortest_times(lambda: time.sleep(0.05), lambda: sum(range(200_000)), limit=0.01)
    assert found[0] < found[1]


def step(model, optimizer, seed: int) -> None:
    give_gradients(model.parameters(), seed)
    optimizer.step()


def pair(kind: torch.dtype):
    torch.manual_seed(0)
    model = small_model("modern")
    return model, build_optimizer(model, 1e-2, 0.1, (0.9, 0.95), kind="muon", muon_dtype=kind)


def resume(model, state, dtype):
    """A twin, and an optimizer that would have begun in `dtype`, with a state that was saved."""
    twin, resumed = pair(dtype)
    twin.load_state_dict(model.state_dict())
    resumed.load_state_dict(copy.deepcopy(state))
    return twin, resumed


def assert_go_on_alike(model, optimizer, twin, resumed):
    step(model, optimizer, 2)
    step(twin, resumed, 2)
    for weight, same in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(weight, same)


@pytest.mark.parametrize("saved", [torch.float32, torch.bfloat16])
def test_a_resumed_run_goes_on_in_the_type_that_it_began_with(saved):
    """On a machine where the other one is faster."""
    other = torch.bfloat16 if saved is torch.float32 else torch.float32
    model, optimizer = pair(saved)
    step(model, optimizer, 1)
    twin, resumed = resume(model, optimizer.state_dict(), other)
    assert resumed.param_groups[0]["ns_dtype"] == str(saved)[len("torch.") :]
    assert_go_on_alike(model, optimizer, twin, resumed)


def test_a_state_without_a_type_goes_on_in_bfloat16_as_it_began():
    """Checkpoints of 0.1.0 have none."""
    model, optimizer = pair(torch.bfloat16)
    step(model, optimizer, 1)
    state = copy.deepcopy(optimizer.state_dict())
    del state["param_groups"][0]["ns_dtype"]
    assert_go_on_alike(model, optimizer, *resume(model, state, torch.float32))


def test_a_type_that_no_run_has_is_not_used():
    model, optimizer = pair(torch.float32)
    optimizer.param_groups[0]["ns_dtype"] = "float16"
    with pytest.raises(KeyError, match="float16"):
        step(model, optimizer, 1)


def test_weights_in_bfloat16_keep_to_it():
    model = small_model("modern").to(torch.bfloat16)
    for asked in (None, torch.float32):
        optimizer = build_optimizer(model, 1e-2, 0.1, (0.9, 0.95), kind="muon", muon_dtype=asked)
        assert optimizer.param_groups[0]["ns_dtype"] == "bfloat16"


def test_the_fastest_type_is_the_default(monkeypatch):
    for fastest in (torch.float32, torch.bfloat16):
        monkeypatch.setattr(optim, "fastest_dtype", lambda device, found=fastest: found)
        optimizer = build_optimizer(small_model(), 1e-2, 0.1, (0.9, 0.95), kind="muon")
        assert optimizer.param_groups[0]["ns_dtype"] == str(fastest)[len("torch.") :]
