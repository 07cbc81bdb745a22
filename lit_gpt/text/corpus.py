"""From text files to one array of token ids on disk, cached by content.

`Reader` yields the text piece by piece; `cut_safely` cuts it where parts may be encoded one by one;
their ids are written as they come, then renumbered if the vocabulary is made compact. So memory
does not grow with the corpus. Shapes: N tokens.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from lit_gpt.errors import UserError
from lit_gpt.storage import cache_folder, flush, remove_abandoned, temporary_folder, write_whole
from lit_gpt.text import bpe
from lit_gpt.text.files import Reader, find_files
from lit_gpt.text.tokenizer import Tokenizer
from lit_gpt.text.vocabularies import Vocabulary

CACHE_VERSION = 3  # part of every cache's key: raise it when what is stored changes
CHUNK = 1 << 20  # ids renumbered at a time
SHORT = 1000  # characters: encoding a shorter part costs little more than the call
CAREFUL = 0.98  # share of the training split, estimated in bytes, that bpe:N is trained on at first

# No split pattern of tiktoken's joins a letter or digit with white space or punctuation after it
# (except for the apostrophe of "it's") or looks behind, so text may be cut there and encoded in
# parts. Matches up to the last such place.
SAFE_CUT = re.compile(r".*[^\W_](?=[\s,.;:!?()，。、；：！？（）“”《》])", re.DOTALL)


@dataclass(frozen=True)
class CorpusInfo:
    """What is known about a corpus besides its tokens."""

    fingerprint: str  # sha256 of the files' bytes and lengths, and how they are read as documents
    num_characters: int
    num_bytes: int  # of the text as UTF-8
    num_tokens: int
    removed_boms: int  # byte-order marks at the start of files: the only text that is dropped
    added_line_ends: int  # between files, if one ended without: the only text that is added
    num_documents: int  # each followed by an end-of-text token; 0 if there is only plain text
    empty_documents: int  # skipped: null or without a character


@dataclass(frozen=True)
class Corpus:
    tokens: np.ndarray  # (N,) uint16 or uint32, memory-mapped
    tokenizer: Tokenizer
    info: CorpusInfo
    folder: Path  # in the cache
    reader: Reader  # of the text

    def parts(self) -> Iterator[str | None]:
        """The text, read again, in parts that encode one by one; None ends a document."""
        return cut_safely(self.reader)

    def remember(self, name: str, compute: Callable[[], Any]) -> Any:
        """The result of `compute`, plain JSON, kept beside the tokens for the next time."""
        path = self.folder / f"{name}.json"
        with suppress(OSError, ValueError):
            return json.loads(path.read_text(encoding="utf-8"))
        value = compute()
        with suppress(OSError):  # if it can't be kept, it is computed again next time
            write_whole(path, json.dumps(value))
        return value


def cut_safely(texts: Iterable[str | None]) -> Iterator[str | None]:
    """The same text in parts that encode, one by one, to the tokens of the whole.

    None, the end of a document, stays where it is, and no part reaches across it.
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
    """Eight parts at a time, more if they are short documents."""
    batch: list[str | None] = []
    size = 0
    for part in parts:
        batch.append(part)
        size += 1 + min(len(part or ""), SHORT)
        if size > 8 * SHORT:
            yield batch
            batch = []
            size = 0
    if batch:
        yield batch


def _renumber(source: Path, target: Path, new_ids: np.ndarray) -> None:
    """Turns a file of old ids, uint32, into one of new ids."""
    with source.open("rb") as old, target.open("wb") as new:
        while len(ids := np.fromfile(old, np.uint32, CHUNK)):
            new.write(new_ids[ids].tobytes())
        flush(new)
    source.unlink()


def _encode(folder: Path, reader: Reader, full: Tokenizer, compact: bool) -> None:
    """Writes tokens.bin and meta.json: first full ids, renumbered once the used ones are known."""
    used = np.zeros(full.vocab_size, dtype=bool)
    lengths = full.token_lengths()
    num_characters = 0
    num_bytes = 0
    num_tokens = 0
    with (folder / "ids.bin").open("wb") as file:
        for texts in _batches(cut_safely(reader)):
            ids = full.encode_parts(texts)
            file.write(ids.tobytes())
            used[ids] = True
            num_characters += sum(len(text) for text in texts if text is not None)
            num_bytes += int(lengths[ids].sum())
            num_tokens += len(ids)
    tokenizer = full
    new_ids = np.arange(full.vocab_size)
    if compact:
        tokenizer, new_ids = full.compact(np.flatnonzero(used))
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
    _renumber(folder / "ids.bin", folder / "tokens.bin", new_ids.astype(dtype))
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
    meta = {"info": asdict(info), "dtype": dtype.name, "tokenizer": tokenizer.to_dict()}
    write_whole(folder / "meta.json", json.dumps(meta))


def split_at(num_tokens: int, train_fraction: float) -> int:
    """How many tokens, from the front, train; the rest validates."""
    return int(num_tokens * train_fraction)


