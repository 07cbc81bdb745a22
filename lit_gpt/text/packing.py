"""Windows of whole conversations: as many in each as fit.

Best-fit decreasing (Johnson 1973): the longest conversation first, each into the window that has
the least room left for it. Which window has which does not depend on any seed.
Shapes: N tokens, C conversations, W windows, B of a batch.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Iterator
from itertools import pairwise

import numpy as np

from lit_gpt.text.answers import is_answer, is_start


def best_fit(lengths: np.ndarray, room: int) -> np.ndarray:
    """Which window each conversation goes into, (C,), for lengths (C,) of at most `room`."""
    windows = np.empty(len(lengths), np.int64)
    with_room: dict[int, list[int]] = defaultdict(list)  # windows by the tokens they have left
    rooms: list[int] = []  # its keys, in order
    num_windows = 0
    for i in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[i])
        at = bisect_left(rooms, length)
        if at == len(rooms):
            window, left = num_windows, room
            num_windows += 1
        else:
            left = rooms[at]
            window = with_room[left].pop()
            if not with_room[left]:
                del rooms[at]
        windows[i] = window
        left -= length
        if not with_room[left]:
            insort(rooms, left)
        with_room[left].append(window)
    return windows


class Packs:
    """Windows that each hold whole conversations, then padding.

    A conversation that is longer than a window is truncated at its end. One of which no token
    counts then is skipped.

    Args:
        tokens: (N,) ids.
        flags: (N,) uint8, see `answers.split_flags`.
        length: ids per window.
        padding: the id of what fills up.

    Attributes:
        num_conversations: of the text.
        num_truncated, num_skipped: of these.
        counts: (W,) tokens of each window that count.
    """

    def __init__(self, tokens: np.ndarray, flags: np.ndarray, length: int, padding: int) -> None:
        self.tokens = tokens
        self.flags = flags
        self.length = length
        self.padding = padding
        starts = np.flatnonzero(is_start(flags))
        ends = np.append(starts[1:], len(tokens))
        self.num_conversations = len(starts)
        lengths = np.minimum(ends - starts, length)
        counts = _counted_targets(flags, starts, starts + lengths)
        self.num_truncated = int(((ends - starts > length) & (counts > 0)).sum())
        self.num_skipped = int((counts == 0).sum())
        kept = np.flatnonzero(counts)
        windows = best_fit(lengths[kept], length)
        order = np.argsort(windows, kind="stable")
        self._starts = starts[kept][order]
        self._lengths = lengths[kept][order]
        sizes = np.bincount(windows)  # conversations in each window
        self._ends = np.cumsum(sizes)
        self.counts = np.bincount(windows, counts[kept], len(sizes)).astype(np.int64)

    def __len__(self) -> int:
        return len(self._ends)

    @property
    def num_counted(self) -> int:
        """Tokens that count, in all windows."""
        return int(self.counts.sum())

    @property
    def num_tokens(self) -> int:
        """Tokens in all windows, without padding."""
        return int(self._lengths.sum())

    def windows(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Ids (B, length) of the windows with these numbers (B,), and which of them count."""
        ids = np.full((len(numbers), self.length), self.padding, np.int64)
        is_counted = np.zeros(ids.shape, bool)
        for row, number in enumerate(numbers.tolist()):
            at = 0
            first = int(self._ends[number - 1]) if number else 0
            for i in range(first, int(self._ends[number])):
                start, size = int(self._starts[i]), int(self._lengths[i])
                ids[row, at : at + size] = self.tokens[start : start + size]
                is_counted[row, at : at + size] = is_target(self.flags[start : start + size])
                at += size
        return ids, is_counted

    def describe(self) -> str:
        """How many conversations there are, how well they fill the windows, and what is lost."""
        full = self.num_tokens / (len(self) * self.length)
        value = (
            f"{self.num_conversations:,} in {len(self):,} windows, {full:.1%} full, "
            f"{self.num_counted:,} tokens to learn"
        )
        if self.num_truncated:
            value += f"; {self.num_truncated:,} truncated to {self.length:,} tokens"
        if self.num_skipped:
            value += f"; {self.num_skipped:,} skipped, without an answer in {self.length:,} tokens"
        return value

    def prompts(self, count: int) -> list[np.ndarray]:
        """What precedes the first answer of some conversations, spread evenly over them."""
        found = []
        for i in np.arange(count) * len(self._starts) // count:
            start = int(self._starts[i])
            first = int(is_target(self.flags[start : start + self.length]).argmax())
            found.append(self.tokens[start : start + first])
        return found

    def conversations(self) -> Iterator[bytes]:
        """The ids of each of the text, whole."""
        starts = np.flatnonzero(is_start(self.flags)).tolist()
        for start, end in pairwise([*starts, len(self.tokens)]):
            yield self.tokens[start:end].tobytes()


def shared_conversations(train: Packs, val: Packs) -> int:
    """How many of the validation split are in the training split, too, token by token."""
    # 64 bits each: two different ones are practically never taken for the same.
    known = set(map(hash, train.conversations()))
    return sum(hash(ids) in known for ids in val.conversations())


def is_target(flags: np.ndarray) -> np.ndarray:
    """Which tokens count: nothing of its own conversation precedes the first one of each."""
    return is_answer(flags) & ~is_start(flags)


def _counted_targets(flags: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """How many tokens count from each start to its end, (C,) int64."""
    places = np.stack([starts, ends], axis=1).ravel()
    return np.add.reduceat(np.append(is_target(flags), False), places, dtype=np.int64)[::2]
