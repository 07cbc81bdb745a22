"""The order of the training windows of a store: blocks in a new order, mixed a few at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from lit_gpt.store.reading import MIXED, StoreTokens
from lit_gpt.windows import epoch_windows, joined

DRAWN_GROUP = 1  # tells the draws of a group from those of an epoch


@dataclass(frozen=True)
class Epoch:
    """How one epoch goes through the blocks.

    Args:
        offset: where window 0 starts; window k of the epoch starts k windows later.
        blocks: their numbers in the order in which they are read.
        first: number of the first window that begins in each block, and the number of windows.
        ends: how many windows there are up to the end of each group.
    """

    offset: int
    blocks: np.ndarray
    first: np.ndarray
    ends: np.ndarray


class StoreOrder:
    """An endless sequence of windows of which each epoch reads each block once.

    The windows of `mixed` blocks at a time are mixed. Where window number w starts is a pure
    function of (seed, w) and the index: the same on any number of processes. Starting a group of
    blocks begins to fetch the next one.

    Args:
        kind: shuffled (the windows of an epoch don't overlap) or random (each starts anywhere in
            the blocks that are being mixed).
    """

    def __init__(
        self,
        tokens: StoreTokens,
        context_length: int,
        seed: int,
        kind: Literal["random", "shuffled"],
        mixed: int = MIXED,
    ) -> None:
        self.tokens = tokens
        self.length = context_length
        self.seed = seed
        self.kind = kind
        self.mixed = mixed
        self.last_start = len(tokens) - context_length - 1
        assert self.last_start >= 0
        self.epoch_windows = epoch_windows(len(tokens), context_length)
        self.num_blocks = self.last_start // tokens.block_tokens + 1
        self.num_groups = -(-self.num_blocks // mixed)
        self._epochs: dict[int, Epoch] = {}  # the newest two
        self._newest: tuple[int, int, np.ndarray] = (-1, -1, np.empty(0))  # epoch, group, starts
        self._following: tuple[int, int] | None = None  # epoch and group to be fetched next

    def starts(self, first: int, count: int) -> np.ndarray:
        self._expect(self._following)  # now that no window before the newest group is read any more
        return joined(first, count, self._part)

    def _part(self, first: int, count: int) -> np.ndarray:
        """Starts from window `first` on, up to the end of its group."""
        epoch, place = divmod(first, self.epoch_windows)
        ends = self._epoch(epoch).ends
        group = int(np.searchsorted(ends, place, "right"))
        begin = int(ends[group - 1]) if group else 0
        return self._group(epoch, group)[place - begin :][:count]

    def _epoch(self, number: int) -> Epoch:
        if number not in self._epochs:
            rng = np.random.default_rng((self.seed, number))
            offset = int(rng.integers(0, min(self.length - 1, self.last_start), endpoint=True))
            blocks = rng.permutation(self.num_blocks)
            edges = np.arange(self.num_blocks + 1) * self.tokens.block_tokens
            first = np.clip(-(-(edges - offset) // self.length), 0, self.epoch_windows)
            first[-1] = self.epoch_windows
            sizes = np.diff(first)[blocks]
            ends = np.cumsum(np.add.reduceat(sizes, np.arange(0, len(sizes), self.mixed)))
            newest = sorted(self._epochs)[-1:]
            self._epochs = {n: self._epochs[n] for n in newest}
            self._epochs[number] = Epoch(offset, blocks, first, ends)
        return self._epochs[number]

    def _blocks(self, epoch: int, group: int) -> np.ndarray:
        return self._epoch(epoch).blocks[group * self.mixed : (group + 1) * self.mixed]

    def _group(self, epoch: int, group: int) -> np.ndarray:
        if self._newest[:2] != (epoch, group):
            self._expect((epoch, group))
            self._following = (epoch, group + 1) if group + 1 < self.num_groups else (epoch + 1, 0)
            rng = np.random.default_rng((self.seed, epoch, group, DRAWN_GROUP))
            draw = self._shuffled if self.kind == "shuffled" else self._random
            self._newest = (epoch, group, draw(rng, epoch, self._blocks(epoch, group)))
        return self._newest[2]

    def _expect(self, place: tuple[int, int] | None) -> None:
        """Begins to fetch the blocks of a group."""
        if place is not None:
            blocks = self._blocks(*place).tolist()
            self.tokens.blocks.expect(self.tokens.span(b, self.length + 1) for b in blocks)
        self._following = None

    def _shuffled(self, rng: np.random.Generator, epoch: int, blocks: np.ndarray) -> np.ndarray:
        """Starts of all windows that begin in the blocks."""
        e = self._epoch(epoch)
        numbers = np.concatenate([np.arange(e.first[b], e.first[b + 1]) for b in blocks])
        return e.offset + rng.permutation(numbers) * self.length

    def _random(self, rng: np.random.Generator, epoch: int, blocks: np.ndarray) -> np.ndarray:
        """As many starts, each anywhere in the blocks."""
        e = self._epoch(epoch)
        size = self.tokens.block_tokens
        room = np.minimum(size, self.last_start + 1 - blocks * size)  # places in each block
        places = rng.integers(0, room.sum(), int(np.diff(e.first)[blocks].sum()))
        number = np.searchsorted(np.cumsum(room), places, "right")
        return blocks[number] * size + places - (np.cumsum(room) - room)[number]
