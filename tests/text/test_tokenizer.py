"""Text <-> ids: the offline vocabularies, the compact one's two properties, and valid UTF-8."""

import hashlib
import json
import random
import re
import socket
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
import splintr
from hypothesis import given, settings
from hypothesis import strategies as st
from tiktoken_ext import openai_public

from lit_gpt.errors import UserError
from lit_gpt.text.tokenizer import Tokenizer
from lit_gpt.text.utf8 import unfinished_bytes
from lit_gpt.text.vocabularies import load_tokenizer

ROOT = Path(__file__).parents[2]
KNOWN = "bytes, cl100k_base, gpt2, o200k_base"  # how the list of the known names begins
MIXED = "<|endoftext|> It's 1234567 °C…\r\n\r\n  农夫山泉 天然水 550ml*24瓶\té 👩‍👩‍👧 한국어 عربي\n"
TEXTS = {
    "Chinese": (ROOT / "data" / "订单商品名称.csv").read_bytes().decode(),
    "English": (ROOT / "LICENSE").read_bytes().decode(),
    "mixed": MIXED,
}

load_once = cache(load_tokenizer)
any_text = st.text() | st.text(alphabet="hello world's 123,.\r\n农夫山泉水é👩\u200d\u0301\ufeff\0")
quick = settings(max_examples=100, deadline=None)


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("no network in this test")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@cache
def compact_of(text: str, name: str = "cl100k_base") -> Tokenizer:
    full = load_once(name)
    return full.compact(full.encode(text))[0]


def split(tokenizer: Tokenizer, text: str) -> list[bytes]:
    """The bytes of each token of the text."""
    return [tokenizer.tokens[i] for i in tokenizer.encode(text)]


# The vocabularies


@pytest.mark.parametrize(
    ("name", "size", "sha256"),
    [("cl100k_base", 100_256, "223921b76ee9"), ("o200k_base", 199_998, "446a9538cb6c")],
)
def test_offline_vocabulary_is_the_one_tiktoken_pins(name, size, sha256, no_network, monkeypatch):
    tokenizer = load_tokenizer(name)
    # Instead of downloading the vocabulary, hand back the hash that tiktoken would check.
    monkeypatch.setattr(
        openai_public, "load_tiktoken_bpe", lambda url, expected_hash: expected_hash
    )
    pinned = getattr(openai_public, name)()
    assert tokenizer.vocab_size == size
    assert tokenizer.pattern == pinned["pat_str"]
    file = tokenizer.to_dict()["vocabulary"].encode()
    assert hashlib.sha256(file).hexdigest() == pinned["mergeable_ranks"]
    assert pinned["mergeable_ranks"].startswith(sha256)


@pytest.mark.parametrize(
    ("name", "text", "ids"),
    [
        ("cl100k_base", "hello world", [15339, 1917]),
        ("cl100k_base", "农夫", [13828, 250, 8192, 104]),
        ("cl100k_base", "I'm 1234567", [40, 2846, 220, 4513, 10961, 22]),
        ("cl100k_base", "<|endoftext|>", [27, 91, 8862, 728, 428, 91, 29]),
        ("o200k_base", "hello world", [24912, 2375]),
        ("o200k_base", "I'm 1234567", [15390, 220, 7633, 19354, 22]),
        ("o200k_base", "<|endoftext|>", [27, 91, 419, 1440, 919, 91, 29]),
        ("bytes", "hé农", [0x68, 0xC3, 0xA9, 0xE5, 0x86, 0x9C]),
        ("bytes", "", []),
        ("cl100k_base", "", []),
    ],
)
def test_known_ids(name, text, ids):
    tokenizer = load_once(name)
    assert tokenizer.encode(text).tolist() == ids
    assert tokenizer.decode(ids) == text


def test_bytes_tokenizer_has_one_token_for_each_byte():
    assert load_once("bytes").tokens == [bytes([i]) for i in range(256)]


