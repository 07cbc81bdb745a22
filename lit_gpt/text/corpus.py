"""From text files to one array of N token ids on disk, piece by piece and cached by content."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lit_gpt import storage
from lit_gpt.errors import UserError
from lit_gpt.text import bpe
from lit_gpt.text.cutting import cut_safely
from lit_gpt.text.files import COUNTED, Reader, TextFiles
from lit_gpt.text.overlap import chunks
from lit_gpt.text.tokenizer import END_OF_TEXT, Tokenizer
from lit_gpt.text.vocabularies import Vocabulary

CACHE_VERSION = 4  # part of every cache's key: raise it when what is stored changes
CHUNK = 1 << 20  # ids renumbered at a time
SHORT = 1000  # characters: encoding a shorter part costs little more than the call


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
    cut_words: int = 0  # places where a word of more than cutting.LONGEST characters was cut
    blank_lines: int = 0  # skipped, between the rows of .jsonl, .ndjson, .csv and .tsv files
    row_like_fields: int = 0  # of .csv files: over lines that look like rows

    @property
    def changes(self) -> list[tuple[str, int]]:
        """What there is to say about how the text was read: names, and numbers above 0."""
        titles = {**COUNTED, "cut_words": "Overlong words cut"}
        numbers = ((title, getattr(self, name)) for name, title in titles.items())
        return [(title, number) for title, number in numbers if number]


@dataclass(frozen=True)
class Corpus:
    tokens: np.ndarray  # (N,) uint16 or uint32, memory-mapped
    tokenizer: Tokenizer
    info: CorpusInfo
    folder: Path  # in the cache
    reader: Reader  # of the text

    def parts(self) -> Iterator[str | None]:
        """The text, read again, in parts that encode one by one; None ends a document."""
        return cut_safely(_texts(self.reader, self.tokenizer), self.tokenizer.pattern)

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


def _texts(reader: Reader, tokenizer: Tokenizer) -> Iterable[str | None]:
    """The text; a blank line ends a document where the tokenizer has no token for that."""
    if tokenizer.end_of_text is not None:
        return reader
    return (END_OF_TEXT.decode() if text is None else text for text in reader)


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


def _encode(folder: Path, reader: Reader, full: Tokenizer, compact: bool) -> None:
    """Writes tokens.bin and meta.json: first full ids, renumbered once the used ones are known."""
    counts = np.zeros(full.vocab_size, dtype=np.int64)  # of each token
    num_characters = 0
    cuts: Counter[str] = Counter()
    full_ids = folder / "ids.bin"
    with full_ids.open("wb") as file:
        for texts in _batches(cut_safely(_texts(reader, full), full.pattern, cuts)):
            ids = full.encode_parts(texts)
            file.write(ids.tobytes())
            np.add.at(counts, ids, 1)
            num_characters += sum(len(text or "") for text in texts)
    tokenizer = full
    new_ids = np.arange(full.vocab_size)
    if compact:
        tokenizer, new_ids = full.compact(np.flatnonzero(counts))
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
    checksum = 0
    with full_ids.open("rb") as old, (folder / "tokens.bin").open("wb") as new:
        while len(ids := np.fromfile(old, np.uint32, CHUNK)):
            content = new_ids[ids].astype(dtype).tobytes()
            checksum = zlib.crc32(content, checksum)
            new.write(content)
        storage.flush(new)
    full_ids.unlink()
    info = CorpusInfo(
        fingerprint=reader.fingerprint,
        num_characters=num_characters,
        num_bytes=int(counts @ full.token_lengths()),
        num_tokens=int(counts.sum()),
        cut_words=cuts["words"],
        **reader.counts,
    )
    meta = {"info": asdict(info), "dtype": dtype.name, "tokenizer": tokenizer.to_dict()}
    storage.write_json(folder / "meta.json", meta | {"crc32": checksum})


def split_at(num_tokens: int, train_fraction: float) -> int:
    """Number of tokens in the training split, which comes first; the rest is for validation."""
    return int(num_tokens * train_fraction)


def _open(folder: Path, reader: Reader) -> Corpus | None:
    """The cached corpus; None if there is none or it is damaged.

    All of it is read, which takes a third of a second for 1 GB.
    """
    try:
        meta = storage.read_json(folder / "meta.json")
        info = CorpusInfo(**meta["info"])
        tokenizer = Tokenizer.from_dict(meta["tokenizer"])
        # As a plain view: indexing a memmap is slow.
        tokens = np.asarray(np.memmap(folder / "tokens.bin", dtype=meta["dtype"], mode="r"))
        checksum = 0
        for ids in chunks(tokens, CHUNK):
            checksum = zlib.crc32(ids.data, checksum)
            if ids.max() >= tokenizer.vocab_size:
                return None
        is_whole = (len(tokens), checksum) == (info.num_tokens, meta["crc32"])
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return Corpus(tokens, tokenizer, info, folder, reader) if is_whole else None


@contextmanager
def _new_folder(folder: Path, reader: Reader) -> Iterator[Path]:
    """A new folder that becomes `folder` after the block, or is removed if the block fails."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        storage.remove_abandoned(folder.parent)
        with storage.temporary_folder(folder.parent) as work:
            new = work / "corpus"
            new.mkdir(mode=0o700)  # a text may be private
            yield new
            if not _open(folder, reader):
                shutil.rmtree(folder, ignore_errors=True)  # if it exists, it is damaged
            new.rename(folder)  # fails if another process was faster
    except OSError as error:
        if not _open(folder, reader):
            raise UserError(
                f"cannot store the tokens in {folder.parent}: {error.strerror}",
                field="cache",
                hint="name another folder",
            ) from error


