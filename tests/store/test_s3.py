"""Token stores on an S3 server that is a process of its own, and what can go wrong on the way."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from lit_gpt.errors import UserError
from lit_gpt.store.objects import Objects
from lit_gpt.store.reading import KEPT, THREADS
from lit_gpt.store.splits import open_splits
from lit_gpt.text.files import TextFiles
from lit_gpt.text.vocabularies import Vocabulary
from tests.conftest import ROOT, SMALL, command_line
from tests.store.conftest import SIZES
from tests.store.s3_server import Proxy

STEPS = {"data.order": "shuffled", "trainer.max_steps": 8, "trainer.val_check_interval": 4}
SHARD = "shards/000000-000001.bin"


@pytest.fixture
def place(s3: Proxy, s3_port: int, texts: Path, prepare, request) -> str:
    """A store of `texts` on the server, by two tasks."""
    address = f"s3://bucket/{request.node.name.partition('[')[0]}/store"
    if Objects(address).find("index.json") is None:
        for task in (0, 1):
            assert prepare(texts, address, f"--task={task}/2")[0] == 0
    s3.clear()
    return address


def read_all(place: str, cache: Path, first: int = 0) -> np.ndarray:
    """The tokens from the first one on, through windows that are taken from blocks."""
    text = TextFiles(place, cache=str(cache))
    tokens = open_splits(text, Vocabulary("bytes"), 0.5).corpus.tokens
    starts = np.arange(first, len(tokens) - 10, 10)
    rows = [tokens.windows(starts[i : i + 1], 10) for i in range(len(starts))]
    return np.concatenate(rows).ravel()


def fetches(s3: Proxy) -> Counter[str]:
    """Requests for each shard."""
    found: Counter[str] = Counter()
    for (method, name), count in s3.counts.items():
        if method == "GET" and "/shards/" in name:
            found[name.rpartition("/store/")[2]] += count
    return found


def test_a_store_on_s3_is_the_one_in_a_folder(place, store, s3, train, tmp_path, prepare, texts):
    """Trained on, resumed, and refused a second time; the blocks kept on the disk are bounded."""
    assert "there is a finished token store already" in prepare(texts, place)[2]
    in_folder = train(**{"data.path": store} | STEPS)
    s3.clear()
    root = {"trainer.default_root_dir": tmp_path / "other"}
    first = train(**{"data.path": place} | STEPS | root | {"trainer.max_steps": 4})
    assert (first.status, first.err) == (0, "")
    resumed = train("--ckpt_path=last", **{"data.path": place} | STEPS | root)
    assert resumed.status == 0
    assert [*first.steps, resumed.steps[-1]] == in_folder.steps
    assert {method for method, _ in s3.counts} == {"GET"}
    assert 0 < len(list((tmp_path / "cache").glob("store-*/*.block"))) <= KEPT


def test_each_part_is_fetched_once(place, ids, s3, tmp_path):
    """A request for each block, one for the checksums of each shard, one where a block ends."""
    found = read_all(place, tmp_path)
    assert (found == ids[: len(found)]).all()
    by_shard = fetches(s3)
    assert max(by_shard.values()) <= 3000 // 500 + 1 + 2
    again = read_all(place, tmp_path, first=2000)  # by another process, as it were
    assert (again == found[2000:]).all()
    assert fetches(s3) == by_shard


def test_two_processes_read_one_process_s_windows_and_fetch_each_block_once(
    place, s3, train, places, tmp_path
):
    """2 x 2 windows a step against 1 x 4."""
    options = {"data.path": place, "model.dropout": 0, "data.order": "shuffled"}
    one = train(**options | {"data.batch_size": 4})
    single = fetches(s3)
    s3.clear()
    options |= {"data.cache": tmp_path / "cache2", "trainer.default_root_dir": tmp_path / "two"}
    options |= {"trainer.devices": 2, "trainer.strategy": "ddp", "data.batch_size": 2}
    argv = command_line(places | SMALL | options)
    command = [sys.executable, str(ROOT / "scripts" / "train.py"), *argv]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    steps = [line for line in done.stdout.splitlines() if line.startswith("Step: ")]
    assert steps == one.steps
    # Beside the blocks, each process fetches its evaluation windows and the shards' checksums.
    assert fetches(s3).total() < 1.6 * single.total()


# Faults


@pytest.mark.parametrize("fault", ["break", "503", "damage"])
def test_what_passes_is_tried_again(fault, place, ids, s3, tmp_path):
    """Every third answer about shards is wrong."""
    seen: Counter[str] = Counter()

    def every_third(method: str, name: str) -> str | None:
        seen["shards"] += "/shards/" in name
        return fault if "/shards/" in name and seen["shards"] % 3 == 0 else None

    s3.fault = every_third
    found = read_all(place, tmp_path)
    assert (found == ids[: len(found)]).all()
    assert seen["shards"] > 60


@pytest.mark.parametrize(
    ("fault", "problem"),
    [
        ("break", f"{SHARD}: the connection breaks again and again; try again later"),
        ("503", f"{SHARD}: the service fails; try again later"),
        ("403", f"{SHARD}: access is denied; check the credentials in the environment"),
        ("damage", f"{SHARD} is damaged: it does not match its checksum; write the store again"),
    ],
)
def test_what_does_not_pass_is_one_line(fault, problem, place, s3, tmp_path):
    s3.fault = lambda method, name: fault if name.endswith(SHARD) else None
    with pytest.raises(UserError) as error:
        read_all(place, tmp_path)
    assert f"{place}/{problem}" in str(error.value)
    assert fetches(s3)[SHARD] <= 2 * 5 * 8  # of each block, as threads fetch a few at a time


def test_a_slow_server_is_waited_for_no_longer_than_the_limit(s3):
    objects = Objects("s3://bucket/slow", seconds=0.3, retries=1)
    objects.put("object", b"content")
    s3.counts.clear()
    s3.fault = lambda method, name: "slow"
    with pytest.raises(UserError, match=r"s3://bucket/slow/object: no answer in time; try again"):
        objects.get("object")
    assert s3.counts["GET", "bucket/slow/object"] == 2
    s3.fault = lambda method, name: "slow" if s3.counts.total() == 3 else None
    assert objects.get("object") == b"content"


def test_a_process_that_ends_waits_for_no_more_blocks(place, s3, tmp_path):
    """While it expects 32 of them, it waits for the one request that each thread has sent."""
    s3.fault = lambda method, name: "slow" if "/shards/" in name else None
    code = (
        "from lit_gpt.store.splits import *; from lit_gpt.store.order import StoreOrder; "
        f"text = TextFiles({place!r}, cache={str(tmp_path)!r}); "
        "train = open_splits(text, Vocabulary('bytes'), 0.9).train; "
        "order = StoreOrder(train, 16, 7, 'shuffled'); order.starts(0, 1); order.starts(1, 1)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
    assert fetches(s3).total() <= THREADS


def test_a_run_that_loses_its_shards_ends_with_one_line(place, s3, train):
    s3.fault = lambda method, name: "403" if name.endswith(SHARD) else None
    result = train(**{"data.path": place} | STEPS)
    assert result.status == 2
    assert result.err.splitlines()[-1].startswith(f"error: --data.path '{place}': {place}/{SHARD}")


@pytest.mark.parametrize(
    ("address", "problem"),
    [
        ("s3://bucket/nothing", "has no index.json, so it is not a token store, or not a finished"),
        ("s3://nobody-has-this/store", "there is no such bucket"),
        ("foo://bucket/store", "not an address of object storage, such as s3://bucket/prefix"),
    ],
)
def test_a_place_without_a_store_is_one_line(address, problem, s3, train):
    result = train(**{"data.path": address})
    assert result.status == 2
    assert result.err.startswith(f"error: --data.path '{address}': ")
    assert problem in result.err
    assert len(result.err.splitlines()) == 1


def test_wrong_credentials_are_one_line(s3, texts, prepare, monkeypatch):
    s3.fault = lambda method, name: "403"
    status, _, err = prepare(texts, "s3://bucket/closed")
    assert status == 2
    assert "access is denied; check the credentials in the environment: AWS_ACCESS_KEY_ID" in err
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    status, _, err = prepare(texts, "s3://bucket/closed")
    assert status == 2
    assert "error: --out 's3://bucket/closed': s3://bucket/closed: no credentials;" in err
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.delenv("AWS_ALLOW_HTTP")
    assert "set AWS_ALLOW_HTTP=true to allow it" in prepare(texts, "s3://bucket/closed")[2]


def test_two_tasks_that_finish_together_write_one_index(s3, texts, tmp_path):
    """As processes, at the same time."""
    address = "s3://bucket/together"
    base = [sys.executable, str(ROOT / "scripts" / "prepare.py"), f"--data.path={texts}"]
    base += [f"--out={address}", *SIZES]
    tasks = [
        subprocess.Popen([*base, f"--task={task}/4"], stdout=subprocess.PIPE, text=True)
        for task in range(4)
    ]
    outputs = [task.communicate()[0] for task in tasks]
    assert [task.returncode for task in tasks] == [0] * 4
    assert any("Total: " in out for out in outputs)
    assert Objects(address).find("index.json") is not None


def test_an_index_of_another_process_is_not_overwritten(s3):
    objects = Objects("s3://bucket/created")
    assert objects.create("object", b"one")
    assert objects.create("object", b"one")  # whose first answer was lost
    assert not objects.create("object", b"two")
    assert objects.get("object") == b"one"
