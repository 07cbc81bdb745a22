"""A validation text of its own: what trains, what validates, and what a checkpoint remembers."""

import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from lit_gpt.checkpoint import Checkpoint
from lit_gpt.data import TextDataModule
from lit_gpt.errors import UserError
from lit_gpt.text.overlap import shared_lines
from lit_gpt.text.tokenizer import Tokenizer

TRAINING = "the cat sat on a mat\nit rained\n" * 30
VALIDATION = "it rained\nZebra: a new word €\nit rained" * 8


@pytest.fixture
def texts(tmp_path: Path) -> dict[str, Path]:
    names = {"train.txt": TRAINING, "val.txt": VALIDATION}
    for name, text in names.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    documents = [{"body": line} for line in VALIDATION.split("\n")]
    rows = "".join(json.dumps(document) + "\n" for document in documents)
    (tmp_path / "val.jsonl").write_text(rows, encoding="utf-8")
    return {path.name: path for path in tmp_path.iterdir()}


@pytest.fixture
def module(texts, tmp_path):
    def module(path="train.txt", val_path="val.txt", **options) -> TextDataModule:
        given = {"path": str(tmp_path / path), "val_path": str(tmp_path / val_path)}
        given |= {"cache": str(tmp_path / "cache"), "context_length": 8} | options
        return TextDataModule(**given)

    return module


def decoded(data: TextDataModule, tokens: np.ndarray) -> str:
    return data.tokenizer.decode_bytes(tokens.tolist()).decode()


@pytest.mark.parametrize("tokenizer", ["cl100k_base", "bytes", "bpe:270"])
def test_all_of_path_trains_and_all_of_val_path_validates(tokenizer, module):
    data = module(tokenizer=tokenizer)
    assert decoded(data, data.train_tokens) == TRAINING
    assert decoded(data, data.val_tokens) == VALIDATION
    alone = TextDataModule(**{**data.hparams, "val_path": None, "train_fraction": 0.9})
    if tokenizer != "bpe:270":  # which is trained on more now
        assert alone.corpus.tokens.tolist() == data.train_tokens.tolist()  # the same ids
        assert alone.tokenizer == data.tokenizer


def test_bpe_is_trained_on_all_of_the_training_text(module, tmp_path):
    (tmp_path / "end.txt").write_text("x " * 500 + "uncommon" * 100, encoding="utf-8")
    data = module(path="end.txt", tokenizer="bpe:300")
    assert b"uncommon" in data.tokenizer.tokens
    alone = TextDataModule(**{**data.hparams, "val_path": None, "train_fraction": 0.5})
    assert b"uncommon" not in alone.tokenizer.tokens


def test_validation_documents_end_with_a_blank_line_where_training_has_none(module):
    data = module(val_path="val.jsonl", text_field="body")
    assert data.tokenizer.learnt_end is None
    assert data.tokenizer.end_of_text not in data.val_tokens
    lines = VALIDATION.split("\n")
    assert decoded(data, data.val_tokens) == "".join(f"{line}\n\n" for line in lines)
    assert data.splits.val_corpus.info.num_documents == len(lines)


def test_a_model_of_plain_text_is_never_trained_on_documents(module):
    """Whether or not the cache has them, from a run that validated on them."""
    validated = module(val_path="val.jsonl", text_field="body")
    assert validated.splits.val_corpus.info.num_documents > 0
    data = module(path="val.jsonl", val_path="train.txt", text_field="body")
    tokens = validated.tokenizer.tokens[:-1]  # as earlier releases trained it
    data.given_tokenizer = Tokenizer("x", validated.tokenizer.pattern, tokens)
    with pytest.raises(UserError, match="has documents, but the model's tokenizer has no end"):
        data.splits  # noqa: B018


def test_validation_text_may_be_plain_where_training_has_documents(module):
    data = module(path="val.jsonl", val_path="train.txt", text_field="body")
    assert data.tokenizer.end_of_text is not None
    assert decoded(data, data.val_tokens) == TRAINING
    assert data.tokenizer.end_of_text not in data.val_tokens


def test_files_of_a_validation_folder_end_as_those_of_the_training_text_do(module, tmp_path):
    """Where the model learns no end of text, none is asked of it."""
    for folder, texts in {"one": ["the"], "two": ["the cat", "sat"], "val": ["a cat", "b"]}.items():
        (tmp_path / folder).mkdir()
        for i, text in enumerate(texts):
            (tmp_path / folder / f"{i}.txt").write_text(text * 9)
    sizes = {"tokenizer": "bytes", "val_path": "val"}
    data = module(path="one", **sizes)
    assert bytes(data.val_tokens.tolist()).decode() == "a cat" * 9 + "\n" + "b" * 9
    assert data.tokenizer.learnt_end is None
    data = module(path="two", **sizes)
    assert data.val_tokens.tolist() == [*b"a cat" * 9, 256, *b"b" * 9]
    assert data.tokenizer.learnt_end == 256