@pytest.mark.parametrize(
    "changed",
    [{5000: b"not a token"}, {5000: b"the"}, {0: b"byte 33 lost"}, {100_255: b""}],
    ids=["other bytes", "a token twice", "a byte lost", "an empty token"],
)
def test_tampered_vocabulary_is_refused(changed, monkeypatch):
    source = splintr.Tokenizer.from_pretrained("cl100k_base")

    class Tampered:
        from_pretrained = staticmethod(lambda name: Tampered())
        decode_bytes = staticmethod(lambda ids: changed.get(ids[0], source.decode_bytes(ids)))

    monkeypatch.setattr(splintr, "Tokenizer", Tampered)
    with pytest.raises(
        UserError, match=r"'cl100k_base': .* another vocabulary than tiktoken .*not 223921b76ee9"
    ):
        load_tokenizer("cl100k_base")


@pytest.mark.parametrize("name", ["cl100k", "GPT2", ""])
def test_unknown_name_is_answered_with_the_known_ones(name):
    expected = f"tokenizer {name!r}: unknown tokenizer; use one of {KNOWN}, "
    with pytest.raises(UserError, match=re.escape(expected)):
        load_tokenizer(name)


def test_vocabulary_that_needs_a_download_without_network(no_network, monkeypatch, tmp_path):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    with pytest.raises(UserError) as error:
        load_tokenizer("r50k_base")
    assert str(error.value) == (
        "tokenizer 'r50k_base': tiktoken could not download this vocabulary (ConnectionError); use "
        "cl100k_base or o200k_base, which need no network, or point TIKTOKEN_CACHE_DIR at a "
        "folder that holds it"
    )


# The compact vocabulary


def test_compact_vocabulary_holds_the_bytes_the_used_tokens_and_the_merges_to_them():
    compact, new_ids = load_once("cl100k_base").compact([15339, 1917])
    assert sorted(compact.tokens[:256]) == [bytes([i]) for i in range(256)]
    assert b" ".join(compact.tokens[256:]) == b"or  w el lo ld orld  world ello hello"
    assert new_ids[[0, 15339, 1917]].tolist() == [0, 264, 262]
    assert (new_ids >= 0).sum() == compact.vocab_size == 265


@pytest.mark.parametrize("name", ["cl100k_base", "o200k_base", "bytes"])
@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_compact_vocabulary_splits_its_corpus_into_exactly_the_same_tokens(name, text):
    full = load_once(name)
    ids = full.encode(text)
    compact, new_ids = full.compact(np.unique(ids))
    assert split(compact, text) == split(full, text)
    assert compact.encode(text).tolist() == new_ids[ids].tolist()
    assert compact.decode(compact.encode(text)) == text


@quick
@given(text=any_text)
def test_compact_vocabulary_of_any_text_splits_it_into_the_same_tokens(text):
    assert split(compact_of(text), text) == split(load_once("cl100k_base"), text)


@pytest.mark.parametrize("name", ["cl100k_base", "o200k_base", "bytes"])
@given(text=any_text)
@quick
def test_compact_vocabulary_of_another_corpus_keeps_any_text_without_loss(name, text):
    compact = compact_of("hello world", name)
    ids = compact.encode(text)
    assert ids.max(initial=0) < compact.vocab_size
    assert compact.decode(ids) == text


def test_token_lengths_are_utf8_bytes():
    compact = compact_of(MIXED)
    assert compact.token_lengths()[compact.encode(MIXED)].sum() == len(MIXED.encode())


# splintr, which encodes corpora


@given(text=any_text)
@quick
def test_splintr_splits_any_text_as_tiktoken_does(text):
    full = load_once("cl100k_base")
    assert full.fast
    assert full.encode(text).tolist() == full.encoding.encode_ordinary(text)


@pytest.mark.parametrize("name", ["cl100k_base", "o200k_base", "bytes"])
def test_parts_are_encoded_one_after_the_other(name):
    tokenizer, parts = load_once(name), [*TEXTS.values(), "", "a"]
    each = np.concatenate([tokenizer.encode(text) for text in parts])
    assert tokenizer.encode_parts(parts).tolist() == each.tolist()


