"""What is found out about a text, beside what its encoding says."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest

from lit_gpt.budget import text_facts
from lit_gpt.budget.text_facts import TextFacts, TokenizerFacts, exact_facts, measure_text
from lit_gpt.errors import UserError
from lit_gpt.text.files import TextFiles
from lit_gpt.text.splits import split_text, two_texts
from lit_gpt.text.vocabularies import Vocabulary

WORDS = [
    "".join(random.Random(i).choices("abcdefghijklmnopqrstuvwxyz", k=2 + i % 8))
    for i in range(3000)
]


@pytest.fixture
def long_text(tmp_path):
    """300 kB of words, of which the frequent ones are far more frequent."""
    rng = random.Random(1)
    shares = [1 / (1 + i) for i in range(len(WORDS))]
    lines = (" ".join(rng.choices(WORDS, shares, k=10)) + ".\n" for _ in range(5000))
    path = tmp_path / "long.txt"
    path.write_text("".join(lines), encoding="utf-8")
    return TextFiles(str(path), cache=str(tmp_path / "cache"))


def by_name(facts: TextFacts) -> dict[str, TokenizerFacts]:
    return {tokenizer.name: tokenizer for tokenizer in facts.tokenizers}


def exact(text: TextFiles, name: str) -> TokenizerFacts:
    splits = split_text(text, Vocabulary(name, compact=True), 0.9)
    return exact_facts(splits, name).tokenizers[0]


def test_of_a_short_text_all_is_counted(long_text):
    """As the run itself counts: every token of both splits."""
    facts = measure_text(long_text)
    size = len(Path(long_text.path).read_bytes())
    assert facts.train_bytes == int(0.9 * size)
    names = ["bytes", "cl100k_base", "bpe:512", "bpe:1024", "bpe:2048", "bpe:4096"]
    assert list(by_name(facts)) == names  # 8,192 would have fewer than 50 bytes each
    for name in ("bytes", "cl100k_base", "bpe:1024"):
        estimate, real = by_name(facts)[name], exact(long_text, name)
        assert estimate.vocab_size == pytest.approx(real.vocab_size, rel=0.01)
        assert estimate.bytes_per_token == pytest.approx(real.bytes_per_token, rel=0.03)
        assert estimate.train_tokens == pytest.approx(real.train_tokens, rel=0.02)
        assert estimate.val_tokens == pytest.approx(real.val_tokens, rel=0.05)
        assert estimate.bigram == pytest.approx(real.bigram, rel=0.01)
        assert real.encoding == 0 < estimate.encoding


def test_a_text_of_a_few_kilobytes_is_tried_too(long_text, tmp_path):
    """Less than a block of a long one: its vocabularies are trained on its training part."""
    path = tmp_path / "short.txt"
    path.write_text(Path(long_text.path).read_text()[:6000])
    facts = by_name(measure_text(TextFiles(str(path), cache=str(tmp_path / "cache"))))
    assert facts["bpe:512"].vocab_size == 512
    assert facts["bpe:512"].bigram < 5
    assert 1.5 < facts["bpe:512"].bytes_per_token < 4


def test_what_only_the_validation_split_has_is_unknown_to_the_vocabularies(tmp_path):
    """Its names would be tokens, if the block that both splits share were trained on."""
    prose = "".join(random.Random(2).choices(WORDS, k=40_000))
    path = tmp_path / "play.txt"
    path.write_text(f"{prose[:85_000]}{'PETRUCHIO: ' * 858}", encoding="utf-8")
    text = TextFiles(str(path), cache=str(tmp_path / "cache"))
    estimate, real = by_name(measure_text(text))["bpe:1024"], exact(text, "bpe:1024")
    assert real.bytes_per_token == 1  # the names are unknown
    assert estimate.bytes_per_token < 1.5  # the block has prose too


def test_of_a_long_text_a_sample_is_scaled_up(long_text, monkeypatch):
    monkeypatch.setattr(text_facts, "SAMPLE", 60_000)
    monkeypatch.setattr(text_facts, "BLOCK", 4_000)
    facts = by_name(measure_text(long_text))
    for name, vocabulary in {"bytes": 0, "cl100k_base": 0.25}.items():
        real = exact(long_text, name)
        assert facts[name].train_tokens == pytest.approx(real.train_tokens, rel=0.02)
        assert facts[name].val_tokens == pytest.approx(real.val_tokens, rel=0.05)
        # Grown beyond that of the sample, which has two thirds of the words.
        assert facts[name].vocab_size == pytest.approx(real.vocab_size, rel=vocabulary)


def test_a_compact_vocabulary_grows_with_the_text(long_text, monkeypatch):
    whole = by_name(measure_text(long_text))["cl100k_base"].vocab_size
    monkeypatch.setattr(text_facts, "SAMPLE", 60_000)
    monkeypatch.setattr(text_facts, "BLOCK", 4_000)
    sample = text_facts.take_sample(long_text, 0.9, None)
    tokenizer = text_facts.load_tokenizer("cl100k_base")
    seen = text_facts.used(tokenizer, [*sample.train, *sample.val])
    assert tokenizer.compact(seen)[0].vocab_size < 0.9 * whole


def test_ends_of_documents_are_tokens_too(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"text": f"row {i} of many"} for i in range(2000)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = TextFiles(str(path), cache=str(tmp_path / "cache"))
    found = by_name(measure_text(text))["cl100k_base"]
    real = exact(text, "cl100k_base")
    assert found.train_tokens == pytest.approx(real.train_tokens, rel=0.02)


def test_all_of_the_text_trains_where_another_one_validates(long_text, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text("some other words\n" * 100)
    facts = measure_text(long_text, val_path=str(other))
    assert facts.train_bytes == len(Path(long_text.path).read_bytes())
    assert by_name(facts)["bytes"].val_tokens == 1700
    splits = two_texts(long_text, str(other), Vocabulary("bytes"))
    assert exact_facts(splits, "bytes").tokenizers[0].val_tokens == 1700


def test_where_another_text_validates_tokenizers_are_judged_by_that_one(long_text, tmp_path):
    """A vocabulary of one's own fits the text that it was trained on, and not all others."""
    path = Path(long_text.path)
    whole = path.read_text(encoding="utf-8")
    cut = whole.index("\n", 9 * len(whole) // 10) + 1
    (tmp_path / "train.txt").write_text(whole[:cut], encoding="utf-8")
    (tmp_path / "val.txt").write_text(whole[cut:], encoding="utf-8")
    two = replace(long_text, path=str(tmp_path / "train.txt"))
    found = by_name(measure_text(two, val_path=str(tmp_path / "val.txt")))
    expected = by_name(measure_text(long_text))
    for name in ("bytes", "cl100k_base", "bpe:512", "bpe:4096"):
        assert found[name].bigram == pytest.approx(expected[name].bigram, rel=0.02)
        assert found[name].bytes_per_token == pytest.approx(
            expected[name].bytes_per_token, rel=0.02
        )


def test_a_text_that_cannot_be_read_is_one_line(tmp_path):
    with pytest.raises(UserError, match="no such"):
        measure_text(TextFiles(str(tmp_path / "none.txt")))


def test_a_vocabulary_that_is_not_compact_is_counted_whole(long_text):
    whole, compact = (
        by_name(measure_text(long_text, is_compact=value))["cl100k_base"] for value in (False, True)
    )
    assert whole.vocab_size == 100_257
    assert whole.train_tokens == compact.train_tokens
    assert whole.val_tokens < compact.val_tokens  # what the training text lacks is spelled
