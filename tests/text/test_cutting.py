"""Text of any length in parts: the tokens of the whole, in bounded memory and linear time."""

import random
import tracemalloc
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_gpt.text import cutting
from lit_gpt.text.cutting import cut_safely
from lit_gpt.text.tokenizer import Tokenizer
from lit_gpt.text.vocabularies import PATTERN
from tests.text.conftest import load_once, write

GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
SPACES = r" *[^ ]+| +"  # as SentencePiece splits text: punctuation belongs to the word
CHARACTERS = "ab S1٣é农夫.,'’!，\r\n\t\x1c\u3000\u0301_ªⅧ²👩\u200d+/="
WORDS = ["it", "'s", "'LL", "don", "'t", " the", "农夫", "1234", ", ", ". ", "  ", "\r\n", "\ufeff"]


def tokenizer_with(pattern: str) -> Tokenizer:
    return Tokenizer("test", pattern, load_once("cl100k_base").tokens)


TOKENIZERS = {
    "cl100k": lambda: load_once("cl100k_base"),
    "o200k": lambda: load_once("o200k_base"),
    "GPT-2": lambda: tokenizer_with(GPT2),
    "spaces": lambda: tokenizer_with(SPACES),
}
tokenizers: dict[str, Tokenizer] = {}


def check(name: str, texts: list[str]) -> list[str]:
    """The parts, which must encode to the tokens of the whole."""
    if name not in tokenizers:
        tokenizers[name] = TOKENIZERS[name]()
    tokenizer = tokenizers[name]
    cuts: Counter[str] = Counter()
    parts = list(cut_safely(texts, tokenizer.pattern, cuts))
    assert "".join(parts) == "".join(texts)
    if not cuts:
        piecewise = [i for part in parts for i in tokenizer.encode(part)]
        assert piecewise == tokenizer.encode("".join(texts)).tolist()
    return parts


@pytest.fixture
def short(monkeypatch):
    """As if a thousandth of the usual lengths were many."""
    monkeypatch.setattr(cutting, "CHUNK", 1000)
    monkeypatch.setattr(cutting, "LONGEST", 500)


@pytest.mark.parametrize(
    ("texts", "parts"),
    [
        (["hello world, again"], ["hello world", ", again"]),
        (["hel", "lo wor", "ld."], ["hello", " world", "."]),
        (["it's"], ["it's"]),
        (["a_b c-d"], ["a_b c", "-d"]),
        (["农夫，山泉。"], ["农夫，山泉", "。"]),
        (["...", "  ", "\n"], ["...  \n"]),
        (["a. b", None, "c", None, None], ["a.", " b", None, "c", None, None]),
        ([], []),
    ],
)
def test_text_is_cut_after_a_letter_or_digit(texts, parts):
    found = list(cut_safely(texts, PATTERN))
    assert "".join(map(str, found)) == "".join(map(str, parts))
    assert len(found) == len(parts)


@pytest.mark.parametrize("name", TOKENIZERS)
@given(texts=st.lists(st.text() | st.text(alphabet=CHARACTERS) | st.sampled_from(WORDS)))
@settings(max_examples=100, deadline=None)
def test_parts_encode_to_the_tokens_of_the_whole(name, texts):
    check(name, texts)


UNCUTTABLE = {  # no letter or digit is followed by white space or punctuation
    "digits": "0123456789",
    "hexadecimal digits": "0123456789abcdef",
    "letters, symbols and digits": "aB中٣€😀é1",
    "symbols and line ends": "€+😀\n",
    "Hindi": "कि1ी9",
    "apostrophes": "ab'’s",
}


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("alphabet", UNCUTTABLE)
def test_text_without_a_safe_cut_is_cut_between_words(alphabet, name, short):
    rng = random.Random(0)
    text = "".join(rng.choices(UNCUTTABLE[alphabet], k=10_000))
    for size in (10_000, 999, 70):  # as it comes
        parts = check(name, [text[i : i + size] for i in range(0, len(text), size)])
        assert max(map(len, parts)) <= 1500
        if name != "spaces":
            assert len(parts) >= 7


@pytest.mark.parametrize("name", ["cl100k", "GPT-2", "spaces"])
def test_text_with_spaces_is_cut_whatever_the_pattern(name, short):
    text = "the cat, which sat.\nOn a mat\n\n  农夫 " * 300
    parts = check(name, [text])
    assert len(parts) >= 9


@pytest.mark.parametrize("piece", ["x", " ", "\n", "=", "😀"])
def test_a_word_without_end_is_cut_and_counted(piece, short):
    cuts: Counter[str] = Counter()
    parts = list(cut_safely(["a b " + piece * 5000 + " c d"], PATTERN, cuts))
    assert "".join(parts) == "a b " + piece * 5000 + " c d"
    assert max(map(len, parts)) <= 1500
    assert cuts["words"] in (9, 10)


def test_cut_words_are_part_of_what_is_known(load, tmp_path, short):
    corpus = load(write(tmp_path / "x.txt", b"x" * 1500 + b" y"), "cl100k_base")
    assert corpus.info.cut_words == 1
    assert load(write(tmp_path / "y.txt", b"word " * 500), "cl100k_base").info.cut_words == 0


@pytest.mark.parametrize("piece", ["x", "=", "01234567", "word, "])
def test_memory_does_not_grow_with_the_line(piece, short):
    peaks = []
    chunk = piece * (10_000 // len(piece))
    for chunks in (4, 40):
        tracemalloc.start()
        assert sum(map(len, cut_safely([chunk] * chunks, PATTERN))) == len(chunk) * chunks
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 50_000


def test_each_character_is_looked_at_a_bounded_number_of_times(monkeypatch):
    """Counted, not timed: earlier, the last cut was searched in all that was left, again."""
    looked_at = []

    class Counting:
        def match(self, text: str, start: int) -> None:
            looked_at.append(len(text) - start)

    monkeypatch.setattr(cutting, "LAST_CUT", Counting())
    list(cut_safely(["=" * (1 << 20)] * 20, PATTERN))
    assert sum(looked_at) <= 21 * (1 << 20)
