"""The order of the training windows: where each of them starts, by its number alone.

Window number w of an endless sequence starts at a place that is a pure function of (order, seed, w)
and the text. So the position in the data is a number of windows, whatever the batch size and the
number of devices.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Protocol

import numpy as np

DRAWN = 1024  # random windows drawn at once, in less time than it takes to make a generator
IGNORED = -100  # a target that counts nothing, as in torch and transformers


class Order(Protocol):
    """An endless sequence of windows; `epoch_windows` of them are one pass over the text."""

    epoch_windows: int

    def starts(self, first: int, count: int) -> np.ndarray:
        """The places in the text at which windows number first to first + count - 1 start."""
        ...


def epoch_windows(num_tokens: int, context_length: int) -> int:
    """How many windows make an epoch: those without overlap, wherever the first one starts."""
    max_offset = min(context_length - 1, num_tokens - context_length - 1)
    return (num_tokens - 1 - max_offset) // context_length


def joined(first: int, count: int, part: Callable[[int, int], np.ndarray]) -> np.ndarray:
    """The starts of windows first to first + count - 1.

    Args:
        part: at least one and at most as many of them, given the same two numbers.
    """
    starts = np.empty(count, np.int64)  # here, a batch that does not fit into memory fails
    done = 0
    while done < count:
        found = part(first + done, count - done)
        starts[done : done + len(found)] = found
        done += len(found)
    return starts


class BlockOrder(ABC):
    """An order that is made block by block, of which the newest is kept.

    Args:
        num_tokens: of the text, more than context_length.
        context_length: tokens per window; the one after them is a target too.
        seed: of all draws.
    """

    block_windows: int  # in each block

    def __init__(self, num_tokens: int, context_length: int, seed: int) -> None:
        self.last_start = num_tokens - context_length - 1
        assert self.last_start >= 0
        self.context_length = context_length
        self.seed = seed
        self.epoch_windows = epoch_windows(num_tokens, context_length)
        self._newest: tuple[int, np.ndarray] = (-1, np.empty(0))

    def starts(self, first: int, count: int) -> np.ndarray:
        return joined(first, count, self._part)

    def _part(self, first: int, count: int) -> np.ndarray:
        """Starts from window `first` on, up to the end of its block."""
        block, place = divmod(first, self.block_windows)
        if self._newest[0] != block:
            self._newest = (block, self.draw(np.random.default_rng((self.seed, block))))
        return self._newest[1][place : place + count]

    @abstractmethod
    def draw(self, rng: np.random.Generator) -> np.ndarray:
        """The starts of a block, (block_windows,)."""


class RandomOrder(BlockOrder):
    """Each window starts anywhere."""

    block_windows = DRAWN

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        return rng.integers(0, self.last_start, DRAWN, endpoint=True)


class ShuffledOrder(BlockOrder):
    """Each epoch goes through windows that don't overlap, in a new order, from a new offset."""

    def __init__(self, num_tokens: int, context_length: int, seed: int) -> None:
        super().__init__(num_tokens, context_length, seed)
        self.block_windows = self.epoch_windows

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        max_offset = min(self.context_length - 1, self.last_start)
        offset = rng.integers(0, max_offset, endpoint=True)
        return offset + rng.permutation(self.epoch_windows) * self.context_length


ORDERS: dict[str, type[BlockOrder]] = {"random": RandomOrder, "shuffled": ShuffledOrder}


class RandomOrderByRank:
    """How earlier versions drew random windows: for runs that began with them.

    Batch i of a rank was drawn by (seed, i, rank), so the windows depend on the batch size and the
    number of ranks. `starts` must be asked for whole batches.
    """

    def __init__(self, order: BlockOrder, world_size: int) -> None:
        self.order = order
        self.world_size = world_size
        self.epoch_windows = order.epoch_windows

    def starts(self, first: int, count: int) -> np.ndarray:
        batch, rank = divmod(first // count, self.world_size)
        rng = np.random.default_rng((self.order.seed, batch, rank))
        return rng.integers(0, self.order.last_start, count, endpoint=True)


class Rounds:
    """The first `epoch_windows` windows of an order, which come round again and again."""

    def __init__(self, order: Order, epoch_windows: int) -> None:
        self.order = order
        self.epoch_windows = epoch_windows

    def starts(self, first: int, count: int) -> np.ndarray:
        return joined(first, count, self._part)

    def _part(self, first: int, count: int) -> np.ndarray:
        place = first % self.epoch_windows
        return self.order.starts(place, min(count, self.epoch_windows - place))
