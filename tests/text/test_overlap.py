"""The checks of a result, against the plainest computation of the same numbers."""

from __future__ import annotations

import math
import tracemalloc
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_gpt.text import ngrams, overlap
from lit_gpt.text.corpus import load_corpus
from lit_gpt.text.files import TextFiles
from lit_gpt.text.ngrams import CONCENTRATIONS, frequency_baselines, pair_codes
from lit_gpt.text.overlap import copied_tokens, shared_lines
from lit_gpt.text.vocabularies import Vocabulary, load_tokenizer

BYTES = [bytes([byte]) for byte in range(256)]


@pytest.fixture(params=[None, 3], ids=["whole", "chunks"])
def chunk_size(request, monkeypatch):
    """Everything at once, and three tokens at a time."""
    if request.param:
        monkeypatch.setattr(overlap, "CHUNK", request.param)
        monkeypatch.setattr(ngrams, "SORTED_CHUNK", request.param)


def as_tokens(text: bytes) -> np.ndarray:
    return np.frombuffer(text, np.uint8).astype(np.uint16)


# Lines


def shared_in(train: bytes, val: bytes) -> tuple[int, int, float]:
    found = shared_lines(as_tokens(train), as_tokens(val), BYTES)
    return found.num_lines, found.num_shared, found.share_of_bytes


@pytest.mark.parametrize(
    ("train", "val", "expected"),
    [
        (b"one\ntwo\n", b"two\nthree\none\n", (3, 2, 6 / 11)),
        (b"one\n", b"one\none\n", (2, 2, 1.0)),  # each time it stands there
        (b"one\ntwo\n", b"One\ntw\ntwoo\n", (3, 0, 0.0)),  # whole lines only
        (b"one\ntwo\n", b"\n \t\n\ntwo\n\n", (1, 1, 1.0)),  # blank ones are no lines
        (b"one\n\n", b"two\n\n", (1, 0, 0.0)),
        (b"one\r\n two \r\n", b"one\ntwo\n", (2, 2, 1.0)),  # white space around them
        (b"two\non", b"e\ntwo\n", (1, 1, 1.0)),  # the line that is cut is in neither
        (b"two\nx\non", b"x\non\n", (1, 0, 0.0)),
        (b"two\none", b"\none\n", (1, 1, 1.0)),  # cut between a line and its end
        (b"one\r", b"\none\r\n", (1, 1, 1.0)),
        (b"one\n", b"two\none", (2, 1, 0.5)),  # the last line of all may have no end
        (b"one two", b" three", (0, 0, 0.0)),  # no line ends at all
        (b"one\n", b"\n\n", (0, 0, 0.0)),
        (b"one", b"one\n", (0, 0, 0.0)),
    ],
)
def test_lines_in_both_splits(train, val, expected, chunk_size):
    assert shared_in(train, val) == pytest.approx(expected)


@settings(deadline=None)
@given(
    st.lists(st.sampled_from(["a", "b", "ab", "\n", "\n\n", ".\n", " ", "\r\n", "猫"]), min_size=2),
    st.data(),
)
def test_lines_are_those_of_the_text_whatever_the_tokens(words, data):
    """Tokens that end, begin or hold several line ends; the oracle splits the text itself."""
    tokens = [word.encode() for word in ["a", "b", "ab", "\n", "\n\n", ".\n", " ", "\r\n", "猫"]]
    ids = np.array([tokens.index(word.encode()) for word in words], np.uint32)
    cut = data.draw(st.integers(1, len(ids) - 1))
    before, after = (b"".join(tokens[i] for i in part) for part in (ids[:cut], ids[cut:]))
    known, lines, place = set(), [], 0
    for line in (before + after).split(b"\n"):
        if place + len(line) <= len(before) and place < len(before):
            known.add(line.strip())
        elif place >= len(before) and line.strip():
            lines.append(line.strip())
        place += len(line) + 1
    shared = [line for line in lines if line in known]
    found = shared_lines(ids[:cut], ids[cut:], tokens)
    assert (found.num_lines, found.num_shared) == (len(lines), len(shared))
    share = sum(map(len, shared)) / max(1, sum(map(len, lines)))
    assert found.share_of_bytes == pytest.approx(share)


