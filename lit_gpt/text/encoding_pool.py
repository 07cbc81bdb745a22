"""Encoding on all cores: batches of text in, ids out, in the same order and bounded memory."""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

Batch = list[str | None]  # parts of a text; None ends a document

BATCH = 1 << 18  # characters encoded together, at least
MANY = 1 << 14  # parts encoded together, at most
ALONE = 8  # batches encoded without a thread: a short text starts none
IN_FLIGHT = 1 << 24  # bytes of text that are waiting or being encoded, at most
AHEAD = 2  # batches that wait while all cores are busy


def batches(parts: Iterable[str | None]) -> Iterator[Batch]:
    """A few long parts, or many short documents, at a time."""
    batch: Batch = []
    size = 0
    for part in parts:
        batch.append(part)
        size += len(part or "")
        if size >= BATCH or len(batch) >= MANY:
            yield batch
            batch = []
            size = 0
    if batch:
        yield batch


def cores() -> int:
    """How many this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def encode_in_order(
    encode: Callable[[Batch], np.ndarray], texts: Iterable[Batch]
) -> Generator[tuple[Batch, np.ndarray]]:
    """Each batch with its ids.

    Threads suffice, and share the vocabulary: both tokenizers, splintr and tiktoken, compute
    without Python's lock. Reading goes on meanwhile in the calling thread.
    """
    texts = iter(texts)
    for _, batch in zip(range(ALONE), texts, strict=False):
        yield batch, encode(batch)
    waiting: deque[tuple[Batch, Future[np.ndarray], int]] = deque()
    in_flight = 0
    workers = cores()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="encode")
    try:
        for batch in texts:
            size = sum(sys.getsizeof(part) for part in batch if part)
            while waiting and (in_flight + size > IN_FLIGHT or len(waiting) >= workers + AHEAD):
                done, ids, its_size = waiting.popleft()
                in_flight -= its_size
                yield done, ids.result()
            waiting.append((batch, pool.submit(encode, batch), size))
            in_flight += size
        while waiting:
            done, ids, _ = waiting.popleft()
            yield done, ids.result()
    finally:
        pool.shutdown(cancel_futures=True)  # waits for what is being encoded: a tenth of a second
