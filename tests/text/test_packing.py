"""Windows of whole conversations: which goes where, what counts, what is too long."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_gpt.text.packing import Packs, best_fit

START, COUNTED = 1, 2  # as answers.split_flags has them


def make_packs(conversations: list[str], length: int) -> Packs:
    """Conversations like "qqaa": ids 1, 2, ... of which the a's count."""
    text = "".join(conversations)
    flags = np.array([COUNTED if char == "a" else 0 for char in text], np.uint8)
    starts = np.cumsum([0, *map(len, conversations[:-1])])
    flags[starts] |= START
    return Packs(np.arange(1, len(text) + 1, dtype=np.uint16), flags, length, padding=0)


def test_the_best_fit_by_hand():
    """9 alone; 6 and 4; 5 and 5; 3, 3 and 2: into 10, the least room that is enough."""
    assert best_fit(np.array([6, 5, 9, 4, 3, 5, 3, 2]), 10).tolist() == [1, 2, 0, 1, 3, 2, 3, 3]


@settings(deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=200), st.integers(40, 60))
def test_no_window_overflows_and_few_are_needed(lengths, room):
    lengths = np.array(lengths)
    windows = best_fit(lengths, room)
    used = np.bincount(windows, lengths)
    assert used.max() <= room
    assert used.min() > 0
    # Johnson's bound: 11/9 of the fewest possible, and 4.
    assert len(used) <= 11 / 9 * np.ceil(lengths.sum() / room) * 1.2 + 4


def test_windows_hold_whole_conversations():
    packs = make_packs(["qqa", "qaaa", "qa"], 6)
    assert (len(packs), packs.num_conversations) == (2, 3)
    ids, is_counted = packs.windows(np.array([1, 0]))
    assert ids.tolist() == [[1, 2, 3, 0, 0, 0], [4, 5, 6, 7, 8, 9]]
    assert is_counted.astype(int).tolist() == [[0, 0, 1, 0, 0, 0], [0, 1, 1, 1, 0, 1]]
    assert packs.counts.tolist() == [4, 1]
    assert (packs.num_counted, packs.num_tokens) == (5, 9)


def test_the_first_token_of_a_conversation_never_counts():
    packs = make_packs(["aa", "aa"], 4)
    assert packs.windows(np.array([0]))[1].astype(int).tolist() == [[0, 1, 0, 1]]
    assert packs.num_counted == 2


def test_a_long_conversation_is_truncated_or_skipped():
    packs = make_packs(["qaaaaaa", "qqqqqqa", "qa", "qqqqa", "a"], 5)
    assert (packs.num_truncated, packs.num_skipped) == (1, 2)  # "a" has nothing before it
    ids, is_counted = packs.windows(np.arange(len(packs)))
    assert ids.tolist() == [[1, 2, 3, 4, 5], [17, 18, 19, 20, 21], [15, 16, 0, 0, 0]]
    assert is_counted.sum(1).tolist() == [4, 1, 1] == packs.counts.tolist()


@pytest.mark.parametrize("conversations", [["qqqqqqa"], ["a"]])
def test_nothing_may_be_left(conversations):
    packs = make_packs(conversations, 5)
    assert (len(packs), packs.num_skipped, packs.num_counted) == (0, 1, 0)