def test_lines_in_tokens_of_cl100k_base():
    tokenizer = load_tokenizer("cl100k_base")
    train, val = (
        tokenizer.encode(text) for text in ("Yes.\n\nNo.\r\n你好\n", "No.\nyes.\n你好\n\n")
    )
    assert b".\n\n" in [tokenizer.tokens[i] for i in train]
    found = shared_lines(train, val, tokenizer.tokens)
    assert (found.num_lines, found.num_shared, found.share_of_bytes) == (3, 2, 9 / 13)


def test_long_lines_are_compared_by_their_beginning():
    long = b"abcdefgh" * (1 << 13)  # 64 KB
    assert shared_in(long + b"\n", long + b"\n" + long + b"X\n") == pytest.approx((2, 2, 1))
    assert shared_in(long + b"\n", long[1:] + b"\n") == (1, 0, 0)


def test_a_text_without_line_ends_is_not_held_in_memory():
    text = np.tile(np.arange(97, 123, dtype=np.uint16), 500_000)  # 13 million bytes
    tracemalloc.start()
    found = shared_lines(text, text, BYTES)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found.num_lines == 0
    assert most < 4e6


# Baselines


def plain_probabilities(train: list[int], vocab_size: int, a: float, b: float) -> list[list[float]]:
    """p(w | c) as [c][w], from the formula."""
    counts, pairs = Counter(train), Counter(pairwise(train))
    unigram = [(counts[w] + a / vocab_size) / (len(train) + a) for w in range(vocab_size)]
    assert sum(unigram) == pytest.approx(1)
    table = []
    for c in range(vocab_size):
        followed = sum(pairs[c, w] for w in range(vocab_size))
        row = [(pairs[c, w] + b * unigram[w]) / (followed + b) for w in range(vocab_size)]
        assert sum(row) == pytest.approx(1)
        table.append(row)
    return table


def plain_baselines(train: list[int], val: list[int], lengths: list[int]) -> tuple[float, float]:
    num_bytes = sum(lengths[w] for w in val[1:])
    places = list(pairwise(val))
    huge = 1e12  # of the unigram alone

    def bits(a: float, b: float) -> float:
        table = plain_probabilities(train, len(lengths), a, b)
        return -sum(math.log2(table[c][w]) for c, w in places) / num_bytes

    a = min(CONCENTRATIONS, key=lambda a: bits(a, huge))
    return bits(a, huge), min(bits(a, b) for b in CONCENTRATIONS)


@pytest.mark.parametrize("seed", range(4))
def test_baselines_are_those_of_the_formula(seed, chunk_size):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 5, 6)
    train, val = ((rng.zipf(1.5, n) % 6).astype(np.uint16) for n in (80, 30))
    expected = plain_baselines(train.tolist(), val.tolist(), lengths.tolist())
    assert frequency_baselines(train, val, lengths) == pytest.approx(expected, rel=1e-9)


def test_baselines_of_texts_with_known_entropy():
    rng = np.random.default_rng(0)
    fair = rng.integers(0, 4, 50_000).astype(np.uint16)  # two bits a token, and nothing to learn
    one_byte, two_bytes = np.ones(4, dtype=np.int64), np.full(4, 2)
    assert frequency_baselines(fair[:40_000], fair[40_000:], one_byte) == pytest.approx(
        (2, 2), abs=0.01
    )
    assert frequency_baselines(fair[:40_000], fair[40_000:], two_bytes) == pytest.approx(
        (1, 1), abs=0.01
    )
    in_turn = np.tile(np.arange(4), 5_000).astype(np.uint16)  # the last token says the next
    unigram, bigram = frequency_baselines(in_turn[:9_000], in_turn[9_000:], one_byte)
    assert unigram == pytest.approx(2, abs=1e-3)
    assert bigram < 1e-3


