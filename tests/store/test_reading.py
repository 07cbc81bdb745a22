"""Reading a store: windows, their order, and what is kept on the disk."""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from lit_gpt import storage
from lit_gpt.data import TrainBatches
from lit_gpt.errors import UserError
from lit_gpt.store import reading
from lit_gpt.store.block_files import BlockFiles
from lit_gpt.store.order import StoreOrder
from lit_gpt.store.reading import StoreTokens
from lit_gpt.store.splits import open_splits
from lit_gpt.text.files import TextFiles
from lit_gpt.text.vocabularies import Vocabulary

LENGTH = 16  # tokens per window
BLOCK = 500


def open_store(folder: Path, fraction: float = 0.9) -> tuple[StoreTokens, StoreTokens]:
    """The tokens of both splits."""
    text = TextFiles(str(folder), cache=str(folder.parent / "cache"))
    splits = open_splits(text, Vocabulary("bytes"), fraction)
    return splits.train, splits.val


@pytest.fixture
def train(store) -> StoreTokens:
    return open_store(store)[0]


def order_of(tokens: StoreTokens, kind: str = "shuffled", seed: int = 7) -> StoreOrder:
    return StoreOrder(tokens, LENGTH, seed, kind, mixed=4)


# Tokens


def test_the_splits_are_those_of_one_text(store, ids):
    train, val = open_store(store)
    cut = int(0.9 * len(ids))
    assert (len(train), len(val)) == (cut, len(ids) - cut)
    assert (np.asarray(train) == ids[:cut]).all()
    assert (np.asarray(val) == ids[cut:]).all()
    assert list(train[5:9]) == ids[5:9].tolist()
    assert (np.asarray(val[10:][5:9]) == ids[cut + 15 : cut + 19]).all()
    assert len(val[4:4]) == len(np.asarray(val[4:4])) == 0