@pytest.mark.parametrize(("fraction", "learnt"), [(0.5, None), (0.9, 256)])
def test_an_end_of_text_in_the_validation_split_alone_is_not_learnt(fraction, learnt, tmp_path):
    (tmp_path / "texts").mkdir()
    for i, text in enumerate(["a" * 80, "b" * 20]):
        (tmp_path / "texts" / f"{i}.txt").write_text(text)
    options = {"context_length": 4, "tokenizer": "bytes", "train_fraction": fraction}
    data = TextDataModule(str(tmp_path / "texts"), cache=str(tmp_path / "cache"), **options)
    assert (data.tokenizer.end_of_text, data.tokenizer.learnt_end) == (256, learnt)


def test_no_line_is_cut_between_two_texts():
    tokens = [bytes([i]) for i in range(256)]
    train, val = (np.frombuffer(text, np.uint8) for text in (b"one\ntwo", b"two\nthree\none"))
    found = shared_lines(train, val, tokens, is_one_text=False)
    assert (found.num_lines, found.num_shared) == (3, 2)
    assert shared_lines(train, val, tokens).num_lines == 2  # "twotwo" is cut


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"val_path": "nowhere.txt"}, "val_path '{}/nowhere.txt': no such file or folder"),
        ({"val_path": "train.txt"}, "val_path '{0}/train.txt': {0}/train.txt is among the train"),
        (
            {"val_path": "short.txt"},
            "val_path '{}/short.txt': too short: its validation split has 2 of 2 tokens,",
        ),
        ({"text_field": "body"}, "text_field 'body': is for .json(l), .csv, .tsv and .parquet"),
    ],
)
def test_what_cannot_validate_is_one_line(options, message, module, tmp_path):
    (tmp_path / "short.txt").write_text("a\n")
    with pytest.raises(UserError) as error:
        _ = module(**options, tokenizer="bytes").val_tokens
    assert str(error.value).startswith(message.format(tmp_path))


def test_a_run_uses_it_everywhere_and_resumes_only_with_it(train, texts, tmp_path):
    options = {"data.path": texts["train.txt"], "data.val_path": texts["val.txt"]}
    options |= {"data.tokenizer": "bytes", "data.train_fraction": 0.5}
    result = train(**options)
    assert result.status == 0, result.err
    run = result.run
    num_tokens = len(VALIDATION.encode())
    assert f"Validation text: {texts['val.txt']}, {len(VALIDATION):,} characters\n" in result.out
    assert "train_fraction does not apply" in result.out
    assert f"Training: {len(TRAINING):,} tokens, validation: {num_tokens:,}\n" in result.out
    lines = [line.strip() for line in VALIDATION.split("\n")]
    shared = sum(line in TRAINING.split("\n") for line in lines)
    assert f"also in the training text: {shared} of {len(lines)} (" in result.out
    assert run.final.result.num_tokens == num_tokens - 1
    # The unigram baseline, by hand: counts of the training text, the best of the priors.
    counts, targets = Counter(TRAINING.encode()), VALIDATION.encode()[1:]
    bits = min(
        -sum(math.log2((counts[t] + a / 257) / (len(TRAINING) + a)) for t in targets)
        for a in 2.0 ** np.arange(-2, 18)
    )
    assert f"unigram {bits / len(targets):.4f}, " in result.out
    checkpoint = Checkpoint.read(str(tmp_path / "logs" / "version_0" / "checkpoints" / "last.ckpt"))
    assert checkpoint.corpus_info["validation"]["num_tokens"] == num_tokens

    again = options | {"trainer.max_steps": 8, "ckpt_path": "last"}
    assert train(**again).status == 0
    texts["val.txt"].write_text(VALIDATION + "more", encoding="utf-8")
    refused = train(**again | {"trainer.max_steps": 9})
    assert (refused.status, len(refused.err.splitlines())) == (2, 1)
    assert f"the text of {texts['val.txt']} is not the one it was validated on" in refused.err
    del again["data.val_path"]
    refused = train(**again | {"trainer.max_steps": 9})
    assert (refused.status, len(refused.err.splitlines())) == (2, 1)
    assert "is not the one it was validated on" in refused.err


def test_files_of_a_folder_are_excluded_and_counted(train, texts, tmp_path):
    folder = tmp_path / "folder"
    for name in ("a.txt", "b.log", "old/c.txt", "old/d.log", "e/old.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"{name}\n{TRAINING}")
    globs = '["*.log", "old", "x/*"]'
    result = train(**{"data.path": folder, "data.exclude": globs, "model.num_blocks": 1})
    assert result.status == 0, result.err
    assert "Files and folders excluded: 1 by *.log, 1 by old, nothing by x/*\n" in result.out
    data = result.run.data
    texts = [f"a.txt\n{TRAINING}", f"e/old.txt\n{TRAINING}"]
    assert decoded(data, data.corpus.tokens) == "\n\n".join(texts)  # an end of text
