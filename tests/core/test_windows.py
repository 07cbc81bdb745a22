"""The order of the training windows: a pure function of (order, seed, number)."""

from __future__ import annotations

import numpy as np
import pytest

from lit_gpt.windows import ORDERS, RandomOrder, RandomOrderByRank, Rounds, ShuffledOrder

NUMBERS = [(0, 1), (0, 5), (3, 9), (1020, 8), (1024, 4), (2040, 3000), (5_000_000_000, 3)]


@pytest.mark.parametrize("name", ORDERS)
def test_windows_are_the_same_however_many_are_asked_for_at_once(name):
    whole = ORDERS[name](500, 7, seed=3)
    for first, count in NUMBERS:
        together = whole.starts(first, count)
        assert together.shape == (count,)
        single = ORDERS[name](500, 7, seed=3)
        assert [int(single.starts(first + i, 1)[0]) for i in range(min(count, 20))] == (
            together[:20].tolist()
        )
        assert together.min() >= 0
        assert together.max() <= 492  # the last place with 8 tokens


def test_shuffled_windows_are_those_of_earlier_versions():
    """Window w is number w mod 9 of epoch w // 9, drawn by (seed, epoch)."""
    order = ShuffledOrder(101, 10, seed=5)
    assert order.epoch_windows == 9
    for w in range(40):
        rng = np.random.default_rng((5, w // 9))
        offset = rng.integers(0, 9, endpoint=True)
        assert order.starts(w, 1)[0] == offset + 10 * rng.permutation(9)[w % 9]
    assert order.starts(5, 9).tolist() == [46, 6, 86, 56, 61, 71, 41, 21, 51]  # as 0.1.0 did


def test_random_windows_start_anywhere_with_equal_chance():
    """Of 20 places each is drawn 5,000 times in 100,000, give or take 5 standard deviations."""
    starts = RandomOrder(27, 7, seed=0).starts(0, 100_000)
    counts = np.bincount(starts, minlength=20)
    assert len(counts) == 20
    assert abs(counts - 5000).max() < 5 * np.sqrt(5000 * 0.95)
    assert not np.array_equal(starts, RandomOrder(27, 7, seed=1).starts(0, 100_000))


def test_random_windows_of_earlier_versions_were_drawn_for_each_batch_and_rank():
    order = RandomOrderByRank(RandomOrder(101, 10, seed=5), world_size=3)
    assert order.epoch_windows == 9
    for i in range(4):
        for rank in range(3):
            drawn = np.random.default_rng((5, i, rank)).integers(0, 91, 4)
            assert order.starts((3 * i + rank) * 4, 4).tolist() == drawn.tolist()
    two_ranks = RandomOrderByRank(RandomOrder(101, 10, seed=5), world_size=2)
    assert two_ranks.starts(24, 6).tolist() == [72, 21, 64, 38, 6, 53]  # as 0.1.0 did


@pytest.mark.parametrize("name", ORDERS)
def test_windows_that_come_round(name):
    order = ORDERS[name](101, 10, seed=5)
    rounds = Rounds(order, 14)
    first = order.starts(0, 14).tolist()
    assert rounds.epoch_windows == 14
    assert rounds.starts(0, 3).tolist() == first[:3]
    assert rounds.starts(14 * 10**9 + 12, 33).tolist() == (first * 4)[12:45]
