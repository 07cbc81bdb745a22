"""chars: a token for each character of the training split, and bytes for all others."""

import numpy as np
import pytest

from lit_gpt.checkpoint import load_checkpoint
from lit_gpt.text.characters import character_tokenizer
from lit_gpt.text.tokenizer import SINGLE_BYTES
from lit_gpt.text.utf8 import unfinished_bytes

TEXT = "农夫山泉 天然水\nnaïve café 🦆\r\n" * 3


def test_each_character_is_one_token_after_the_bytes():
    tokenizer = character_tokenizer([TEXT], 1.0)
    rare = sorted(set(TEXT) - set(map(chr, range(128))))
    assert tokenizer.tokens == [*SINGLE_BYTES, *(char.encode() for char in rare)]
    assert [tokenizer.tokens[i].decode() for i in tokenizer.encode(TEXT)] == list(TEXT)
    assert tokenizer.encode("aé").tolist() == [ord("a"), 256 + rare.index("é")]


@pytest.mark.parametrize("other", ["夬é🦢", "\u0301\u200d", "\x80\xff", "<|endoftext|>\0"])
def test_other_characters_are_their_bytes(other):
    tokenizer = character_tokenizer(["é"], 1.0)
    ids = tokenizer.encode(other)
    expected = [list(c.encode()) if c != "é" else [256] for c in other]
    assert ids.tolist() == [i for part in expected for i in part]
    assert tokenizer.decode(ids) == other
    assert tokenizer.token_lengths()[ids].sum() == len(other.encode())


def test_only_the_training_split_counts():
    texts = ["aé", "猫", None, "b犬鳥", None]  # 8 tokens; of these, 3, 6 and 7 are in the split
    for fraction, known in [(0.4, "é猫"), (0.75, "é猫犬"), (0.9, "é猫犬鳥"), (1.0, "é猫犬鳥")]:
        tokenizer = character_tokenizer(iter(texts), fraction)
        assert b"".join(tokenizer.tokens[256:]).decode() == "".join(sorted(known)), fraction


def test_generation_writes_whole_characters():
    tokenizer = character_tokenizer([TEXT], 1.0)
    whole = tokenizer.may_follow(b"")
    assert whole[256:].all()
    assert np.flatnonzero(tokenizer.may_follow("夬".encode()[:1])).tolist() == [*range(128, 192)]
    assert unfinished_bytes("夬".encode()[:2]) is not None


def test_the_compact_vocabulary_does_not_apply(load, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    expected = character_tokenizer([TEXT], 0.5).with_end_of_text().with_end_used(False)
    for compact in (True, False):
        corpus = load(path, "chars", compact=compact, fraction=0.5)
        assert corpus.tokenizer == expected
        assert corpus.tokenizer.decode(corpus.tokens) == TEXT
    assert load(path, "chars", fraction=0.1).tokenizer != expected  # another cache


def test_a_run_its_bits_per_byte_and_its_checkpoint(train, tmp_path, capfd):
    """Characters that only the validation split has are bytes; a prompt may have others."""
    path = tmp_path / "text.txt"
    train_part = "".join(f"第{i}行 naïve café\n" for i in range(300))
    path.write_text(train_part + "鷹🦢 Ω\n" * 60, encoding="utf-8")
    result = train(**{"data.path": path, "data.tokenizer": "chars", "trainer.max_steps": 2})
    assert result.status == 0, result.err
    data = result.run.data
    assert "(chars)" in result.out
    assert not {"鷹".encode(), "🦢".encode()} & set(data.tokenizer.tokens)
    text = path.read_text(encoding="utf-8")
    assert data.tokenizer.decode(data.corpus.tokens) == text
    assert data.corpus.info.num_bytes == len(text.encode())
    folder = result.run.trainer.log_dir
    _, tokenizer = load_checkpoint(f"{folder}/checkpoints/last.ckpt")
    assert tokenizer == data.tokenizer
    assert tokenizer.encode("鷹é").tolist() == [
        *"鷹".encode(),
        tokenizer.tokens.index("é".encode()),
    ]
