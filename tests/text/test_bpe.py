"""Vocabularies of one's own: trained on the training split alone, or read from a .tiktoken file."""

import random
import re
import shutil
import sys
from collections import Counter
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_gpt.errors import UserError
from lit_gpt.text import bpe
from lit_gpt.text.bpe import PATTERN, load_trainer
from lit_gpt.text.token_file import split_at
from lit_gpt.text.tokenizer import Tokenizer
from lit_gpt.text.vocabularies import Vocabulary, bpe_size, load_tokenizer, parse_vocabulary
from tests.text.conftest import text_of, unix

ROOT = Path(__file__).parents[2]
ENGLISH = (ROOT / "LICENSE").read_text(encoding="utf-8")
CHINESE = (ROOT / "data" / "订单商品名称.csv").read_text(encoding="utf-8")[:20_000]
BYTES = [bytes([byte]) for byte in range(256)]
any_text = st.text() | st.text(alphabet="hello world's 123,.\r\n农夫山泉é👩\u200d\u0301\ufeff\0")
quick = settings(max_examples=100, deadline=None)


def train_bpe(texts, size: int) -> Tokenizer:
    return load_trainer(size)(texts)


trained = cache(lambda size: train_bpe([ENGLISH, CHINESE], size))


def plain_bpe(text: str, size: int) -> list[bytes]:
    """Byte-pair encoding by the book: counts all pairs anew for each merge."""
    words = Counter(tuple(piece.encode()) for piece in regex.findall(PATTERN, text))
    tokens = list(BYTES)
    while len(tokens) < size:
        pairs = Counter()
        for word, times in words.items():
            for pair in pairwise(word):
                pairs[pair] += times
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        words = Counter({tuple(merged(word, best, len(tokens))): n for word, n in words.items()})
        tokens.append(tokens[best[0]] + tokens[best[1]])
    return tokens


def merged(word: tuple[int, ...], pair: tuple[int, int], new: int) -> list[int]:
    out, rest = [], list(word)
    while rest:
        if tuple(rest[:2]) == pair:
            out.append(new)
            del rest[:2]
        else:
            out.append(rest.pop(0))
    return out


def file_of(tokens: list[bytes]) -> bytes:
    return Tokenizer("any", PATTERN, tokens).to_dict()["vocabulary"].encode()


FILE = file_of([*BYTES, b"th", b"he", b"the"])
LINES = FILE.splitlines(keepends=True)


# Training


@pytest.mark.parametrize("text", [ENGLISH, CHINESE, "aaaa aaa aa " * 9 + "ab" * 50], ids="eca")
def test_merges_are_those_of_the_plain_algorithm_ties_included(text):
    assert train_bpe([text], 400).tokens == plain_bpe(text, 400)


def test_the_same_text_gives_the_same_vocabulary_however_it_is_handed_over():
    text = "\n".join(random.Random(0).sample(ENGLISH.split() * 20, 3000))
    whole = train_bpe([text], 700).tokens
    lines = train_bpe((line for line in text.splitlines(keepends=True)), 700).tokens
    assert whole == train_bpe([text], 700).tokens
    assert whole[:300] == train_bpe([text], 300).tokens  # merges come in the order of their rank
    # A line end alone is a piece, as is one after a word: no word is cut.
    assert lines == whole


@pytest.mark.parametrize("size", [256, 257, 1000])
def test_size_is_exact_and_every_merge_is_made_of_earlier_tokens(size):
    tokens = trained(size).tokens
    assert len(tokens) == len(set(tokens)) == size
    assert tokens[:256] == BYTES
    for i, token in enumerate(tokens[256:], 256):
        earlier = set(tokens[:i])
        assert any(token[:k] in earlier and token[k:] in earlier for k in range(1, len(token)))


def test_there_are_fewer_tokens_where_the_text_has_no_more_pairs():
    assert train_bpe(["hello hello"], 1000).tokens == plain_bpe("hello hello", 1000)
    assert train_bpe(["hello hello"], 1000).vocab_size == 261  # el hel lo hello, " hello"
    assert train_bpe([], 1000).tokens == BYTES


@quick
@given(text=any_text)
def test_any_text_is_kept_and_split_alike_by_splintr_and_tiktoken(text):
    tokenizer = trained(1000)
    ids = tokenizer.encode(text)
    assert tokenizer.fast
    assert tokenizer.decode(ids) == text
    assert ids.tolist() == tokenizer.encoding.encode_ordinary(text)


def test_frequent_words_are_one_token():
    tokenizer = train_bpe([ENGLISH], 600)
    ids = tokenizer.encode(" the Software")
    assert [tokenizer.tokens[i] for i in ids] == [b" the", b" Software"]