def _train_and_encode(folder: Path, reader: Reader, train: bpe.Train, fraction: float) -> None:
    """Trains the vocabulary on the training split and encodes the text with it.

    The split is counted in tokens, which don't exist before the vocabulary. So training uses
    slightly less than that share of the bytes and, should these reach into the validation split
    after all (tokens get longer towards the end of the text), happens again on fewer: no byte of
    the validation text is ever used.
    """
    num_bytes = sum(len(text.encode()) for text in reader if text)
    if fraction < 1:
        num_bytes = int(num_bytes * fraction * CAREFUL)
    while True:
        tokenizer = train(bpe.training_text(cut_safely(reader), num_bytes))
        _encode(folder, reader, _with_end_of_text(tokenizer, reader), compact=False)
        split = _bytes_before_split(folder, reader, fraction)
        if num_bytes <= split:
            return
        num_bytes = int(split * CAREFUL)


def _bytes_before_split(folder: Path, reader: Reader, fraction: float) -> int:
    corpus = _open(folder, reader)
    assert corpus
    lengths = corpus.tokenizer.token_lengths()
    train_tokens = corpus.tokens[: split_at(len(corpus.tokens), fraction)]
    starts = range(0, len(train_tokens), CHUNK)
    return sum(int(lengths[train_tokens[i : i + CHUNK]].sum()) for i in starts)


def _with_end_of_text(tokenizer: Tokenizer, reader: Reader, is_given: bool = False) -> Tokenizer:
    """The tokenizer that the files need: documents end with a token."""
    if not reader.has_documents or tokenizer.end_of_text is not None:
        return tokenizer
    if is_given:
        raise UserError(
            "has documents, but the model's tokenizer has no end-of-text token to put after them, "
            "because the model was trained on plain text",
            field="path",
            hint="use plain text, or train a new model",
        )
    return tokenizer.with_end_of_text()


def _open(folder: Path, reader: Reader) -> Corpus | None:
    """The cached corpus; None if there is none or it is damaged."""
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        info = CorpusInfo(**meta["info"])
        tokenizer = Tokenizer.from_dict(meta["tokenizer"])
        # As a plain view: indexing a memmap is slow.
        tokens = np.asarray(np.memmap(folder / "tokens.bin", dtype=meta["dtype"], mode="r"))
    except (OSError, ValueError, LookupError, TypeError):
        return None
    if len(tokens) != info.num_tokens:
        return None
    return Corpus(tokens, tokenizer, info, folder, reader)


def load_corpus(
    path: str | list[str],
    tokenizer: str | Tokenizer,
    compact: bool,
    encoding: str,
    cache: str | None,
    train_fraction: float = 1.0,
    text_field: str | None = None,
) -> Corpus:
    """The tokens of the files that `path` names, in the order of `find_files`.

    Encodes once; later calls with the same text and options map the cached array. If a file has
    documents, see `Reader`, each is followed by an end-of-text token.

    Args:
        path: see `find_files`.
        tokenizer: see `Vocabulary`, like `compact`.
        encoding: of the files, by Python's name for it.
        cache: see `cache_folder`.
        train_fraction: share of the text, from the front, that bpe:N is trained on.
        text_field: the field or column that holds the documents, see `format_of`.

    Raises:
        UserError: the path, the text or the tokenizer can't be used.
    """
    vocabulary = Vocabulary(tokenizer, compact)
    key = vocabulary.key(train_fraction)
    reader = Reader(find_files(path), encoding, text_field)
    options = [CACHE_VERSION, reader.fingerprint, key, vocabulary.is_compact, encoding]
    name = hashlib.sha256(json.dumps(options).encode()).hexdigest()[:24]
    folder = cache_folder(cache) / name
    if corpus := _open(folder, reader):
        return corpus
    build: Callable[[Path], None]
    if vocabulary.trained_size:
        train = bpe.load_trainer(vocabulary.trained_size)
        build = partial(_train_and_encode, reader=reader, train=train, fraction=train_fraction)
    else:
        full = vocabulary.load()
        full = _with_end_of_text(full, reader, is_given=full is tokenizer)
        build = partial(_encode, reader=reader, full=full, compact=vocabulary.is_compact)
    _make_whole(folder, build, reader)
    corpus = _open(folder, reader)
    assert corpus, f"{folder} was written but can't be read"
    return corpus


def _make_whole(folder: Path, build: Callable[[Path], None], reader: Reader) -> None:
    """Makes the cache's folder, with everything in it or not at all."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned(folder.parent)
        with temporary_folder(folder.parent) as work:
            new = work / "corpus"
            new.mkdir(mode=0o700)  # a text may be private
            build(new)
            if folder.exists() and not _open(folder, reader):
                shutil.rmtree(folder, ignore_errors=True)  # damaged
            new.rename(folder)  # fails if another process was faster
    except OSError as error:
        if not _open(folder, reader):
            raise UserError(
                f"cannot keep the tokens in {folder.parent}: {error.strerror}",
                field="cache",
                hint="name another folder",
            ) from error
