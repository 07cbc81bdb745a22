"""Benchmark of a token store: requests, the time to the first batch, the order on several ranks."""

from __future__ import annotations

import hashlib
import multiprocessing
import random
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from benchmarks.measure import ROOT, Options, at_least_one, save, show
from lit_gpt.store import reading
from lit_gpt.store.objects import Objects
from lit_gpt.store.order import StoreOrder
from lit_gpt.store.splits import open_splits
from lit_gpt.text.files import TextFiles
from lit_gpt.text.vocabularies import Vocabulary

SHARD = 1 << 20  # tokens
BLOCK = 1 << 17
STEP = 12  # windows, over all ranks
LENGTH = 256  # tokens per window


@dataclass
class Read:
    """What one rank did in an epoch.

    Args:
        windows: sha256 of each.
        requests: to the store, for tokens; those for checksums come once a shard and process.
        seconds: from opening the store to the first batch.
        memory: peak, in bytes.
    """

    windows: list[bytes]
    requests: int
    seconds: float
    memory: int


def write_store(folder: Path, megabytes: int) -> str:
    """A store of random words as bytes: shards of 1 M tokens, blocks of 128 K; its address.

    An address of files is treated as object storage is: blocks are kept in the cache.
    """
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghij", k=rng.randint(2, 9))) for _ in range(5000)]
    with (folder / "text.txt").open("w") as file:
        for _ in range(megabytes * 20):
            file.write(" ".join(rng.choices(words, k=7700)) + "\n")
    options = ["--data.tokenizer=bytes", f"--shard_tokens={SHARD}", f"--block_tokens={BLOCK}"]
    script = str(Path(ROOT) / "scripts" / "prepare.py")
    command = [sys.executable, script, f"--data.path={folder / 'text.txt'}", *options]
    subprocess.run([*command, f"--out={folder / 'store'}"], check=True, stdout=subprocess.DEVNULL)
    return f"file://{folder / 'store'}"


def read_epoch(address: str, cache: str, rank: int, world: int, kept: int, turn: Barrier) -> Read:
    """One epoch of a rank, in step with the others, as gradients keep ranks in step."""
    reading.KEPT = kept
    requests = 0
    get_range = Objects.get_range

    def counted(self: Objects, name: str, start: int, stop: int) -> bytes:
        nonlocal requests
        requests += stop - start > 4 * SHARD // reading.PAGE  # more than a shard's checksums
        return get_range(self, name, start, stop)

    Objects.get_range = counted  # type: ignore[method-assign]
    turn.wait()
    begin = time.perf_counter()
    text = TextFiles(address, cache=cache)
    tokens = open_splits(text, Vocabulary("bytes"), 0.9).train
    order = StoreOrder(tokens, LENGTH, 1337, "shuffled")
    share = STEP // world
    windows: list[bytes] = []
    seconds = 0.0
    for step in range(order.epoch_windows // STEP):
        starts = order.starts((step * world + rank) * share, share)
        rows = np.ascontiguousarray(tokens.windows(starts, LENGTH + 1))
        seconds = seconds or time.perf_counter() - begin
        windows += [hashlib.sha256(row.tobytes()).digest() for row in rows]
        if step % 16 == 0:
            turn.wait()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return Read(windows, requests, seconds, peak)


def read_together(address: str, world: int, kept: int) -> list[Read]:
    """All ranks, as processes that share a new cache."""
    context = multiprocessing.get_context("spawn")
    turn = context.Barrier(world)
    with tempfile.TemporaryDirectory() as cache, context.Manager() as manager:
        results = manager.dict()
        arguments = [(address, cache, rank, world, kept, turn, results) for rank in range(world)]
        ranks = [context.Process(target=keep, args=each) for each in arguments]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
        return [results[rank] for rank in range(world)]


def keep(
    address: str, cache: str, rank: int, world: int, kept: int, turn: Barrier, results: Any
) -> None:
    results[rank] = read_epoch(address, cache, rank, world, kept, turn)


def sequence(ranks: list[Read]) -> list[bytes]:
    """The windows of all ranks, in their global order."""
    share = STEP // len(ranks)
    steps = range(0, len(ranks[0].windows), share)
    return [window for i in steps for rank in ranks for window in rank.windows[i : i + share]]


def token_store(options: Options, megabytes: int = 24) -> None:
    """Requests for each shard of a store in an epoch, on 1 to 4 ranks with one cache.

    Args:
        options: shared by all benchmarks.
        megabytes: of text; the training split has nine tenths of it.
    """
    at_least_one(megabytes=megabytes)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        address = write_store(Path(folder), megabytes)
        shards = 0.9 * megabytes * 1e6 / SHARD
        first: list[bytes] = []
        for world, kept in (*((n, reading.KEPT) for n in (1, 2, 3, 4)), (1, reading.MIXED)):
            ranks = read_together(address, world, kept)
            found = sequence(ranks)
            first = first or found
            rows.append(
                {
                    "ranks": world,
                    "blocks kept": kept,
                    "requests per shard": round(sum(r.requests for r in ranks) / shards, 1),
                    "first batch, s": round(max(r.seconds for r in ranks), 2),
                    "peak MB": round(max(r.memory for r in ranks) / 1e6),
                    "same sequence": found == first,
                }
            )
    table = Table(*rows[0], title=f"An epoch: shards of {SHARD // BLOCK} blocks, 16 blocks mixed")
    for row in rows:
        table.add_row(*map(str, row.values()))
    show(table)
    save("store", rows, options.out)