def test_a_million_blanks_in_a_row_are_no_panic():
    text = " " * 2_000_000
    assert b" " * 8 in train_bpe(bpe.training_text([text], len(text)), 262).tokens


# What it is trained on


@pytest.mark.parametrize("num_bytes", [0, 1, 5, 6, 7, 8, 99])
def test_training_text_is_the_first_bytes_without_half_a_character(num_bytes):
    texts = ["hello", "农夫", "山泉"]
    expected = "".join(texts).encode()[:num_bytes].decode("utf-8", "ignore")
    assert "".join(bpe.training_text(texts, num_bytes)) == expected


def test_of_a_long_text_parts_are_taken_evenly_and_in_pieces():
    texts = [letter * (bpe.PIECE + 1) for letter in "abcdefgh"]
    pieces = list(bpe.training_text(texts, 3 * bpe.SAMPLE))
    assert [(piece[0], len(piece)) for piece in pieces] == [
        (letter, size) for letter in "adg" for size in (bpe.PIECE, 1)
    ]


@pytest.fixture
def trained_on(monkeypatch) -> list[str]:
    """The texts that vocabularies were trained on, in turn."""
    seen = []

    def remember(size, has_end):
        def train(texts):
            seen.append("".join(texts := list(texts)))
            return load_trainer(size, has_end)(texts)

        return train

    monkeypatch.setattr(bpe, "load_trainer", remember)
    return seen


@pytest.mark.parametrize("fraction", [0.3, 0.9])
@pytest.mark.parametrize("kind", ["even", "longer tokens last", "shorter tokens last"])
def test_no_byte_of_the_validation_split_is_trained_on(kind, fraction, load, tmp_path, trained_on):
    rng = random.Random(0)
    dense = "".join(chr(rng.randrange(0x4E00, 0x9000)) for _ in range(4000))
    parts = {"even": [ENGLISH] * 9, "longer tokens last": [dense, *[ENGLISH] * 9]}
    parts["shorter tokens last"] = parts["longer tokens last"][::-1]
    (tmp_path / "x.txt").write_text("".join(parts[kind]), encoding="utf-8")
    corpus = load(tmp_path / "x.txt", "bpe:500", fraction=fraction)
    text = text_of(corpus)
    split = corpus.tokens[: split_at(len(corpus.tokens), fraction)]
    train_split = corpus.tokenizer.decode_bytes(split.tolist())
    assert text == "".join(parts[kind])
    assert train_split.startswith(trained_on[-1].encode())
    assert len(trained_on[-1].encode()) > {"even": 0.9}.get(kind, 0.5) * len(train_split)
    if fraction == 0.9:  # where tokens get longer, the first guess reached too far
        assert (len(trained_on) > 1) == (kind == "longer tokens last")
    assert corpus.info.num_characters == len(text)


def test_byte_order_marks_and_ends_of_files_are_counted_once(load, tmp_path):
    for name in "ab":
        (tmp_path / "texts").mkdir(exist_ok=True)
        (tmp_path / "texts" / name).write_text("\ufeffone", encoding="utf-8")
    info = load(tmp_path / "texts", "bpe:300").info
    assert (info.removed_boms, info.file_ends, info.num_characters) == (2, 1, 6)


# The cache


def test_cached_by_text_size_and_fraction_and_kept_whole(load, tmp_path, monkeypatch):
    path = tmp_path / "x.txt"
    path.write_text(ENGLISH, encoding="utf-8")
    first = load(path, "bpe:400")
    assert (first.tokenizer.name, first.tokenizer.vocab_size) == ("bpe:400", 400)
    assert first.tokenizer.end_of_text == 399
    assert first.tokenizer.tokens[:399] == load(path, "bpe:401").tokenizer.tokens[:399]
    assert load(path, "bpe:401").tokenizer.vocab_size == 401
    half = load(path, "bpe:400", fraction=0.5)
    assert half.tokenizer.tokens != first.tokenizer.tokens
    monkeypatch.setitem(sys.modules, "rustbpe", None)  # no training from here on
    assert load(path, "bpe:400", compact=False).folder == first.folder
    assert load(path, "bpe:400", fraction=0.5).folder == half.folder


def test_without_rustbpe_one_line_says_what_to_install(load, tmp_path, monkeypatch):
    path = tmp_path / "x.txt"
    path.write_text(ENGLISH, encoding="utf-8")
    monkeypatch.setitem(sys.modules, "rustbpe", None)
    with pytest.raises(UserError) as error:
        load(path, "bpe:400")
    assert str(error.value) == (
        "tokenizer 'bpe:400': needs the package rustbpe; install it: pip install rustbpe"
    )
    assert not (tmp_path / "cache").exists()


