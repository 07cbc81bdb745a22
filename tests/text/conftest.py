"""Vocabularies built once: cl100k_base takes half a second."""

from functools import cache

import pytest

from lit_gpt.text import vocabularies

load_once = cache(vocabularies.load_tokenizer)


@pytest.fixture(autouse=True)
def tokenizers_built_once(monkeypatch):
    monkeypatch.setattr(vocabularies, "load_tokenizer", load_once)