@pytest.mark.slow
def test_splintr_splits_a_hundred_thousand_odd_texts_as_tiktoken_does():
    """Mixes of contractions, blanks, scripts, emoji, combining marks and any code point."""
    full, rng = load_once("cl100k_base"), random.Random(1337)
    pools = [
        [*"abc XYZ'sStT re ll ve'\n\r\t  123,.;!?()", "<|endoftext|>", "<|fim_prefix|>"],
        "汉字，。农夫山泉 500ml*24瓶\n",
        " \n\r\t\u3000\u00a0\u2028\x0b\x85\u200b\ufeff",
        "ſKİıßǅǈÅ'ſ'K'S'ſt",
        *(
            "".join(map(chr, range(*ends)))
            for ends in [(128, 1536), (2304, 4608), (127744, 128512)]
        ),
        "".join(map(chr, rng.choices([*range(0xD800), *range(0xE000, 0x110000)], k=20_000))),
    ]
    for _ in range(100_000):
        chosen = rng.sample(pools, rng.randint(1, 3))
        size = rng.choice([1, 2, 3, 5, 10, 30, 100, 1000])
        text = "".join(rng.choice(rng.choice(chosen)) for _ in range(size))
        if rng.random() < 0.2:
            text = text.replace(text[0], text[0] * rng.randint(2, 50))
        assert full.encode(text).tolist() == full.encoding.encode_ordinary(text), ascii(text)


# As plain data


@pytest.mark.parametrize("load", [load_once, partial(compact_of, MIXED)], ids=["full", "compact"])
@pytest.mark.parametrize("name", ["cl100k_base", "bytes"])
def test_plain_strings_make_the_tokenizer_again(name, load):
    tokenizer = load(name)
    again = Tokenizer.from_dict(json.loads(json.dumps(tokenizer.to_dict())))
    assert again == tokenizer
    assert again.tokens == tokenizer.tokens
    assert again.encode(MIXED).tolist() == tokenizer.encode(MIXED).tolist()


def test_tokenizers_with_other_tokens_differ():
    assert compact_of("hello") != compact_of("hello world")


# Valid UTF-8


@pytest.mark.parametrize(
    ("text", "unfinished"),
    [
        (b"", b""),
        ("农".encode(), b""),
        (b"a\xe5\x86", b"\xe5\x86"),
        (b"\xf0\x9f\x98", b"\xf0\x9f\x98"),
        (b"\xe5a", None),
        (b"\x86", None),
        (b"\xc0", None),  # would be an overlong form
        (b"\xed\xa0", None),  # would be a surrogate
        (b"\xf5", None),  # would be beyond U+10FFFF
    ],
)
def test_unfinished_bytes_are_those_of_the_character_begun_at_the_end(text, unfinished):
    assert unfinished_bytes(text) == unfinished


@pytest.mark.parametrize(
    ("begun", "allowed"),  # RFC 3629, section 4
    [
        (b"", [*range(0x80), *range(0xC2, 0xF5)]),
        (b"\xc3", range(0x80, 0xC0)),
        (b"\xe0", range(0xA0, 0xC0)),
        (b"\xe5", range(0x80, 0xC0)),
        (b"\xe5\x86", range(0x80, 0xC0)),
        (b"\xed", range(0x80, 0xA0)),
        (b"\xf0", range(0x90, 0xC0)),
        (b"\xf4", range(0x80, 0x90)),
    ],
)
def test_bytes_that_may_follow_a_begun_character(begun, allowed):
    assert np.flatnonzero(load_once("bytes").may_follow(begun)).tolist() == list(allowed)


@given(choices=st.lists(st.integers(0, 10_000), max_size=20))
@quick
def test_choosing_among_the_tokens_that_may_follow_writes_only_valid_utf8(choices):
    compact, written = compact_of(MIXED), b""
    for choice in choices:
        allowed = np.flatnonzero(compact.may_follow(unfinished_bytes(written)))
        written += compact.tokens[allowed[choice % len(allowed)]]
    begun = unfinished_bytes(written)
    written[: len(written) - len(begun)].decode()  # raises where it is no UTF-8
    assert compact.may_follow(begun).any()


@given(text=any_text)
@quick
def test_every_text_can_be_written_with_the_tokens_that_may_follow(text):
    compact, written = compact_of(MIXED), b""
    for i in compact.encode(text):
        assert compact.may_follow(unfinished_bytes(written))[i]
        written += compact.tokens[i]
    assert written.decode() == text


def test_half_a_character_shows_as_the_replacement_character():
    assert load_once("bytes").decode([0x68, 0xE5, 0x86]) == "h\ufffd"