def test_text_that_changes_while_it_is_trained_on_leaves_nothing(load, tmp_path, monkeypatch):
    path = tmp_path / "x.txt"
    path.write_text(ENGLISH, encoding="utf-8")

    def change_and_train(size, has_end):
        path.write_text(ENGLISH + "more", encoding="utf-8")
        return load_trainer(size, has_end)

    monkeypatch.setattr(bpe, "load_trainer", change_and_train)
    with pytest.raises(UserError, match=r"x\.txt changed while it was being read; start again"):
        load(path, "bpe:400")
    assert list((tmp_path / "cache").iterdir()) == []


# Names and files


@pytest.mark.parametrize(
    ("name", "size"),
    [("bpe:256", 256), ("bpe:04096", 4096), ("bpe:1048576", 1 << 20), ("bytes", None), ("", None)],
)
def test_names_of_vocabularies_to_train(name, size):
    assert bpe_size(name) == size


@pytest.mark.parametrize(
    "size", ["", ":", ":255", ":-300", ":1e3", ":4_096", ":٤٠٩٦", ":1048577", ":" + "9" * 5000]
)
def test_sizes_that_are_none(size):
    with pytest.raises(UserError, match=r"from 256 \(bytes and end of text\) to 1,048,.* bpe:4096"):
        bpe_size(f"bpe{size}")


def test_the_end_of_text_is_one_of_n():
    with pytest.raises(UserError, match=r"from 257 \(bytes and end of text\) to 1,048,576"):
        Vocabulary("bpe:256")
    assert Vocabulary("bpe:257").full_size() == 257
    assert Vocabulary("bpe:256", ends_files=False).full_size() == 256  # as earlier releases did
    tokenizer = load_trainer(257, has_end=True)(["ab " * 9])
    assert (tokenizer.vocab_size, tokenizer.end_of_text) == (257, 256)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "has no token for 256 of the 256 bytes, the first 0x00"),
        (b"\n\r\n", "has no token for 256 of the 256 bytes, the first 0x00"),
        (b"".join(LINES[:255]), "has no token for 1 of the 256 bytes, the first 0xff"),
        (b"hello\n", "line 1 must be a new token in base64, a space and 0"),
        (b"\xef\xbb\xbf" + FILE, "line 1 must be"),
        (b"\x80\x02}q\0", "line 1 must be"),
        (FILE + b"aGU\n", "line 260 must be a new token in base64, a space and 259"),
        (FILE + b"aGVs\n", "line 260 must be"),
        (FILE + b"aGVs 259 1\n", "line 260 must be"),
        (FILE + b"aGVs x\n", "line 260 must be"),
        (FILE + b"= 259\n", "line 260 must be"),
        (FILE + b"aGVs 260\n", "line 260 must be"),
        (FILE + b"\naGVs -1\n", "line 261 must be a new token in base64, a space and 259"),
        (FILE + b"aGU= 259\n", "line 260 must be"),
        (b"".join(reversed(LINES)), "line 1 must be"),
    ],
)
def test_file_that_is_no_vocabulary(content, problem):
    with pytest.raises(UserError, match=f"^tokenizer 'v.tiktoken': {re.escape(problem)}"):
        parse_vocabulary(content, "v.tiktoken")


@unix
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("none.tiktoken", "No such file or directory"),
        ("x.txt/a.tiktoken", "Not a directory"),
        ("folder.tiktoken", "Is a directory"),
        ("nul\0.tiktoken", "embedded null byte"),
        ("~nobody-at-all/x.tiktoken", "Could not determine home directory."),
    ],
)
def test_file_that_cant_be_read(name, reason, load, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.txt").touch()
    (tmp_path / "folder.tiktoken").mkdir()
    with pytest.raises(UserError) as error:
        load(tmp_path / "x.txt", name)
    assert str(error.value) == f"tokenizer {name!r}: cannot be read: {reason}"


def test_file_is_read_as_tiktoken_reads_it(tmp_path, monkeypatch):
    from tiktoken.load import load_tiktoken_bpe

    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "v.tiktoken").write_bytes(FILE.replace(b"\n", b"\r\n") + b"\r\n")
    tokenizer = Vocabulary("~/v.tiktoken").load()
    assert tokenizer.ranks == load_tiktoken_bpe(str(tmp_path / "v.tiktoken"))
    assert tokenizer.encode("the th").tolist() == [258, 0x20, 256]


def test_the_file_of_cl100k_base_splits_as_cl100k_base(load, tmp_path):
    full = load_tokenizer("cl100k_base")
    (tmp_path / "v.tiktoken").write_bytes(file_of(full.tokens))
    (tmp_path / "x.txt").write_text(ENGLISH + CHINESE, encoding="utf-8")
    own = load(tmp_path / "x.txt", tmp_path / "v.tiktoken")
    named = load(tmp_path / "x.txt", "cl100k_base")
    assert own.tokenizer.tokens == named.tokenizer.tokens  # compact, both
    assert np.array_equal(own.tokens, named.tokens)
    assert own.folder != named.folder


