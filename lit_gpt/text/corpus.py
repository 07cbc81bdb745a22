"""Owns the way from text to one token array on disk, cached by content.

Text is read and encoded piece by piece, so memory does not grow with the corpus.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from copy import copy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lit_gpt.errors import UserError
from lit_gpt.storage import (
    cache_folder,
    flush,
    remove_abandoned,
    temporary_folder,
    write_whole,
)
from lit_gpt.text import bpe
from lit_gpt.text.bpe import Train
from lit_gpt.text.files import Reader, find_files, hash_files
from lit_gpt.text.tokenizer import Tokenizer
from lit_gpt.text.vocabularies import find_vocabulary

CACHE_VERSION = 3  # a part of every cache's key: raise it when what is stored changes
CHUNK = 1 << 20  # ids renumbered at a time
SHORT = 1000  # characters: what shorter parts cost to encode is mostly the call
CAREFUL = 0.98  # of the training split's bytes, as guessed before there are tokens, trains bpe:N

# No split pattern of tiktoken's joins a letter or digit with white space or punctuation after it
# (save the apostrophe of "it's"), nor looks back, so text may be cut there and encoded in parts.
# Matches up to the last such place.
SAFE_CUT = re.compile(r".*[^\W_](?=[\s,.;:!?()，。、；：！？（）“”《》])", re.DOTALL)


@dataclass(frozen=True)
class CorpusInfo:
    """What is known of a corpus besides its tokens."""

    fingerprint: str  # sha256 of the files' bytes and ends, and how they are read as documents
    num_characters: int
    num_bytes: int  # of the text as UTF-8
    num_tokens: int
    removed_boms: int  # byte-order marks at the start of files: the only text that is dropped
    added_line_ends: int  # between files, where one ended without: the only text that is added
    num_documents: int  # each followed by an end-of-text token; 0 for plain text alone
    empty_documents: int  # left out: null or without a character


@dataclass(frozen=True)
class Corpus:
    tokens: np.ndarray  # (num_tokens,) uint16 or uint32, memory-mapped
    tokenizer: Tokenizer
    info: CorpusInfo
    folder: Path  # of the cache

    def remember(self, name: str, compute: Callable[[], Any]) -> Any:
        """What `compute` gives, as plain JSON; kept beside the tokens, so computed but once."""
        path = self.folder / f"{name}.json"
        with suppress(OSError, ValueError):
            return json.loads(path.read_text(encoding="utf-8"))
        value = compute()
        with suppress(OSError):  # where it can't be kept, it is computed again next time
            write_whole(path, json.dumps(value))
        return value


def load_corpus(
    path: str | list[str],
    tokenizer: str | Tokenizer,
    compact: bool,
    encoding: str,
    cache: str,
    train_fraction: float = 1.0,
    text_field: str | None = None,
) -> Corpus:
    """The tokens of the files that `path` leads to, see `find_files`, in that order.

    Encodes once; later calls with the same text and options map the cached array. bpe:N trains
    the vocabulary, on the first `train_fraction` of the text, and keeps it whole. There is an
    end-of-text token only where a file has documents, see `Reader`.

    Raises:
        UserError: the path, the text or the tokenizer can't be used.
    """
    label, compact, load = find_vocabulary(tokenizer, compact, train_fraction)
    files = find_files(path)
    fingerprint = hash_files(files, text_field)
    options = json.dumps([CACHE_VERSION, fingerprint, label, compact, encoding])
    folder = cache_folder(cache) / hashlib.sha256(options.encode()).hexdigest()[:24]
    if corpus := _open(folder):
        return corpus
    full, reader = load(), Reader(files, encoding, fingerprint, text_field)
    if not isinstance(full, Tokenizer):
        _encode_into(folder, reader, _build_trained, full, train_fraction)
    else:
        full = _with_end_of_text(full, reader, is_given=full is tokenizer)
        _encode_into(folder, reader, _build, full, compact)
    corpus = _open(folder)
    assert corpus, f"{folder} was written and can't be read"
    return corpus


def _with_end_of_text(full: Tokenizer, reader: Reader, is_given: bool = False) -> Tokenizer:
    """The tokenizer that the files need: documents end with a token."""
    if not reader.has_documents or full.end_of_text is not None:
        return full
    if is_given:
        raise UserError(
            "--data.path has documents, and the tokenizer of the model has no end-of-text token "
            "to put after them, as it comes from plain text: give plain text, or train a model "
            "of its own"
        )
    return full.with_end_of_text()


def _encode_into(folder: Path, reader: Reader, build: Callable, *options: Any) -> None:
    """Makes the folder, whole or not at all."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned(folder.parent)
        with temporary_folder(folder.parent) as work:
            new = work / "corpus"
            new.mkdir(mode=0o700)  # a text may be private
            build(new, reader, *options)
            if folder.exists() and not _open(folder):
                shutil.rmtree(folder, ignore_errors=True)  # damaged
            new.rename(folder)  # fails if another process was quicker
    except OSError as error:
        if not _open(folder):
            raise UserError(
                f"cannot keep the tokens in {folder.parent}: {error.strerror}; "
                "name another folder with --data.cache"
            ) from error


