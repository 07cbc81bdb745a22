"""Tokens of a store: fetched block by block, checked, and kept for a while.

Shapes: N tokens of the store or of a part of it, B windows, L tokens of a window and its target.
"""

from __future__ import annotations

import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache

import numpy as np

from lit_gpt.errors import UserError
from lit_gpt.store.block_files import BlockFiles
from lit_gpt.store.index import PAGE, Index
from lit_gpt.store.objects import AGAIN, Objects

MIXED = 16  # blocks whose windows are mixed
KEPT = 2 * MIXED + 2  # blocks: those mixed, the next ones, and two for an evaluation
THREADS = 8  # requests at a time
TRAILERS = 1024  # of shards, kept in memory
TRIES = 3  # of a part that doesn't match its checksum, which may have been damaged on the way
PINNED = 1 << 26  # bytes of scattered windows, which each evaluation reads again
MOST = 1 << 26  # tokens that may be taken as one array

Span = tuple[int, int]  # from the first token to the one after the last


class Shards:
    """The tokens of a store, read part by part; each part is checked."""

    def __init__(self, objects: Objects, index: Index) -> None:
        self.objects = objects
        self.index = index
        self.dtype = np.dtype(index.dtype).newbyteorder("<")
        self.pool = ThreadPoolExecutor(THREADS, "store")
        self._crcs: Callable[[int], np.ndarray] = lru_cache(TRAILERS)(self._read_crcs)

    def fetch(self, start: int, stop: int) -> np.ndarray:
        """Tokens start to stop - 1, of as many shards as it takes.

        Raises:
            UserError: a shard is missing, damaged or can't be read.
        """
        first = int(np.searchsorted(self.index.ends, start, "right"))
        parts = []
        while start < stop:
            end = int(self.index.ends[first])
            begin = end - self.index.shards[first].num_tokens
            parts.append(self._fetch_part(first, start - begin, min(stop, end) - begin))
            start = end
            first += 1
        return np.concatenate(parts) if len(parts) > 1 else parts[0]

    def _fetch_part(self, number: int, start: int, stop: int) -> np.ndarray:
        """Tokens of one shard, counted from its beginning."""
        shard = self.index.shards[number]
        page = start // PAGE
        begin = page * PAGE
        end = min(-(-stop // PAGE) * PAGE, shard.num_tokens)
        size = self.dtype.itemsize
        for _ in range(TRIES):
            content = self._request(shard.name, begin * size, end * size)
            pages = (content[at : at + PAGE * size] for at in range(0, len(content), PAGE * size))
            crcs = self._crcs(number)[page : -(-end // PAGE)]
            if len(content) == (end - begin) * size and list(map(zlib.crc32, pages)) == [*crcs]:
                return np.frombuffer(content, self.dtype)[start - begin : stop - begin]
        raise self._damaged(shard.name)

    def _read_crcs(self, number: int) -> np.ndarray:
        """The checksums of a shard's pages."""
        shard = self.index.shards[number]
        start = shard.num_tokens * self.dtype.itemsize
        size = 4 * -(-shard.num_tokens // PAGE)
        for _ in range(TRIES):
            trailer = self._request(shard.name, start, start + size)
            if zlib.crc32(trailer) == shard.checksum:
                return np.frombuffer(trailer, "<u4")
        raise self._damaged(shard.name)

    def _request(self, name: str, start: int, stop: int) -> bytes:
        self.pool.submit(bool)  # an error once the process ends, when nobody waits for the answer
        return self.objects.get_range(name, start, stop)

    def _damaged(self, name: str) -> UserError:
        return UserError(
            f"{self.objects.place}/{name} is damaged: it does not match its checksum",
            hint=AGAIN,
        )


class Blocks:
    """Spans of a store, fetched by threads beside the computation; KEPT of them stay.

    Args:
        files: keeps them on disk, for all processes of this machine; None: in memory.
    """

    def __init__(self, shards: Shards, files: BlockFiles | None) -> None:
        self.shards = shards
        self.files = files
        self._spans: OrderedDict[Span, Future[np.ndarray]] = OrderedDict()  # by when expected

    def expect(self, spans: Iterable[Span]) -> None:
        """Begins to fetch those that will be needed next; those expected longest ago go."""
        for span in spans:
            future = self._spans.pop(span, None)
            if future is None or (future.done() and future.exception()):  # which may have passed
                future = self.shards.pool.submit(self._load, span)
            self._spans[span] = future
        while len(self._spans) > KEPT:
            self._spans.popitem(last=False)[1].cancel()

    def has(self, span: Span) -> bool:
        return span in self._spans

    def get(self, span: Span) -> np.ndarray:
        if span not in self._spans:
            self.expect([span])
        return self._spans[span].result()

    def fetch_all(self, spans: list[Span]) -> list[np.ndarray]:
        """Short ones, which are not kept."""
        return list(self.shards.pool.map(lambda span: self.shards.fetch(*span), spans))

    def _load(self, span: Span) -> np.ndarray:
        if self.files is None:
            return self.shards.fetch(*span)
        return self.files.load(span, lambda: self.shards.fetch(*span))


class StoreTokens:
    """Ids of a store, or of a part of it, as an array that is fetched where it is read.

    Slicing gives a view; `np.asarray` fetches it, up to MOST tokens.
    """

    def __init__(self, blocks: Blocks, start: int, stop: int) -> None:
        self.blocks = blocks
        self.start = start
        self.stop = stop
        self.block_tokens = blocks.shards.index.block_tokens
        self.dtype = np.dtype(blocks.shards.index.dtype)
        self._pinned: dict[tuple[int, int], np.ndarray] = {}  # windows, by start and length
        self._longest = 0  # of the windows read so far

    def __len__(self) -> int:
        return self.stop - self.start

    def __getitem__(self, part: slice) -> StoreTokens:
        start, stop, step = part.indices(len(self))
        assert step == 1, "a store is read forwards, token by token"
        return StoreTokens(self.blocks, self.start + start, self.start + max(start, stop))

    def __array__(self, dtype: object = None, copy: bool | None = None) -> np.ndarray:
        assert len(self) <= MOST, f"{len(self):,} tokens as one array"
        if not len(self):
            return np.empty(0, self.dtype)
        (ids,) = self.blocks.fetch_all([(self.start, self.stop)])
        return ids.astype(self.dtype if dtype is None else dtype)  # type: ignore[call-overload]

    def __iter__(self) -> Iterator[int]:
        return iter(np.asarray(self).tolist())

    def span(self, block: int, length: int) -> Span:
        """What a block of this part has, and what windows that begin in it reach into."""
        self._longest = max(self._longest, length)
        begin = self.start + block * self.block_tokens
        return begin, min(begin + self.block_tokens + self._longest - 1, self.stop)

    def windows(self, starts: np.ndarray, length: int) -> np.ndarray:
        """Ids of the windows that begin at `starts` (B,), counted in this part: (B, L).

        Those of blocks that are kept, or of one block, are taken from there. Others, such as the
        windows of an evaluation, which are spread over the split, are fetched by themselves.
        """
        numbers = starts // self.block_tokens
        spans = {int(n): self.span(int(n), length) for n in np.unique(numbers)}
        is_kept = {n: len(spans) == 1 or self.blocks.has(span) for n, span in spans.items()}
        rows = np.empty((len(starts), length), self.dtype)
        from_blocks = np.array([is_kept[n] for n in numbers.tolist()], bool)
        for i in np.flatnonzero(from_blocks):
            span = spans[int(numbers[i])]
            at = self.start + int(starts[i]) - span[0]
            rows[i] = self.blocks.get(span)[at : at + length]
        if not from_blocks.all():
            rows[~from_blocks] = self._scattered(starts[~from_blocks], length)
        return rows

    def _scattered(self, starts: np.ndarray, length: int) -> np.ndarray:
        wanted = [(start, length) for start in starts.tolist()]
        missing = list(dict.fromkeys(key for key in wanted if key not in self._pinned))
        spans = [(self.start + start, self.start + start + length) for start, _ in missing]
        fetched = dict(zip(missing, self.blocks.fetch_all(spans), strict=True))
        rows = np.stack([fetched[k] if k in fetched else self._pinned[k] for k in wanted])
        if (len(self._pinned) + len(fetched)) * length * self.dtype.itemsize <= PINNED:
            self._pinned |= {key: row.copy() for key, row in fetched.items()}  # not its whole page
        return rows