@pytest.mark.parametrize("vocab_size", [256, 1 << 16, (1 << 16) + 1, 200_000])
def test_pairs_of_a_large_vocabulary_are_told_apart(vocab_size):
    top = vocab_size - 1
    ids = np.array([top, top, 0, top, 1], np.uint16 if top < 1 << 16 else np.uint32)
    codes = [i * vocab_size + j for i, j in pairwise(ids.tolist())]
    assert pair_codes(ids[:-1], ids[1:], vocab_size).tolist() == codes
    lengths = np.ones(vocab_size, dtype=np.int64)
    unigram, bigram = frequency_baselines(np.tile(ids[2:4], 4000), ids[2:4], lengths)
    assert unigram == pytest.approx(1, abs=0.01)
    assert bigram < 0.01


def test_baselines_of_a_long_validation_text_are_measured_on_a_part_of_it(monkeypatch):
    rng = np.random.default_rng(0)
    tokens = (rng.zipf(1.3, 60_000) % 50).astype(np.uint16)
    lengths = rng.integers(1, 5, 50)
    whole = frequency_baselines(tokens[:30_000], tokens[30_000:], lengths)
    monkeypatch.setattr(ngrams, "MAX_TARGETS", 10_000)
    part = frequency_baselines(tokens[:30_000], tokens[30_000:], lengths)
    assert part != whole
    assert part == pytest.approx(whole, rel=0.02)


# Copies


def plain_copies(written: list[list[int]], train: list[int], run: int) -> int:
    copied = 0
    for ids in written:
        marks = set()
        for i in range(len(ids) - run + 1):
            if any(train[j : j + run] == ids[i : i + run] for j in range(len(train))):
                marks |= set(range(i, i + run))
        copied += len(marks)
    return copied


def test_copied_tokens_are_counted(chunk_size):
    train = np.arange(100, dtype=np.uint16)
    twenty = list(range(40, 60))
    assert copied_tokens([twenty], train, 20) == 20
    assert copied_tokens([twenty[:19]], train, 20) == 0
    assert copied_tokens([[7, *twenty, 7], [7, 7]], train, 20) == 20
    assert copied_tokens([list(range(40, 72))], train, 20) == 32  # one long run, counted once
    assert copied_tokens([[*twenty[:10], 7, *twenty[10:]]], train, 20) == 0
    assert copied_tokens([list(range(19, -1, -1))], train, 20) == 0
    assert copied_tokens([list(range(80, 100)), list(range(20))], train, 20) == 40  # both ends
    assert copied_tokens([list(range(81, 101))], train, 20) == 0
    assert copied_tokens([], train, 20) == copied_tokens([[]], train, 20) == 0
    assert copied_tokens([twenty], train[:5], 20) == 0  # less text than a run


def test_tokens_that_differ_above_16_bits_are_no_copy():
    train = np.arange(1 << 16, (1 << 16) + 50, dtype=np.uint32)
    assert copied_tokens([list(range(30))], train, 20) == 0
    assert copied_tokens([train[10:40].tolist()], train, 20) == 30


@settings(deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 2), max_size=12), max_size=3),
    st.lists(st.integers(0, 2), min_size=1, max_size=60),
    st.integers(1, 5),
)
def test_copies_are_those_of_the_plain_search(written, train, run):
    found = copied_tokens(written, np.array(train, np.uint16), run)
    assert found == plain_copies(written, train, run)


# What is kept


def test_what_was_computed_of_a_corpus_is_kept_with_it(tmp_path):
    (tmp_path / "text.txt").write_text("some text\n" * 9, encoding="utf-8")

    def corpus():
        text = TextFiles(str(tmp_path / "text.txt"), cache=str(tmp_path / "c"))
        return load_corpus(text, Vocabulary("bytes"))

    calls = []
    for _ in range(2):
        assert corpus().remember("sum", lambda: calls.append(1) or [1, 2.5]) == [1, 2.5]
    assert calls == [1]
    assert corpus().remember("other", lambda: [3]) == [3]
    (corpus().folder / "sum.json").write_text("[1, 2", encoding="utf-8")  # damaged
    assert corpus().remember("sum", lambda: [4]) == [4]
    assert corpus().remember("sum", lambda: [5]) == [4]
    (tmp_path / "text.txt").write_text("other text\n" * 9, encoding="utf-8")
    assert corpus().remember("sum", lambda: [6]) == [6]
    assert {p.name for p in corpus().folder.iterdir()} == {"meta.json", "tokens.bin", "sum.json"}
