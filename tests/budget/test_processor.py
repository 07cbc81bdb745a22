"""What the processor does faster: threads by a clock of our own, precisions by what is computed."""

from __future__ import annotations

import os

import pytest
import torch

from lit_gpt.budget import processor
from lit_gpt.budget.processor import bfloat16_slowdown, set_threads, thread_times
from lit_gpt.errors import UserError
from lit_gpt.model import GPTConfig


@pytest.fixture
def two_threads(four_cores):
    four_cores(2)


@pytest.fixture
def clock(monkeypatch):
    """`clock({1: [3.0], 2: [5.0]})`: a step that takes such seconds on so many threads."""
    now = [0.0]
    monkeypatch.setattr(processor.time, "perf_counter", lambda: now[0])

    def make(seconds: dict[int, list[float]]):
        taken = dict.fromkeys(seconds, 0)

        def step() -> None:
            number = torch.get_num_threads()
            found = seconds[number]
            now[0] += found[min(taken[number], len(found) - 1)]
            taken[number] += 1

        return step, taken

    return make


def test_the_first_step_of_each_is_left_out_and_the_median_counts(two_threads, clock):
    step, taken = clock({1: [90.0, 1.0, 5.0, 2.0], 2: [80.0, 9.0, 4.0, 3.0]})
    assert thread_times(step, limit=1) == {2: 4.0, 1: 2.0}
    assert taken == {1: 4, 2: 4}
    assert torch.get_num_threads() == 2


def test_it_measures_as_long_as_it_may(two_threads, clock):
    step, taken = clock({1: [0.25], 2: [0.25]})
    thread_times(step, limit=5)
    assert taken == {1: 10, 2: 10}


def test_one_core_has_nothing_to_choose(two_threads, clock):
    torch.set_num_threads(1)
    step, taken = clock({1: [1.0]})
    assert thread_times(step) == {1: 1.0}
    assert taken == {1: 4}


def test_a_step_that_fails_leaves_the_number_of_threads(two_threads):
    def step() -> None:
        if torch.get_num_threads() == 1:
            raise MemoryError

    with pytest.raises(MemoryError):
        thread_times(step)
    assert torch.get_num_threads() == 2


def test_threads_are_set_for_pytorch_and_for_lightning(two_threads):
    set_threads(None)
    assert (torch.get_num_threads(), os.environ["OMP_NUM_THREADS"]) == (2, "2")
    set_threads(1)
    assert (torch.get_num_threads(), os.environ["OMP_NUM_THREADS"]) == (1, "1")
    set_threads(4)
    assert (torch.get_num_threads(), os.environ["OMP_NUM_THREADS"]) == (4, "4")


@pytest.mark.parametrize("number", [0, -1, 5, 10**9])
def test_other_numbers_of_threads_are_refused(two_threads, number):
    with pytest.raises(UserError, match=f"threads {number}: must be between 1 and 4, the number"):
        set_threads(number)
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("style", ["classic", "modern"])
def test_the_precision_that_was_asked_for_is_measured(monkeypatch, precision, style):
    """Which products are computed in which type, and that nothing else is disturbed."""
    found = []

    def shortest_times(*steps):
        for step in steps:
            types = set()
            weights = torch.nn.Linear.forward

            def forward(self, x, types=types, weights=weights):
                y = weights(self, x)
                types.add((x.shape[:2], self.weight.dtype, y.dtype))
                return y

            with monkeypatch.context() as patch:
                patch.setattr(torch.nn.Linear, "forward", forward)
                step()
            found.append(types)
        return [3.0, 2.0]

    monkeypatch.setattr(processor, "shortest_times", shortest_times)
    random = torch.get_rng_state()
    config = GPTConfig(999, 32, d_model=16, num_blocks=3, num_heads=2, style=style)
    assert bfloat16_slowdown(config, precision, batch_size=3) == 1.5
    assert torch.equal(torch.get_rng_state(), random)
    half, single = torch.bfloat16, torch.float32
    weight = single if precision == "bf16-mixed" else half
    assert found == [{((3, 32), weight, half)}, {((3, 32), single, single)}]


@pytest.mark.parametrize(
    ("context", "batch", "shape"), [(32, 9, (4, 32)), (64, 2, (2, 64)), (1024, 8, (1, 128))]
)
def test_no_more_than_128_tokens_are_used(monkeypatch, context, batch, shape):
    seen = []
    forward = processor.GPT.forward

    def watched(self, ids):
        seen.append((tuple(ids.shape), len(self.blocks), self.config.d_model))
        return forward(self, ids)

    monkeypatch.setattr(processor.GPT, "forward", watched)
    config = GPTConfig(99_999, context, d_model=16, num_blocks=3, num_heads=2)
    assert bfloat16_slowdown(config, "bf16-mixed", batch) > 0
    assert set(seen) == {(shape, 1, 16)}
