"""From text files to one array of N token ids on disk, piece by piece and cached by content."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from lit_gpt import storage
from lit_gpt.errors import UserError
from lit_gpt.text import bpe
from lit_gpt.text.chat import PLAIN_SOURCE
from lit_gpt.text.cutting import cut_safely
from lit_gpt.text.encoding_pool import batches, encode_in_order
from lit_gpt.text.files import Reader, TextFiles
from lit_gpt.text.launch import texts_of_launch
from lit_gpt.text.manifest import Manifest
from lit_gpt.text.new_folder import new_folder
from lit_gpt.text.token_file import CorpusInfo, encode, open_tokens, split_at, texts_for
from lit_gpt.text.tokenizer import Tokenizer
from lit_gpt.text.vocabularies import Vocabulary

CACHE_VERSION = 4  # part of every cache's key: raise it when what is stored changes
CHAT_VERSION = 2  # part of the keys of conversations


@dataclass(frozen=True)
class Corpus:
    tokens: np.ndarray  # (N,) uint16 or uint32, memory-mapped
    tokenizer: Tokenizer
    info: CorpusInfo
    folder: Path  # in the cache
    reader: Reader  # of the text
    flags: np.ndarray | None = None  # (N,) uint8 of conversations: see answers.split_flags

    def parts(self) -> Iterator[str | None]:
        """The text, read again, in parts that encode one by one; None ends a document."""
        return cut_safely(texts_for(self.reader, self.tokenizer), self.tokenizer.pattern)

    @property
    def as_text(self) -> Corpus:
        """Conversations as plain text, to compare tokenizers on; any other text as it is."""
        if self.flags is None:
            return self
        with closing(encode_in_order(self.tokenizer.encode_parts, batches(self.parts()))) as pairs:
            ids = [ids for _, ids in pairs]
        return replace(self, tokens=np.concatenate(ids), flags=None)

    def remember(self, name: str, compute: Callable[[], Any]) -> Any:
        """The result of `compute`, plain JSON, kept beside the tokens for the next time."""
        path = self.folder / f"{name}.json"
        with suppress(OSError):
            try:
                return storage.read_json(path)
            except ValueError:
                print(f"{path} is damaged: computing it again", file=sys.stderr)
        value = compute()
        with suppress(OSError):
            storage.write_json(path, value)
        return value


def _open(folder: Path, reader: Reader, is_checked: bool = False) -> Corpus | None:
    """The cached corpus; None if there is none or it is damaged."""
    found = open_tokens(folder, is_checked)
    if found is None:
        return None
    return Corpus(found.tokens, found.tokenizer, found.info, folder, reader, found.flags)


def load_corpus(
    text: TextFiles,
    vocabulary: Vocabulary,
    train_fraction: float = 1.0,
    needs_end: bool = True,
    needs_fields: bool = True,
) -> Corpus:
    """The tokens of a text, encoded now or taken from the cache.

    Args:
        train_fraction: share of the text, from the front, that a vocabulary is made from.
        needs_end: whether to refuse documents if a model's tokenizer has no end-of-text token.
        needs_fields: see `Reader`.

    Raises:
        UserError: the text or the tokenizer can't be used.
    """
    given = vocabulary.tokenizer if isinstance(vocabulary.tokenizer, Tokenizer) else None
    lacks_end = given is not None and given.end_of_text is None
    share = vocabulary.compact_share(train_fraction)
    compact = {None: False, 1.0: True}.get(share, share)  # as in the keys of earlier releases
    key = [vocabulary.key(train_fraction), compact, text.encoding]
    cache = storage.cache_folder(text.cache)
    with texts_of_launch(cache) as texts:
        asked = _sha256([text.settings, *key])
        told = texts.find(asked)
        manifest = Manifest(cache, text.settings)
        reader = Reader(text, needs_fields, manifest, told and told[1], vocabulary.ends_files)
        # Whether or not the cache has it.
        if reader.has_documents and lacks_end and needs_end and not reader.is_chat:
            raise UserError(
                "has documents, but the model's tokenizer has no end-of-text token for them",
                field="path",
                hint="use plain text, or train a new model",
            )
        if told and (corpus := _open(cache / told[0], reader, is_checked=True)):
            return corpus
        if reader.is_chat:
            key += [CHAT_VERSION, reader.loss_on, PLAIN_SOURCE]
        folder = cache / _sha256([CACHE_VERSION, reader.fingerprint, *key])[:24]
        corpus = _open(folder, reader)
        if corpus is None:
            _encode(folder, reader, vocabulary, train_fraction, text)
            corpus = _open(folder, reader)
        assert corpus, f"{folder} was written but can't be read"
        texts.tell(asked, folder.name, reader.known)
        return corpus


def _sha256(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _encode(
    folder: Path, reader: Reader, vocabulary: Vocabulary, train_fraction: float, text: TextFiles
) -> None:
    # What can't be used is refused before any folder is made.
    if vocabulary.trained_size:
        train = bpe.load_trainer(vocabulary.trained_size, vocabulary.ends_files)
    else:
        full = vocabulary.load(reader, train_fraction)
        is_own = isinstance(vocabulary.tokenizer, Tokenizer)
        if reader.has_documents and not is_own and full.end_of_text is None:
            full = full.with_end_of_text()
    with new_folder(folder, reader, _sha256(text.settings)) as new:
        if new is None:  # another process was faster
            return
        if not vocabulary.trained_size:
            encode(new, reader, full, vocabulary.compact_share(train_fraction))
            return

        def ids_of_split(tokenizer: Tokenizer) -> np.ndarray:
            encode(new, reader, tokenizer)
            found = open_tokens(new)
            assert found
            return found.tokens[: split_at(len(found.tokens), train_fraction)]

        bpe.train_on_split(train, reader, train_fraction, ids_of_split)
