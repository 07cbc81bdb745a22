"""A token store as the two splits of a text."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from lit_gpt import storage
from lit_gpt.errors import UserError
from lit_gpt.store.block_files import BlockFiles
from lit_gpt.store.index import Index, read_index
from lit_gpt.store.objects import Objects
from lit_gpt.store.reading import KEPT, Blocks, Shards, StoreTokens
from lit_gpt.text.corpus import Corpus, split_at
from lit_gpt.text.splits import Splits
from lit_gpt.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class NoFiles:
    """In the place of a `Reader`: what there is to know of the files is in the index."""

    has_documents: bool
    files: tuple[Any, ...] = ()
    excluded: Counter[str] = field(default_factory=Counter)


def open_splits(
    path: str,
    train_fraction: float,
    tokenizer: str | Tokenizer | None = None,
    cache: str | None = None,
) -> Splits:
    """The first part of a store trains, the rest validates, as of one text.

    Args:
        path: a folder or an address.
        tokenizer: the one asked for: an option, or a model's own; None: the store's.
        cache: folder for blocks of a store in object storage; None: the platform's cache folder.

    Raises:
        UserError: it is not a finished store, can't be read, or has another tokenizer.
    """
    objects = Objects(path)
    index = read_index(objects)
    check_tokenizer(index, path, tokenizer)
    folder = storage.cache_folder(cache) / f"store-{index.info.fingerprint[:24]}"
    shards = Shards(objects, index)
    files = BlockFiles(folder, shards.dtype, KEPT) if objects.is_remote else None
    info = index.info
    tokens = StoreTokens(Blocks(shards, files), 0, info.num_tokens)
    reader: Any = NoFiles(info.num_documents > 0)
    # StoreTokens does what training and evaluation ask of an array.
    corpus = Corpus(tokens, index.tokenizer, info, folder, reader)  # type: ignore[arg-type]
    cut = split_at(info.num_tokens, train_fraction)
    return Splits(tokens[:cut], tokens[cut:], corpus, corpus)  # type: ignore[arg-type]


def check_tokenizer(index: Index, path: str, wanted: str | Tokenizer | None) -> None:
    """Refuses another tokenizer than the store's."""
    if isinstance(wanted, Tokenizer):
        if wanted != index.tokenizer:
            raise UserError(
                f"was encoded by another tokenizer ({index.tokenizer_option}) than the model's",
                field="path",
                value=path,
                hint="write a store with the model's: `lit-gpt prepare --data.tokenizer` takes a "
                ".ckpt file",
            )
    elif wanted not in (None, index.tokenizer_option):
        raise UserError(
            f"{path} was encoded by {index.tokenizer_option}",
            field="tokenizer",
            value=wanted,
            hint="leave it out, or write another store",
        )


def fingerprint_of(checksums: list[int], tokenizer: Tokenizer) -> str:
    """Identifies the tokens of a store, wherever it lies."""
    vocabulary = tokenizer.to_dict()["vocabulary"]
    return hashlib.sha256(f"{checksums} {vocabulary}".encode()).hexdigest()


def is_in(tokens: Any) -> bool:
    """Whether these tokens are fetched from a store where they are read."""
    return isinstance(tokens, StoreTokens)
