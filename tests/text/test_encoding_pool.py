"""Encoding on all cores: in order, in bounded memory, and without threads for a short text."""

import sys
import threading
import time

import numpy as np
import pytest

from lit_gpt.text import encoding_pool
from lit_gpt.text.encoding_pool import batches, encode_in_order


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        (["a" * 9, "b"], [["a" * 9, "b"]]),
        (["a" * 10, "b"], [["a" * 10], ["b"]]),
        (["a", None] * 3, [["a", None, "a", None], ["a", None]]),
        (["a" * 30], [["a" * 30]]),
        ([], []),
    ],
)
def test_batches_have_enough_characters_or_many_parts(parts, expected, monkeypatch):
    monkeypatch.setattr(encoding_pool, "BATCH", 10)
    monkeypatch.setattr(encoding_pool, "MANY", 4)
    assert list(batches(parts)) == expected


def test_ids_come_in_order_whichever_is_ready_first(monkeypatch):
    monkeypatch.setattr(encoding_pool, "cores", lambda: 4)
    threads = set()

    def encode(batch):
        threads.add(threading.current_thread().name)
        time.sleep(0.002 * (int(batch[0]) % 4 == 0))
        return np.array([int(batch[0])])

    texts = [[str(i)] for i in range(100)]
    found = list(encode_in_order(encode, texts))
    assert [(batch, ids.tolist()) for batch, ids in found] == [([str(i)], [i]) for i in range(100)]
    assert len(threads) > 2


def test_the_first_batches_are_encoded_without_a_thread(monkeypatch):
    monkeypatch.setattr(encoding_pool, "ALONE", 3)
    threads = []

    def encode(batch):
        threads.append(threading.current_thread() is threading.main_thread())
        return np.array([])

    list(encode_in_order(encode, [["a"]] * 5))
    assert threads == [True] * 3 + [False] * 2


@pytest.mark.parametrize(("in_flight", "cores", "most"), [(3, 100, 3), (100, 1, 3), (0.5, 100, 1)])
def test_no_more_text_is_read_than_may_wait(in_flight, cores, most, monkeypatch):
    text = "x" * 1000
    monkeypatch.setattr(encoding_pool, "ALONE", 0)
    monkeypatch.setattr(encoding_pool, "IN_FLIGHT", in_flight * sys.getsizeof(text))
    monkeypatch.setattr(encoding_pool, "cores", lambda: cores)
    read = 0

    def reading():
        nonlocal read
        for _ in range(20):
            read += 1
            yield [text, None]

    for i, _ in enumerate(encode_in_order(lambda batch: np.array([]), reading())):
        assert read <= i + 1 + most
        assert i > 15 or read == i + 1 + most
    assert read == 20


@pytest.mark.parametrize("where", ["reading", "encoding"])
def test_an_error_ends_it_and_the_threads(where, monkeypatch):
    monkeypatch.setattr(encoding_pool, "ALONE", 0)

    def reading():
        yield ["a"]
        yield ["b"]
        if where == "reading":
            raise ValueError("reading")

    def encode(batch):
        if batch == ["b"] and where == "encoding":
            raise ValueError("encoding")
        return np.array([])

    with pytest.raises(ValueError, match=where):
        list(encode_in_order(encode, reading()))
    assert not [t for t in threading.enumerate() if t.name.startswith("encode")]
