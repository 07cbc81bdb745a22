"""SentencePiece models as vocabularies: the same pieces as from the package sentencepiece."""

import io
import random
from pathlib import Path

import pytest
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

from lit_gpt.errors import UserError
from lit_gpt.text.sentencepiece import parse_sentencepiece
from lit_gpt.text.tokenizer import Tokenizer

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "data" / "订单商品名称.csv").read_text(encoding="utf-8")[:40_000]
TEXT += (ROOT / "LICENSE").read_text(encoding="utf-8")
TEXT += (ROOT / "tests" / "text" / "test_sentencepiece.py").read_text(encoding="utf-8")
EXACT = {
    "normalization_rule_name": "identity",
    "add_dummy_prefix": False,
    "remove_extra_whitespaces": False,
    "byte_fallback": True,
    "character_coverage": 1.0,
}


def train(model_type: str = "bpe", text: str = TEXT, **options) -> bytes:
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(filter(None, text.split("\n"))),
        model_writer=model,
        model_type=model_type,
        minloglevel=2,
        **{"vocab_size": 2400, "hard_vocab_limit": False} | options,
    )
    return model.getvalue()


@pytest.fixture(scope="module")
def exact() -> bytes:
    return train(**EXACT)


def pieces(model: bytes, text: str) -> list[bytes]:
    """The bytes of each piece, as the package splits a text."""
    names = SentencePieceProcessor(model_proto=model).encode(text, out_type=str)
    return [
        bytes([int(name[3:5], 16)])
        if name.startswith("<0x")
        else name.replace("\u2581", " ").encode()
        for name in names
    ]


def ours(tokenizer: Tokenizer, text: str) -> list[bytes]:
    return [tokenizer.tokens[i] for i in tokenizer.encode(text)]


@pytest.mark.parametrize(
    "text",
    [
        TEXT,
        "It's a test,  with   spaces ",
        "  农夫山泉 天然水 550ml*24瓶，规格",
        "def f(x):\n\treturn  x[0]  # naïve\r\n\n",
        "🦆👩\u200d🦰 e\u0301 \u3000\u00a0\u2028",
        " ",
        "",
    ],
    ids=["all", "English", "Chinese", "code", "emoji and odd spaces", "a space", "nothing"],
)
def test_text_is_split_into_the_same_pieces(exact, text):
    tokenizer = parse_sentencepiece(exact, "x.model")
    assert ours(tokenizer, text) == pieces(exact, text)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_any_text_is_kept_and_differs_only_in_the_bytes_of_characters_that_are_no_piece(exact):
    tokenizer = parse_sentencepiece(exact, "x.model")
    generator = random.Random(0)
    same = 0
    for _ in range(300):
        parts = [*"abc the  ,.\n\té农夫山泉水한🦆", TEXT[generator.randrange(len(TEXT)) :][:9]]
        text = "".join(generator.choices(parts, k=50))
        found, expected = ours(tokenizer, text), pieces(exact, text)
        assert b"".join(found) == text.encode()
        known = [part for part in expected if len(part) > 1 or part < b"\x80"]
        assert [p for p in found if p in known and (len(p) > 1 or p < b"\x80")] == known
        same += found == expected
    assert same > 250


def test_normal_forms_and_the_space_before_a_text_are_not_applied():
    model = train()  # as by default
    tokenizer = parse_sentencepiece(model, "x.model")
    text = "Permission is hereby granted, free of charge, to any person"
    assert ours(tokenizer, " " + text) == pieces(model, text)
    for odd in ("ﬁ  ①", " a\u3000b ", "e\u0301"):
        assert tokenizer.decode(tokenizer.encode(odd)) == odd


@pytest.mark.parametrize("model_type", ["unigram", "char", "word"])
def test_other_algorithms_are_refused(model_type):
    with pytest.raises(UserError) as error:
        parse_sentencepiece(train(model_type, TEXT[40_000:42_000], vocab_size=300), "x.model")
    assert str(error.value) == (
        f"tokenizer 'x.model': uses SentencePiece's {model_type} algorithm, not byte-pair encoding;"
        " use a BPE model (spm_train --model_type=bpe), or bpe:4096 to train one on your text"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"user_defined_symbols": ["<x>"]}, "has a user-defined symbol, '<x>'"),
        ({"split_by_whitespace": False}, "has pieces of more than a word"),
        ({"treat_whitespace_as_suffix": True}, "has pieces of more than a word"),
    ],
)
def test_models_that_split_otherwise_are_refused(options, message):
    with pytest.raises(UserError) as error:
        parse_sentencepiece(train(text=TEXT[-9000:], vocab_size=900, **options), "x.model")
    assert message in str(error.value)


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model[: len(model) // 2],
        lambda model: model[1:],
        lambda model: b"",
        lambda model: b"\x08\x01" + model,  # a number where a piece is expected
        lambda model: b"\x0a\xff\xff\xff\xff\xff\xff\x7f" + model,  # petabytes
        lambda model: b"\xff" * 100,
        lambda model: b"\x0a\x06\x0a\x01\xff\x15\x00\x00" + model,
    ],
)
def test_damaged_models_are_one_line(exact, change):
    with pytest.raises(
        UserError, match="is not a SentencePiece model of the usual kind: "
    ) as error:
        parse_sentencepiece(change(exact), "x.model")
    assert "\n" not in str(error.value)


def test_a_gigantic_piece_is_refused(exact):
    text = b"a" * 100_000
    piece = b"\x0a\xa0\x8d\x06" + text + b"\x15\x00\x00\x00\x00"
    with pytest.raises(UserError, match="it has a piece of 100,000 characters"):
        parse_sentencepiece(exact + b"\x0a\xa9\x8d\x06" + piece, "x.model")


@pytest.mark.parametrize("compact", [True, False])
def test_a_model_is_a_tokenizer_of_the_command(load, tmp_path, exact, compact):
    (tmp_path / "x.model").write_bytes(exact)
    text = TEXT[:5000]
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    corpus = load(tmp_path / "text.txt", tmp_path / "x.model", compact=compact)
    tokens = [corpus.tokenizer.tokens[i] for i in corpus.tokens]
    assert tokens == pieces(exact, text)
    full = parse_sentencepiece(exact, "x.model").vocab_size
    assert (corpus.tokenizer.vocab_size < full) == compact
    assert Tokenizer.from_dict(corpus.tokenizer.to_dict()) == corpus.tokenizer
