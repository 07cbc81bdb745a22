"""What the tests of text share: vocabularies built once, files, a cache of their own."""

import os
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from lit_gpt.text import vocabularies
from lit_gpt.text.corpus import Corpus, load_corpus
from lit_gpt.text.files import TextFiles
from lit_gpt.text.vocabularies import Vocabulary

unix = pytest.mark.skipif(os.name == "nt", reason="as Unix does it, or says it")
load_once = cache(vocabularies.load_tokenizer)


@pytest.fixture(autouse=True)
def tokenizers_built_once(monkeypatch):
    """cl100k_base takes half a second."""
    monkeypatch.setattr(vocabularies, "load_tokenizer", load_once)


@pytest.fixture
def cache_folder(tmp_path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def load(cache_folder):
    def load(
        path,
        tokenizer="bytes",
        compact=True,
        encoding="utf-8",
        fraction=1.0,
        text_field=None,
        tsv_quotes=False,
    ) -> Corpus:
        path = path if isinstance(path, list) else str(path)
        tokenizer = str(tokenizer) if isinstance(tokenizer, Path) else tokenizer
        text = TextFiles(path, None, encoding, text_field, tsv_quotes, str(cache_folder))
        return load_corpus(text, Vocabulary(tokenizer, compact), fraction)

    return load


def write(path: Path, content: bytes = b"text") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def text_of(corpus: Corpus) -> str:
    """The text of all tokens, byte for byte."""
    return corpus.tokenizer.decode_bytes(corpus.tokens.tolist()).decode()


def texts_of(corpus: Corpus) -> list[str]:
    """The texts between the end-of-text tokens, byte for byte."""
    tokens, end = corpus.tokens, corpus.tokenizer.end_of_text
    parts = np.split(tokens, np.flatnonzero(tokens == end))
    ids = [parts[0], *(part[1:] for part in parts[1:])]
    return [corpus.tokenizer.decode_bytes(part.tolist()).decode() for part in ids]


def entries(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*"))
