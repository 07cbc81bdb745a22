"""A token store as the two splits of a text."""

from __future__ import annotations

import hashlib
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from lit_gpt import storage
from lit_gpt.errors import UserError
from lit_gpt.store.block_files import BlockFiles
from lit_gpt.store.index import Index, read_index
from lit_gpt.store.objects import Objects
from lit_gpt.store.reading import KEPT, Blocks, Shards, StoreTokens
from lit_gpt.text.corpus import Corpus, load_corpus
from lit_gpt.text.files import TextFiles
from lit_gpt.text.finding import is_token_store
from lit_gpt.text.splits import Splits, validation_vocabulary
from lit_gpt.text.token_file import split_at
from lit_gpt.text.tokenizer import Tokenizer
from lit_gpt.text.vocabularies import Vocabulary

DEFAULT = "cl100k_base"  # of the option `tokenizer`: with a store, it stands for the store's
OF_FILES: dict[str, Any] = {
    "exclude": None,
    "encoding": "utf-8",
    "text_field": None,
    "tsv_quotes": False,
    "loss_on": None,
}


@dataclass(frozen=True)
class NoFiles:
    """In the place of a `Reader`: what there is to know of the files is in the index."""

    tokenizer_option: str
    has_documents: bool
    files: tuple[Any, ...] = ()
    excluded: Counter[str] = field(default_factory=Counter)


def open_splits(
    text: TextFiles,
    vocabulary: Vocabulary,
    train_fraction: float,
    val_path: str | list[str] | None = None,
) -> Splits:
    """The first part of a store trains, the rest validates; or all trains, another text validates.

    Args:
        text: its `path` is the store's; blocks from object storage are kept in its `cache`. The
            other fields are the validation text's.
        vocabulary: the one asked for.

    Raises:
        UserError: it is not a finished store, can't be read, or has another tokenizer.
    """
    assert isinstance(text.path, str)
    corpus = open_corpus(text.path, vocabulary, text.cache)
    if val_path is None:
        for name, default in OF_FILES.items():
            if (value := getattr(text, name)) != default:
                problem = "does not apply to a token store"
                raise UserError(problem, field=name, value=value, hint="leave it out")
        cut = split_at(len(corpus.tokens), train_fraction)
        return Splits(corpus.tokens[:cut], corpus.tokens[cut:], corpus, corpus)
    same = validation_vocabulary(corpus, vocabulary)
    if isinstance(val_path, str) and is_token_store(val_path):
        val_corpus = open_corpus(val_path, same, text.cache, "val_path")
    else:
        val_text = replace(text, path=val_path)
        val_corpus = load_corpus(val_text, same, needs_end=False, needs_fields=False)
    return Splits(corpus.tokens, val_corpus.tokens, corpus, val_corpus)


def open_corpus(
    path: str, vocabulary: Vocabulary, cache: str | None = None, field: str = "path"
) -> Corpus:
    """The tokens of a store, which are fetched where they are read."""
    objects = Objects(path, field)
    index = read_index(objects)
    check_tokenizer(index, objects, vocabulary.tokenizer)
    info = index.info
    folder = storage.cache_folder(cache) / f"store-{info.fingerprint[:24]}"
    shards = Shards(objects, index)
    if objects.is_remote:
        files = BlockFiles(folder, shards.dtype, KEPT)
    else:
        files = None
        with suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    # These do what training and evaluation ask of an array and of a reader.
    tokens: Any = StoreTokens(Blocks(shards, files), 0, info.num_tokens)
    reader: Any = NoFiles(index.tokenizer_option, info.num_documents > 0)
    return Corpus(tokens, index.tokenizer, info, folder, reader)


def check_tokenizer(index: Index, objects: Objects, wanted: str | Tokenizer) -> None:
    """Refuses another tokenizer than the store's."""
    if isinstance(wanted, Tokenizer):
        # Whether the model has learnt the end of text doesn't matter.
        if wanted.with_end_used(True) != index.tokenizer.with_end_used(True):
            raise UserError(
                f"was encoded by another tokenizer ({index.tokenizer_option}) than the model's",
                field=objects.field,
                value=objects.place,
                hint="use the text itself",
            )
    elif wanted not in (DEFAULT, index.tokenizer_option):
        raise UserError(
            f"{objects.place} was encoded by {index.tokenizer_option}",
            field="tokenizer",
            value=wanted,
            hint="leave it out, or write another store",
        )


def fingerprint_of(checksums: list[int], tokenizer: Tokenizer) -> str:
    """Identifies the tokens of a store, wherever it lies."""
    vocabulary = tokenizer.to_dict()["vocabulary"]
    return hashlib.sha256(f"{checksums} {vocabulary}".encode()).hexdigest()