@pytest.mark.parametrize("length", [1, 17, 700, 4000])  # more than a block, more than a shard
def test_windows_are_exact_at_every_place(length, store, ids):
    for tokens, offset in zip(open_store(store), (0, int(0.9 * len(ids))), strict=True):
        starts = np.arange(0, len(tokens) - length + 1, 1 + length // 7)
        if not len(starts):
            continue
        wanted = np.lib.stride_tricks.sliding_window_view(ids[offset:], length)[starts]
        assert (tokens.windows(starts, length) == wanted).all()  # scattered
        in_order = [tokens.windows(starts[i : i + 1], length) for i in range(len(starts))]
        assert (np.concatenate(in_order) == wanted).all()  # from blocks


def test_scattered_windows_are_fetched_once(train, monkeypatch):
    """Those of an evaluation, which reads the same ones again and again; others are not."""
    starts = np.arange(0, len(train) - 20, 1000)
    first = train.windows(starts, 17)
    calls = []
    monkeypatch.setattr(train.blocks.shards, "fetch", lambda *span: calls.append(span))
    assert (train.windows(starts, 17) == first).all()
    assert calls == []


def test_scattered_windows_are_kept_up_to_a_limit(train, monkeypatch):
    monkeypatch.setattr(reading, "PINNED", 5 * 17 * 2)
    train.windows(np.arange(0, 4000, 1000), 17)
    train.windows(np.arange(100, 4100, 1000), 17)
    assert len(train._pinned) == 4


# Order


def test_an_epoch_has_each_window_once(train):
    order = order_of(train)
    for epoch in range(3):
        starts = np.sort(order.starts(epoch * order.epoch_windows, order.epoch_windows))
        assert (np.diff(starts) == LENGTH).all()
        assert 0 <= starts[0] < LENGTH
        assert len(train) - 2 * LENGTH <= starts[-1] + LENGTH < len(train)


def test_a_window_is_a_pure_function_of_its_number(train):
    """Asked for one by one, backwards, in odd parts over epochs, or by another process."""
    order = order_of(train)
    whole = order.starts(0, 2 * order.epoch_windows + 50)
    places = [*range(len(whole) - 1, 0, -97), 0, order.epoch_windows - 1, order.epoch_windows]
    assert [order.starts(place, 1)[0] for place in places] == whole[places].tolist()
    assert (order_of(train).starts(123, 1500) == whole[123:1623]).all()
    assert not (order_of(train, seed=8).starts(0, 50) == whole[:50]).all()
    epoch = order.epoch_windows
    assert not (whole[:50] == whole[epoch : epoch + 50]).all()


def test_the_windows_of_a_few_blocks_are_mixed(train):
    """Groups of four blocks, each block in one group; inside a group in any order."""
    order = order_of(train)
    blocks = order.starts(0, order.epoch_windows) // BLOCK
    seen: set[int] = set()
    at = 0
    while at < len(blocks):
        group = set(blocks[at : at + 60].tolist())  # half of its windows
        assert len(group) == min(4, -(-len(train) // BLOCK) - len(seen))
        assert not group & seen
        seen |= group
        end = at
        while end < len(blocks) and blocks[end] in group:
            end += 1
        changes = np.count_nonzero(np.diff(blocks[at:end]))
        assert changes > 0.5 * (end - at) * (len(group) > 1)
        at = end
    assert seen == set(range(-(-(len(train) - LENGTH) // BLOCK)))


def test_random_windows_start_anywhere_in_the_blocks_being_mixed(train):
    order = order_of(train, "random")
    starts = order.starts(0, 20 * order.epoch_windows)
    assert (starts >= 0).all()
    assert (starts < len(train) - LENGTH).all()
    assert len(set((starts % LENGTH).tolist())) == LENGTH
    # Each place is as likely: 20 epochs have 20 / 16 of its windows.
    shares = np.histogram(starts, 10, (0, len(train) - LENGTH))[0] / len(starts)
    assert np.allclose(shares, 0.1, atol=0.01)
    first = set((order.starts(0, 60) // BLOCK).tolist())
    assert len(first) == 4
    assert (order_of(train, "random").starts(100, 50) == starts[100:150]).all()


@pytest.mark.parametrize("kind", ["shuffled", "random"])
def test_any_number_of_ranks_reads_the_same_sequence(kind, train, ids):
    """Ranks 1, 2, 3 and 4 with 12 windows a step, 60 steps, more than an epoch."""
    steps = 60 if kind == "random" else 130
    sequences = []
    for world in (1, 2, 3, 4):
        ranks = []
        for rank in range(world):
            order = order_of(train, kind)
            batches = TrainBatches(train, order, 12 // world, LENGTH, rank, world)
            ranks.append([batches[i][0].numpy() for i in range(steps)])
        rows = [np.concatenate([rank[i] for rank in ranks]) for i in range(steps)]
        sequences.append(np.concatenate(rows))
    starts = order_of(train, kind).starts(0, 12 * steps)
    assert order_of(train).epoch_windows < 12 * 130
    wanted = ids[starts[:, None] + np.arange(LENGTH)]
    for sequence in sequences:
        assert (sequence == wanted).all()


def test_an_epoch_fetches_each_block_once(texts, prepare, monkeypatch, tmp_path):
    """Ten groups of 16 blocks, whose ends lie inside batches, and nothing window by window."""
    prepare(texts, tmp_path / "s", "--block_tokens=100")
    train, _ = open_store(tmp_path / "s")
    spans = []
    fetch = train.blocks.shards.fetch
    monkeypatch.setattr(
        train.blocks.shards, "fetch", lambda *span: spans.append(span) or fetch(*span)
    )
    order = StoreOrder(train, LENGTH, 7, "shuffled")
    batches = TrainBatches(train, order, 5, LENGTH)
    for i in range(order.epoch_windows // 5):
        batches[i]
    blocks = [start // 100 for start, _ in spans]
    next_epoch = set(order._blocks(1, 0).tolist())  # which is fetched ahead
    assert order.num_groups == 10
    assert LENGTH + 1 not in {stop - start for start, stop in spans}
    assert set(blocks) == set(range(order.num_blocks))
    assert all(blocks.count(b) == 1 for b in set(blocks) - next_epoch)


def test_the_next_blocks_are_fetched_meanwhile(train):
    """Before any of their windows is asked for."""
    order = order_of(train)
    order.starts(0, 1)
    order.starts(1, 1)
    ahead = order._blocks(0, 1).tolist()
    assert all(train.blocks.has(train.span(block, LENGTH + 1)) for block in ahead)


def test_blocks_that_could_not_be_fetched_ahead_are_fetched_again(train, ids, monkeypatch):
    """The connection is back when they are needed."""
    order = order_of(train)
    order.starts(0, 1)
    for block in order._blocks(0, 0).tolist():
        train.blocks.get(train.span(block, LENGTH + 1))
    fetch = train.blocks.shards.fetch

    def broken(*span: int) -> np.ndarray:
        raise UserError("no connection")

    monkeypatch.setattr(train.blocks.shards, "fetch", broken)
    order.starts(1, 1)
    with pytest.raises(UserError, match="no connection"):
        train.blocks.get(train.span(order._blocks(0, 1)[0].item(), LENGTH + 1))
    for future in train.blocks._spans.values():
        future.exception()  # all have failed
    monkeypatch.setattr(train.blocks.shards, "fetch", fetch)
    starts = order.starts(2, 200)  # of both groups
    rows = np.concatenate([train.windows(starts[i : i + 5], LENGTH) for i in range(0, 200, 5)])
    assert (rows == ids[starts[:, None] + np.arange(LENGTH)]).all()


# Blocks on the disk


def ids_of(start: int, stop: int) -> np.ndarray:
    return np.arange(start, stop, dtype="<u2")


@pytest.fixture
def files(tmp_path) -> BlockFiles:
    return BlockFiles(tmp_path / "blocks", np.dtype("<u2"), 3)


def kept(files: BlockFiles) -> list[str]:
    return sorted(path.name for path in files.folder.glob("*.block"))


def test_a_block_is_fetched_once_for_all_processes(files, tmp_path):
    fetched = []

    def fetch() -> np.ndarray:
        fetched.append(threading.get_ident())
        time.sleep(0.2)
        return ids_of(5, 25)

    others = [BlockFiles(files.folder, files.dtype, 3) for _ in range(4)]
    results: list[np.ndarray] = []
    threads = [
        threading.Thread(target=lambda f=f: results.append(f.load((5, 25), fetch))) for f in others
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(fetched) == 1
    assert all((found == ids_of(5, 25)).all() for found in results)
    assert len(results) == 4


def test_the_block_used_least_recently_goes(files):
    for i, span in enumerate([(0, 10), (10, 20), (20, 30)]):
        files.load(span, lambda span=span: ids_of(*span))
        os.utime(files.folder / f"{span[0]}-{span[1]}.block", (i, i))
    held = files.load((10, 20), lambda: pytest.fail("it is there"))
    files.load((0, 10), lambda: pytest.fail("it is there"))
    files.load((30, 40), lambda: ids_of(30, 40))
    assert kept(files) == ["0-10.block", "10-20.block", "30-40.block"]
    os.utime(files.folder / "10-20.block", (1, 1))
    files.load((40, 50), lambda: ids_of(40, 50))
    assert (held == ids_of(10, 20)).all()  # which has lost its name only


@pytest.mark.parametrize("change", ["flip", "cut", "empty"])
def test_a_damaged_block_is_fetched_again(change, files):
    files.load((0, 10), lambda: ids_of(0, 10))
    path = files.folder / "0-10.block"
    content = path.read_bytes()
    changed = {"flip": b"\xff" + content[1:], "cut": content[:-2], "empty": b""}[change]
    path.write_bytes(changed)
    assert (files.load((0, 10), lambda: ids_of(0, 10)) == ids_of(0, 10)).all()
    assert path.read_bytes() == content


def test_what_a_killed_process_left_goes(files):
    files.load((0, 10), lambda: ids_of(0, 10))
    left = files.folder / ".10-20.block.7-7.unfinished"
    left.write_bytes(b"x")
    files.load((20, 30), lambda: ids_of(20, 30))
    assert left.exists()  # that process may be alive
    os.utime(left, (1, 1))
    files.load((30, 40), lambda: ids_of(30, 40))
    assert not left.exists()


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"^cache: cannot keep blocks in .*file/blocks: Not a dir"):
        BlockFiles(tmp_path / "file" / "blocks", np.dtype("<u2"), 3)


# Damage


@pytest.mark.parametrize("place", ["tokens", "checksums"])
def test_a_damaged_shard_is_one_line_and_never_a_wrong_token(place, texts, prepare, tmp_path):
    prepare(texts, tmp_path / "s")
    shard = tmp_path / "s" / "shards" / "000000-000001.bin"
    content = bytearray(shard.read_bytes())
    content[100 if place == "tokens" else -1] ^= 1
    shard.write_bytes(content)
    train, _ = open_store(tmp_path / "s")
    train.windows(np.array([2000]), 17)  # of the shard before
    with pytest.raises(UserError, match=r"000000-000001.bin is damaged: it does not match its "):
        train.windows(np.array([3500]), 17)


def test_a_missing_or_short_shard_is_one_line(texts, prepare, tmp_path):
    prepare(texts, tmp_path / "s")
    shard = tmp_path / "s" / "shards" / "000000-000001.bin"
    shard.write_bytes(shard.read_bytes()[:-1000])
    with pytest.raises(UserError, match=r"000000-000001.bin is truncated; write the store again"):
        open_store(tmp_path / "s")[0].windows(np.array([3500]), 17)
    shard.unlink()
    with pytest.raises(UserError, match=r"000000-000001.bin is missing; write the store again"):
        open_store(tmp_path / "s")[0].windows(np.array([3500]), 17)


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ('"num_tokens": 3000', '"num_tokens": 3001', "its index does not match its checksum"),
        ('"version": 1', '"version": 2', "its index does not match its checksum"),
        ("}", "", "its index is damaged|Expecting|does not match"),
    ],
)
def test_a_damaged_index_is_one_line(old, new, problem, texts, prepare, tmp_path):
    prepare(texts, tmp_path / "s")
    path = tmp_path / "s" / "index.json"
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(UserError, match=f"can't be read: ({problem})"):
        open_store(tmp_path / "s")


def test_a_store_of_another_version_is_one_line(texts, prepare, tmp_path):
    prepare(texts, tmp_path / "s")
    path = tmp_path / "s" / "index.json"
    value = storage.parse_json(path.read_text(), "")
    path.write_text(storage.dump_json(value | {"version": 2}))
    problem = "its format is version 2, and this lit_gpt reads 1"
    with pytest.raises(UserError, match=problem):
        open_store(tmp_path / "s")


@pytest.mark.parametrize(
    "change",
    [
        {"info": {"num_tokens": 1}},
        {"shards": [{"name": "a", "checksum": 0, "num_tokens": 0}]},
        {"shards": []},
        {"dtype": "uint8"},
        {"block_tokens": 0},
    ],
    ids=str,
)
def test_an_index_that_contradicts_itself_is_one_line(change, texts, prepare, tmp_path):
    """With a checksum that fits, as another program may write it."""
    prepare(texts, tmp_path / "s")
    path = tmp_path / "s" / "index.json"
    value = json.loads(path.read_text())["value"]
    info = value["info"] | change.get("info", {})
    if "shards" in change:
        info["num_tokens"] = 0
    path.write_text(storage.dump_json(value | change | {"info": info}))
    with pytest.raises(UserError, match="can't be read: its index contradicts itself"):
        open_store(tmp_path / "s")
