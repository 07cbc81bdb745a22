"""Split patterns of a stranger: what would lose text, panic or never end is refused."""

import json
import time

import pytest
import torch
from tiktoken_ext import openai_public

from lit_gpt.checkpoint import load_checkpoint
from lit_gpt.errors import UserError
from lit_gpt.text import patterns
from lit_gpt.text.patterns import KNOWN, check_in_child, check_pattern
from lit_gpt.text.tokenizer import SINGLE_BYTES, Tokenizer
from lit_gpt.text.vocabularies import load_tokenizer
from tests.generation.models import save_model, small_model

STATE = load_tokenizer("bytes").to_dict()
LINES = STATE["vocabulary"].splitlines(keepends=True)


@pytest.mark.parametrize(
    ("pattern", "problem"),
    [
        ("", "crashes"),  # tiktoken panics where a piece is empty
        ("(?=.)", "crashes"),
        (r"(?s:.)|$", "crashes"),  # only on the empty text
        (r"\p{L}+", "drops text"),
        (r"(?s:[^Q])|xQ", "drops text"),
        (r"(?s:[^\u{2028}])", "drops text"),
        (r"(?:a|a)+(?!b)c|(?s:.)", "gives up on some texts"),  # exponential
        (r"(?:ab|a|b)+(?<!z)7|(?s:.)", "gives up on some texts"),
        (r"(?:\p{Lu}+\p{M}*)+(?!x)\d|(?s:.)", "gives up on some texts"),
        (r"(?:(?:a+)+(?!a)z)|(?s:.)", "seconds for"),  # quadratic: one text, or all together
        (r"(?:xy+)+(?!q)$|(?s:.)", "seconds for"),
        (r"(?s:.)(?=(?s:.*)é)|(?s:.)", "seconds for"),
        (r"(?s:.*?Z)|(?s:.)", "seconds for"),  # without look-around: by another engine
        ("(", "is invalid here (Parsing error at position 1"),
        (r"((?:\p{L}{500}){500}(?!x)){50}|(?s:.)", "is invalid here"),  # gigabytes
        ("a|" * 6000 + "(?s:.)", "is longer than 10,000 characters"),
    ],
)
def test_hostile_patterns_are_refused_with_the_reason(pattern, problem):
    start = time.perf_counter()
    with pytest.raises(ValueError, match=r"^its split pattern ") as error:
        Tokenizer.from_dict(STATE | {"pattern": pattern})
    assert problem in str(error.value)
    assert "\n" not in str(error.value)
    assert time.perf_counter() - start < 60


@pytest.mark.parametrize(
    "pattern",
    [
        r"(?s:.+)",
        r"[^\n]+|\n",
        r"\w+|\s+(?!\S)|[^\w\s]+|\s",
        # DeepSeek's and other families' of the same kind
        r"\p{N}{1,3}|[一-龥぀-ゟ゠-ヿ]+|[!-/:-~]?[A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
        r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+|(?s:.)",
        patterns.CL100K,
        patterns.O200K,
        patterns.QWEN2,
        patterns.WORDS,
    ],
)
def test_harmless_patterns_are_proved(pattern):
    check_in_child("lit_gpt.text.patterns", "try_tiktoken", pattern)


@pytest.mark.parametrize("pattern", sorted(KNOWN))
def test_known_patterns_need_no_proof(pattern, monkeypatch):
    monkeypatch.setattr(patterns, "check_in_child", None)
    check_pattern(pattern)


def test_tiktoken_s_own_patterns_are_known(monkeypatch):
    monkeypatch.setattr(openai_public, "load_tiktoken_bpe", lambda *_, **__: {})
    monkeypatch.setattr(openai_public, "data_gym_to_mergeable_bpe_ranks", lambda **_: {})
    names = ("gpt2", "r50k_base", "p50k_base", "p50k_edit", "cl100k_base", "o200k_base")
    assert {getattr(openai_public, name)()["pat_str"] for name in names} <= KNOWN


def test_a_pattern_that_never_ends_is_stopped(monkeypatch):
    monkeypatch.setattr(patterns, "SECONDS", 0.2)
    with pytest.raises(ValueError, match="crashes on"):
        check_in_child("time", "sleep_for_pytest", "missing: an AttributeError")
    start = time.perf_counter()
    with pytest.raises(ValueError, match="takes over 5 seconds for"):
        check_in_child("subprocess", "getoutput", "sleep 100")
    assert time.perf_counter() - start < 50
    with pytest.raises(ValueError, match="takes over 5 seconds for"):
        check_in_child(__name__, "never_ends", "")


def never_ends(pattern):
    patterns.limit_resources()
    while True:
        pass


@pytest.mark.parametrize(
    "lines",
    [[*LINES, LINES[0]], [*LINES, "YQ== 256\n"]],
    ids=["a byte twice", "a token twice"],
)
def test_a_vocabulary_with_a_token_twice_is_refused(lines):
    with pytest.raises(ValueError, match=r"a token twice, or an empty one"):
        Tokenizer.from_dict(STATE | {"vocabulary": "".join(lines)})


def test_the_name_of_a_vocabulary_decides_nothing():
    """Of a stranger's: called bytes, with the bytes in another order."""
    state = Tokenizer("bytes", r"(?s:.)", SINGLE_BYTES[::-1]).to_dict()
    tokenizer = Tokenizer.from_dict(json.loads(json.dumps(state)))
    assert tokenizer.encode("a").tolist() == [255 - ord("a")]
    assert tokenizer.decode(tokenizer.encode("猫")) == "猫"


def test_a_checkpoint_with_a_hostile_pattern_is_one_line(tmp_path):
    path = save_model(small_model(vocab_size=256), load_tokenizer("bytes"), tmp_path / "x.ckpt")
    load_checkpoint(path)
    contents = torch.load(path, weights_only=True)
    for pattern in ("", r"\p{L}+"):
        contents["tokenizer"]["pattern"] = pattern
        torch.save(contents, path)
        with pytest.raises(UserError, match="its split pattern ") as error:
            load_checkpoint(path)
        assert "\n" not in str(error.value)