def cut_safely(texts: Iterable[str | None]) -> Iterator[str | None]:
    """The same text in parts that encode, one by one, to the tokens of the whole.

    None, the end of a document, comes where it did, and no part reaches over it.
    """
    rest = ""
    for text in texts:
        if text is None:
            if rest:
                yield rest
            rest = ""
            yield None
            continue
        rest += text
        if cut := SAFE_CUT.match(rest):
            yield cut.group()
            rest = rest[cut.end() :]
    if rest:
        yield rest


def _batches(parts: Iterable[str | None]) -> Iterator[list[str | None]]:
    """Eight parts at a time, more of them where they are short documents."""
    batch, size = [], 0
    for part in parts:
        batch.append(part)
        size += 1 + min(len(part or ""), SHORT)
        if size > 8 * SHORT:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _build(folder: Path, reader: Reader, full: Tokenizer, compact: bool) -> None:
    """Writes tokens.bin and meta.json: full ids first, renumbered once the used ones are known."""
    used = np.zeros(full.vocab_size, dtype=bool)
    num_characters = num_tokens = num_bytes = 0
    with (folder / "ids.bin").open("wb") as file:
        for texts in _batches(cut_safely(reader)):
            ids = full.encode_parts(texts)
            used[ids] = True
            num_characters += sum(len(text) for text in texts if text is not None)
            num_tokens += len(ids)
            file.write(ids.tobytes())
    tokenizer, new_ids = full, np.arange(full.vocab_size)
    if compact:
        tokenizer, new_ids = full.compact(np.flatnonzero(used))
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    lengths = tokenizer.token_lengths()
    with (folder / "ids.bin").open("rb") as ids, (folder / "tokens.bin").open("wb") as file:
        while len(chunk := np.fromfile(ids, np.uint32, CHUNK)):
            part = new_ids[chunk]
            num_bytes += int(lengths[part].sum())
            file.write(part.astype(dtype).tobytes())
        flush(file)
    (folder / "ids.bin").unlink()
    info = CorpusInfo(
        fingerprint=reader.fingerprint,
        num_characters=num_characters,
        num_bytes=num_bytes,
        num_tokens=num_tokens,
        removed_boms=reader.removed_boms,
        added_line_ends=reader.added_line_ends,
        num_documents=reader.num_documents,
        empty_documents=reader.empty_documents,
    )
    meta = {"info": asdict(info), "dtype": np.dtype(dtype).name, "tokenizer": tokenizer.to_dict()}
    with (folder / "meta.json").open("w", encoding="utf-8") as file:
        json.dump(meta, file)
        flush(file)


def split_at(num_tokens: int, train_fraction: float) -> int:
    """How many tokens, from the front, train; the rest validates."""
    return int(num_tokens * train_fraction)


def _build_trained(folder: Path, reader: Reader, train: Train, train_fraction: float) -> None:
    """Trains the vocabulary on the training split and encodes the text with it.

    The split is counted in tokens, and before there is a vocabulary there are none. So it is
    trained on a little less than that share of the bytes, and should these reach into the
    validation split after all (a text whose tokens get longer towards its end), again on less:
    no byte of the validation text is ever used.
    """
    allowed = sum(len(text.encode()) for text in copy(reader) if text)
    if train_fraction < 1:
        allowed = int(allowed * train_fraction * CAREFUL)
    while True:
        texts = bpe.training_text(cut_safely(copy(reader)), allowed)
        _build(folder, copy(reader), _with_end_of_text(train(texts), reader), compact=False)
        split = _bytes_before_split(folder, train_fraction)
        if allowed <= split:
            return
        allowed = int(split * CAREFUL)


def _bytes_before_split(folder: Path, train_fraction: float) -> int:
    corpus = _open(folder)
    lengths, split = corpus.tokenizer.token_lengths(), split_at(len(corpus.tokens), train_fraction)
    starts = range(0, split, CHUNK)
    return sum(int(lengths[corpus.tokens[i : min(i + CHUNK, split)]].sum()) for i in starts)


def _open(folder: Path) -> Corpus | None:
    """The cached corpus; None where there is none or it is damaged."""
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        info, tokenizer = CorpusInfo(**meta["info"]), Tokenizer.from_dict(meta["tokenizer"])
        # As a plain view: numpy is slow to index a memmap.
        tokens = np.asarray(np.memmap(folder / "tokens.bin", dtype=meta["dtype"], mode="r"))
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return Corpus(tokens, tokenizer, info, folder) if len(tokens) == info.num_tokens else None


@dataclass(frozen=True)
class TextSource:
    """A text, and how it is read."""

    path: str | list[str]
    encoding: str
    text_field: str | None

    def load(self, tokenizer: Tokenizer, cache: str) -> Corpus:
        options = (False, self.encoding, cache)
        return load_corpus(self.path, tokenizer, *options, text_field=self.text_field)

    def parts(self, corpus: Corpus) -> Iterator[str | None]:
        """What `corpus` was encoded from, part by part; None ends a document."""
        fingerprint = corpus.info.fingerprint
        reader = Reader(find_files(self.path), self.encoding, fingerprint, self.text_field)
        return cut_safely(reader)