def test_a_file_is_cached_by_its_content_not_its_name(load, tmp_path):
    path, vocabulary = tmp_path / "x.txt", tmp_path / "v.tiktoken"
    path.write_text(ENGLISH, encoding="utf-8")
    vocabulary.write_bytes(FILE)
    first = load(path, vocabulary)
    moved = shutil.move(vocabulary, tmp_path / "w.tiktoken")
    assert load(path, moved).folder == first.folder
    vocabulary.write_bytes(b"".join(LINES[:-1]))
    other = load(path, vocabulary)
    assert (first.tokenizer.vocab_size, other.tokenizer.vocab_size) == (260, 259)


# The training command


def vocabulary_line(out: str) -> str:
    return next(line for line in out.splitlines() if line.startswith("Vocabulary: "))


def test_train_continue_and_write_with_a_trained_vocabulary(train, tmp_path, monkeypatch, capfd):
    result = train(**{"data.tokenizer": "bpe:300"})
    assert (result.status, result.err) == (0, "")
    assert vocabulary_line(result.out) == "Vocabulary: 300 tokens (bpe:300)"
    (last,) = tmp_path.glob("logs/*/checkpoints/last.ckpt")
    shutil.rmtree(tmp_path / "cache")  # the vocabulary is trained again, and is the same
    options = {"data.tokenizer": "bpe:300", "ckpt_path": last, "trainer.max_steps": 8}
    assert train(**options).evaluated == [8]
    refused = train(**options | {"data.tokenizer": "bpe:301", "trainer.max_steps": 9})
    assert refused.status == 2
    assert "vocab_size was 300 and is now 301, tokenizer was bpe:300 and is now" in refused.err
    refused = train(**options | {"data.train_fraction": 0.5, "trainer.max_steps": 9})
    assert "train_fraction was 0.9 and is now 0.5" in refused.err
    # generate.py needs nothing but the checkpoint.
    shutil.rmtree(tmp_path / "cache")
    monkeypatch.setitem(sys.modules, "rustbpe", None)
    from lit_gpt.checkpoint import load_checkpoint

    model, tokenizer = load_checkpoint(last)
    assert (tokenizer.name, tokenizer.vocab_size, model.config.vocab_size) == ("bpe:300", 300, 300)


def test_vocabulary_line_says_so_where_the_text_has_too_few_pairs(train):
    out = train(**{"data.tokenizer": "bpe:5000", "trainer.max_steps": 1}).out
    pattern = r"Vocabulary: \d{3} tokens \(bpe:5000, and the text has no more pairs to merge\)"
    assert re.fullmatch(pattern, vocabulary_line(out))


@unix
def test_train_and_continue_with_a_file_that_moved(train, tmp_path):
    (tmp_path / "v.tiktoken").write_bytes(FILE)
    result = train(**{"data.tokenizer": tmp_path / "v.tiktoken"})
    assert vocabulary_line(result.out) == (
        f"Vocabulary: 259 tokens ({tmp_path}/v.tiktoken, compact)"  # no "he" outside "the"
    )
    (last,) = tmp_path.glob("logs/*/checkpoints/last.ckpt")
    moved = shutil.move(tmp_path / "v.tiktoken", tmp_path / "w.tiktoken")
    options = {"ckpt_path": last, "trainer.max_steps": 8}
    assert train(**options, **{"data.tokenizer": moved}).evaluated == [8]
    gone = train(**options, **{"data.tokenizer": tmp_path / "v.tiktoken"})
    assert (gone.status, gone.err) == (
        2,
        f"error: --data.tokenizer '{tmp_path}/v.tiktoken': cannot be read: No such file or "
        "directory\n",
    )


@pytest.mark.parametrize("name", ["bpe:255", "bpe:many"])
def test_bad_sizes_are_one_line_and_leave_nothing(name, train, tmp_path):
    result = train(**{"data.tokenizer": name})
    assert result.status == 2
    assert re.fullmatch(rf"error: --data\.tokenizer '{name}': the number .*\n", result.err)
    assert not (tmp_path / "cache").exists()
    assert not (tmp_path / "logs").exists()


@unix
def test_a_file_that_is_damaged_leaves_nothing(train, tmp_path):
    (tmp_path / "v.tiktoken").write_bytes(FILE[:-3])
    result = train(**{"data.tokenizer": tmp_path / "v.tiktoken"})
    assert (result.status, result.err) == (
        2,
        f"error: --data.tokenizer '{tmp_path}/v.tiktoken': line 259 must be a new token in "
        "base64, a space and 258\n",
    )
    assert not (tmp_path / "cache").exists()