# The end of a document


def with_end(name: str, compact: bool) -> Tokenizer:
    full = load_once(name).with_end_of_text()
    return full.compact(full.encode_parts([MIXED, None]))[0] if compact else full


@pytest.mark.parametrize("compact", [True, False])
@pytest.mark.parametrize("name", ["cl100k_base", "o200k_base", "bytes"])
def test_the_end_of_text_is_one_more_token_that_no_text_encodes_to(name, compact):
    tokenizer, plain = with_end(name, compact), load_once(name)
    plain = plain.compact(plain.encode(MIXED))[0] if compact else plain
    end = plain.vocab_size
    assert (tokenizer.end_of_text, tokenizer.vocab_size, plain.end_of_text) == (end, end + 1, None)
    texts = [MIXED, "\n\n", "", None, "<|endoftext|>", None, None, "a\n\nb"]
    rows = (plain.encode(text).tolist() if text is not None else [end] for text in texts)
    assert tokenizer.encode_parts(texts).tolist() == [i for row in rows for i in row]
    assert tokenizer.encode_parts([None, None]).tolist() == [end, end]
    assert tokenizer.decode([*plain.encode("a"), end, *plain.encode("b")]) == "a\n\nb"
    assert tokenizer.token_lengths().tolist() == [*plain.token_lengths(), 0]


@pytest.mark.parametrize("compact", [True, False])
@pytest.mark.parametrize("name", ["cl100k_base", "bytes"])
def test_plain_strings_make_the_end_of_text_again(name, compact):
    tokenizer = with_end(name, compact)
    state = tokenizer.to_dict()
    again = Tokenizer.from_dict(state)
    assert (again, again.end_of_text) == (tokenizer, tokenizer.end_of_text)
    assert again.encode_parts(["a", None]).tolist() == [*tokenizer.encode("a"), again.end_of_text]
    assert len(state["vocabulary"].splitlines()) == tokenizer.vocab_size - 1
    old = {key: value for key, value in state.items() if key != "end_of_text"}
    plain = Tokenizer.from_dict(old)  # as checkpoints of plain text have it
    assert (plain.end_of_text, plain.vocab_size) == (None, tokenizer.vocab_size - 1)
    assert plain != tokenizer
    for wrong in ("0", "-1", "", "x"):
        with pytest.raises(ValueError, match=r"^end-of-text token"):
            Tokenizer.from_dict(state | {"end_of_text": wrong})


def test_compact_vocabularies_keep_the_end_of_text_as_the_last():
    full = load_once("cl100k_base").with_end_of_text()
    for used in ([full.end_of_text], []):
        compact, new_ids = full.compact(used)
        assert (compact.vocab_size, compact.end_of_text) == (257, 256)
        assert new_ids[full.end_of_text] == 256
        assert (new_ids >= 0).sum() == 257


def test_the_end_of_text_may_not_cut_a_character():
    tokenizer = with_end("bytes", False)
    assert tokenizer.may_follow(b"")[256]
    assert not tokenizer.may_follow(b"\xe5")[256]
    assert tokenizer.may_follow(b"\xe5").sum() == 64


@pytest.mark.parametrize("compact", [True, False])
def test_an_end_of_text_that_was_not_trained_may_follow_nothing(compact):
    used = with_end("cl100k_base", compact)
    unused = used.with_end_used(False)
    if compact:
        full = load_once("cl100k_base").with_end_of_text().with_end_used(False)
        assert full.compact(full.encode_parts([MIXED, None]))[0] == unused
    assert (used.learnt_end, unused.learnt_end) == (used.end_of_text, None)
    assert unused.end_of_text == used.end_of_text
    assert unused != used
    assert unused.with_end_used(True) == used
    for begun in (b"", b"\xe5"):
        changed = np.flatnonzero(used.may_follow(begun) != unused.may_follow(begun))
        assert changed.tolist() == ([] if begun else [used.end_of_text])
    again = Tokenizer.from_dict(unused.to_dict())
    assert (again, again.learnt_end) == (unused, None)
    assert again.encode_parts(["a", None]).tolist() == used.encode_parts(["a", None]).tolist()