def load_corpus(
    text: TextFiles,
    vocabulary: Vocabulary,
    train_fraction: float = 1.0,
    needs_end: bool = True,
    needs_fields: bool = True,
) -> Corpus:
    """The tokens of a text, encoded now or taken from the cache.

    Args:
        train_fraction: share of the text, from the front, that bpe:N and chars are made from.
        needs_end: whether to refuse documents if a model's tokenizer has no end-of-text token.
        needs_fields: see `Reader`.

    Raises:
        UserError: the text or the tokenizer can't be used.
    """
    key = vocabulary.key(train_fraction)
    reader = Reader(text, needs_fields)
    given = vocabulary.tokenizer if isinstance(vocabulary.tokenizer, Tokenizer) else None
    lacks_end = given is not None and given.end_of_text is None
    if reader.has_documents and lacks_end and needs_end:  # whether or not the cache has it
        raise UserError(
            "has documents, but the model's tokenizer has no end-of-text token for them",
            field="path",
            hint="use plain text, or train a new model",
        )
    options = [CACHE_VERSION, reader.fingerprint, key, vocabulary.is_compact, text.encoding]
    name = hashlib.sha256(json.dumps(options).encode()).hexdigest()[:24]
    folder = storage.cache_folder(text.cache) / name
    if corpus := _open(folder, reader):
        return corpus
    if folder.exists():
        print(f"The tokens in {folder} are damaged: encoding the text again", file=sys.stderr)
    if vocabulary.trained_size:
        train = bpe.load_trainer(vocabulary.trained_size)
        with _new_folder(folder, reader) as new:

            def encode(tokenizer: Tokenizer) -> np.ndarray:
                _encode(new, reader, tokenizer, compact=False)
                corpus = _open(new, reader)
                assert corpus
                return corpus.tokens[: split_at(len(corpus.tokens), train_fraction)]

            bpe.train_on_split(train, reader, train_fraction, encode)
    else:
        full = vocabulary.load(reader, train_fraction)
        if reader.has_documents and given is None:
            full = full.with_end_of_text()
        with _new_folder(folder, reader) as new:
            _encode(new, reader, full, vocabulary.is_compact)
    corpus = _open(folder, reader)
    assert corpus, f"{folder} was written but can't be read"
    return corpus
