"""A compact vocabulary has what the training split uses; the rest of the text is spelled."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_gpt.text import cutting, encoding_pool, manifest, token_file
from lit_gpt.text.corpus import load_corpus
from lit_gpt.text.files import TextFiles
from lit_gpt.text.splits import split_text
from lit_gpt.text.vocabularies import Vocabulary
from tests.text.conftest import load_once, text_of, write

SEEN = "The cat sat on the mat, and the dog saw it.\n"
UNSEEN = "Hippopotamuses bellow underneath chrysanthemums 农夫山泉.\n"
words = st.sampled_from(["the", " cat", "hippo", "potamus", "\n", " 农夫", "é", "123", "  ", "'s"])


def write_rows(path: Path, key: str, values: list) -> Path:
    return write(path, "".join(json.dumps({key: value}) + "\n" for value in values).encode())


def talk(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": "Say it."}, {"role": "assistant", "content": text}]


@pytest.mark.parametrize("name", ["cl100k_base", "o200k_base", "bpe:400", "chars", "bytes"])
def test_the_validation_split_changes_nothing_that_is_learnt(name, tmp_path):
    """Texts that differ in the validation split alone have one vocabulary and training split."""
    found = []
    for word in (" tiger", " horse"):
        path = write(tmp_path / f"{word}.txt", (SEEN * 90 + word * 400).encode())
        text = TextFiles(str(path), cache=str(tmp_path / "cache"))
        splits = split_text(text, Vocabulary(name, compact=True), 0.5)
        lengths = np.cumsum(splits.tokenizer.token_lengths()[splits.train])
        train = splits.train[lengths <= 40 * len(SEEN)].tolist()
        found.append((splits.tokenizer.tokens, train))
        assert splits.tokenizer.decode(np.concatenate([splits.train, splits.val])) == (
            path.read_text(encoding="utf-8")
        )
    assert found[0] == found[1]


@pytest.mark.parametrize("fraction", [0.5, 0.8, 0.9])
def test_the_training_split_is_that_of_the_full_vocabulary(fraction, tmp_path):
    full = load_once("cl100k_base")
    path = write(tmp_path / "x.txt", (SEEN * 90 + UNSEEN * 20).encode())
    text = TextFiles(str(path), cache=str(tmp_path / "cache"))
    part, whole = (
        split_text(text, Vocabulary("cl100k_base", compact=value), fraction)
        for value in (True, False)
    )
    tokens = [part.tokenizer.tokens[i] for i in part.train]
    assert tokens == [full.tokens[i] for i in whole.train]
    assert (len(part.val) > len(whole.val)) == (fraction == 0.5)  # later, all words are known


def test_what_only_the_validation_split_has_is_spelled(load, tmp_path):
    full = load_once("cl100k_base")
    text = SEEN * 9 + UNSEEN
    corpus = load(write(tmp_path / "x.txt", text.encode()), "cl100k_base", fraction=0.8)
    tokens = [full.tokens[i] for i in full.encode(SEEN)]
    assert [corpus.tokenizer.tokens[i] for i in corpus.tokens[: 9 * len(tokens)]] == tokens * 9
    assert b" underneath" not in corpus.tokenizer.tokens
    assert corpus.info.compact_tokens == int(0.8 * len(full.encode(text)))
    assert corpus.info.num_tokens == len(corpus.tokens) > len(full.encode(text))
    assert corpus.info.num_bytes == len(text.encode())
    assert corpus.tokens.tolist() == corpus.tokenizer.encode(text).tolist()


def test_where_the_validation_split_has_nothing_new_all_are_the_tokens_of_the_whole(load, tmp_path):
    path = write(tmp_path / "x.txt", SEEN.encode() * 20)
    part, whole = (load(path, "cl100k_base", fraction=fraction) for fraction in (0.9, 1.0))
    assert (part.tokenizer, part.tokens.tolist()) == (whole.tokenizer, whole.tokens.tolist())
    assert whole.info.compact_tokens is None


@settings(max_examples=60, deadline=None)
@given(parts=st.lists(words | st.text(max_size=9), min_size=1), fraction=st.floats(0.05, 0.95))
def test_any_text_has_the_ids_that_its_tokenizer_gives(parts, fraction, tmp_path_factory):
    """As a prompt or a text to evaluate gets them, also beside the first token that is spelled."""
    folder = tmp_path_factory.mktemp("any")
    text = "".join(parts).encode("utf-8", "ignore").decode().replace("\0", "") or "x"
    path = write(folder / "x.txt", text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoding_pool, "BATCH", 8)
        source = TextFiles(str(path), cache=str(folder / "cache"))
        corpus = load_corpus(source, Vocabulary("cl100k_base", compact=True), fraction)
    assert corpus.tokens.tolist() == corpus.tokenizer.encode(text_of(corpus)).tolist()
    assert text_of(corpus) == text.removeprefix("\ufeff")
    kept = corpus.info.compact_tokens
    full = load_once("cl100k_base")
    assert corpus.tokenizer.decode_bytes(corpus.tokens).startswith(
        full.decode_bytes(full.encode(text_of(corpus))[:kept])
    )


@pytest.fixture
def encoded(monkeypatch) -> list[int]:
    """A text is encoded in small batches, marked after each; the characters of each batch."""
    for where, name, value in (
        (encoding_pool, "BATCH", 1000),
        (cutting, "CHUNK", 500),
        (manifest, "LARGE", 1),
        (token_file, "MARKED", 0.0),
    ):
        monkeypatch.setattr(where, name, value)
    sizes = []
    encode = token_file.encode_in_order

    def count(encode_parts, texts):
        for batch, ids in encode(encode_parts, texts):
            sizes.append(sum(map(len, batch)))
            yield batch, ids

    monkeypatch.setattr(token_file, "encode_in_order", count)
    return sizes


def test_only_the_end_of_a_long_text_is_encoded_again(load, tmp_path, encoded):
    text = SEEN * 900 + UNSEEN
    corpus = load(write(tmp_path / "x.txt", text.encode()), "cl100k_base", fraction=0.9)
    assert len(text) < sum(encoded) < len(text) + 3000
    assert corpus.tokens.tolist() == corpus.tokenizer.encode(text).tolist()


@pytest.mark.parametrize("place", ["add", "renumbered"])
def test_an_encoding_that_was_stopped_is_continued(place, load, tmp_path, monkeypatch, encoded):
    """In the first pass, or in the second, which follows."""
    monkeypatch.setattr(token_file, "ENDS", 20)  # of 36
    text = SEEN * 700 + UNSEEN + SEEN * 100
    path = write(tmp_path / "x.txt", text.encode())
    original = getattr(token_file._Ids, place)

    def stop(self, *args):
        if self.mark.num_parts > 30:
            raise KeyboardInterrupt
        return original(self, *args)

    monkeypatch.setattr(token_file._Ids, place, stop)
    with pytest.raises(KeyboardInterrupt):
        load(path, "cl100k_base", fraction=0.8)
    monkeypatch.setattr(token_file._Ids, place, original)
    corpus = load(path, "cl100k_base", fraction=0.8)
    assert corpus.tokens.tolist() == corpus.tokenizer.encode(text).tolist()
    assert b" underneath" not in corpus.tokenizer.tokens
    again = len(SEEN * 100 + UNSEEN) + 4000
    assert len(text) < sum(encoded) < len(text) + again


def test_documents_of_the_validation_split_are_spelled_and_end(load, tmp_path):
    path = write_rows(tmp_path / "x.jsonl", "text", [SEEN] * 9 + [UNSEEN] * 3)
    corpus = load(path, "cl100k_base", fraction=0.6)
    expected = corpus.tokenizer.encode_parts([*[SEEN, None] * 9, *[UNSEEN, None] * 3])
    assert corpus.tokens.tolist() == expected.tolist()
    assert b" underneath" not in corpus.tokenizer.tokens
    assert corpus.info.num_documents == 12


def test_a_conversation_that_trains_is_in_the_vocabulary_as_a_whole(tmp_path):
    rows = [*[talk(SEEN)] * 5, talk(UNSEEN * 20), *[talk(SEEN)] * 3]
    path = write_rows(tmp_path / "x.jsonl", "messages", rows)
    text = TextFiles(str(path), cache=str(tmp_path / "cache"))
    splits = split_text(text, Vocabulary("cl100k_base", compact=True), 0.5)
    assert splits.tokenizer.decode(splits.train).count(UNSEEN) == 20
    assert b" underneath" in splits.tokenizer.tokens


@pytest.mark.parametrize("last", [UNSEEN, UNSEEN * 50])
def test_the_last_conversation_validates_however_long_it_is(last, tmp_path):
    path = write_rows(tmp_path / "x.jsonl", "messages", [*[talk(SEEN)] * 10, talk(last)])
    text = TextFiles(str(path), cache=str(tmp_path / "cache"))
    splits = split_text(text, Vocabulary("cl100k_base", compact=True), 0.9)
    tokenizer = splits.tokenizer
    assert UNSEEN not in tokenizer.decode(splits.train)
    assert UNSEEN in tokenizer.decode(splits.val)
    assert b" underneath" not in tokenizer.tokens
    assert len(splits.val_flags) == len(splits.val)
