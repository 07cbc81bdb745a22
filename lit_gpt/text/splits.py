"""The training and the validation split: two parts of one text, or two texts."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from lit_gpt.errors import UserError
from lit_gpt.text.answers import is_start
from lit_gpt.text.corpus import Corpus, load_corpus
from lit_gpt.text.files import TextFiles, no_fields
from lit_gpt.text.overlap import CHUNK, chunks
from lit_gpt.text.packing import Packs
from lit_gpt.text.token_file import split_at
from lit_gpt.text.tokenizer import Tokenizer
from lit_gpt.text.vocabularies import Vocabulary


@dataclass(frozen=True)
class Splits:
    """The tokens of both splits, and the corpus of each: the same one if one text is split."""

    train: np.ndarray  # (M,) ids
    val: np.ndarray  # (N,)
    corpus: Corpus
    val_corpus: Corpus
    train_flags: np.ndarray | None = None  # (M,) of conversations: see answers.split_flags
    val_flags: np.ndarray | None = None  # (N,)

    @property
    def is_one_text(self) -> bool:
        return self.val_corpus is self.corpus

    @property
    def info(self) -> dict[str, Any]:
        """The fields of CorpusInfo; in "validation" those of a validation text of its own."""
        info = asdict(self.corpus.info)
        return info if self.is_one_text else info | {"validation": asdict(self.val_corpus.info)}

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The corpus's; it says whether the training split has the end of text."""
        return learnt_tokenizer(self.corpus, self.train)

    def windows(self, context_length: int) -> dict[str, Any]:
        """What the windows of "train" and "val" are read from: ids, or whole conversations.

        Raises:
            UserError: no answer of a split fits into a window.
        """
        found: dict[str, Any] = {}
        for name, tokens, flags in (
            ("train", self.train, self.train_flags),
            ("val", self.val, self.val_flags),
        ):
            found[name] = tokens
            if flags is not None:
                found[name] = Packs(
                    tokens, flags, context_length + 1, self.tokenizer.end_of_text or 0
                )
                if not len(found[name]):
                    split = {"train": "training", "val": "validation"}[name]
                    raise UserError(
                        f"no conversation of the {split} split has an answer within the first "
                        f"{context_length + 1:,} tokens",
                        field="context_length",
                        value=context_length,
                        hint="use longer windows, or more conversations",
                    )
        return found

    def remember(self, name: str, compute: Callable[[], Any]) -> Any:
        """As `Corpus.remember`, for what depends on both splits."""
        split = len(self.train) if self.is_one_text else self.val_corpus.folder.name
        return self.corpus.remember(f"{name}-{split}", compute)


def learnt_tokenizer(corpus: Corpus, train: np.ndarray) -> Tokenizer:
    """The tokenizer of a model that learns these tokens (M,) of a corpus."""
    tokenizer = corpus.tokenizer
    if tokenizer.end_of_text is None or tokenizer.end_is_used:
        return tokenizer
    is_used = bool(corpus.info.num_documents or corpus.info.file_ends)
    if is_used and isinstance(train, np.ndarray):  # of a store, not all is fetched
        is_used = any(tokenizer.end_of_text in part for part in chunks(train, CHUNK))
    return tokenizer.with_end_used(is_used)


def validation_vocabulary(corpus: Corpus, vocabulary: Vocabulary) -> Vocabulary:
    """The tokenizer, as a model of this corpus learns it, for a text that validates."""
    tokenizer = learnt_tokenizer(corpus, corpus.tokens)
    return Vocabulary(
        tokenizer, ends_files=vocabulary.ends_files and tokenizer.learnt_end is not None
    )


def split_text(text: TextFiles, vocabulary: Vocabulary, train_fraction: float) -> Splits:
    """The first part of a text trains, the rest validates; no conversation is in both.

    Raises:
        UserError: as for `load_corpus`, or there is only one conversation.
    """
    corpus = load_corpus(text, vocabulary, train_fraction)
    tokens = corpus.tokens
    cut = corpus.info.compact_tokens
    if cut is None:
        cut = split_at(len(tokens), train_fraction)
    flags = corpus.flags
    if flags is None:
        return Splits(tokens[:cut], tokens[cut:], corpus, corpus)
    starts = np.flatnonzero(is_start(flags))
    if len(starts) < 2:
        raise UserError(
            "holds one conversation, and at least two are needed: one trains, one validates",
            field="path",
            value=text.path,
            hint="add more, or others to validate with `val_path`",
        )
    # The one that the cut is in trains, unless it is the last.
    cut = int(starts[min(int(np.searchsorted(starts, cut)), len(starts) - 1)])
    return Splits(tokens[:cut], tokens[cut:], corpus, corpus, flags[:cut], flags[cut:])


@contextmanager
def naming_val_path() -> Iterator[None]:
    """Makes an error about the `path` of the validation text name `val_path` instead."""
    try:
        yield
    except UserError as error:
        if error.field == "path":
            error.field = "val_path"
        raise


def two_texts(text: TextFiles, val_path: str | list[str], vocabulary: Vocabulary) -> Splits:
    """All of a text trains; another one, encoded by the same tokenizer, validates.

    Raises:
        UserError: as for `load_corpus`, or the texts share a file.
    """
    corpus = load_corpus(text, vocabulary, needs_fields=False)
    same = validation_vocabulary(corpus, vocabulary)
    with naming_val_path():
        val_corpus = load_corpus(
            replace(text, path=val_path), same, needs_end=False, needs_fields=False
        )
    train_files = {os.path.realpath(path) for path in corpus.reader.paths}
    for path in val_corpus.reader.paths:
        if os.path.realpath(path) in train_files:
            raise UserError(
                f"{path} is among the training files too",
                field="val_path",
                value=val_path,
                hint="leave it out of `path`, in a folder with `exclude`",
            )
    has_documents = corpus.reader.has_documents or val_corpus.reader.has_documents
    if text.text_field is not None and not has_documents:
        raise no_fields(text.text_field, "`path` or `val_path`")
    flags = (corpus.flags, val_corpus.flags)
    return Splits(corpus.tokens, val_corpus.tokens, corpus, val_corpus, *flags)
