"""The tokens of a text on disk: written piece by piece, continued after a kill, checked.

A folder has `tokens.bin` and `meta.json`, which is written last; of conversations also `flags.bin`,
a byte for each token: whether it is learnt, and whether it begins a conversation. While the text is
encoded, also `ids.bin` (ids of the full vocabulary) and `mark.json` (how much of it is safely on
the disk).
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import sys
import time
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, closing, suppress
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from lit_gpt import storage
from lit_gpt.text.answers import ID, START, encode_conversations, split_flags
from lit_gpt.text.chat import ChatTemplate
from lit_gpt.text.cutting import cut_safely
from lit_gpt.text.encoding_pool import batches, encode_in_order
from lit_gpt.text.files import COUNTED, Reader
from lit_gpt.text.manifest import is_settled
from lit_gpt.text.tokenizer import END_OF_TEXT, Tokenizer

CHUNK = 1 << 20  # ids renumbered at a time
BLOCK = 1 << 24  # bytes of tokens.bin that have a checksum of their own
CHECKED = 64  # blocks checked at each start, of a file that has been checked in full
MARKED = 5.0  # seconds of work that a kill costs at most
ENDS = 1000  # batches whose ends are kept
IDS = "ids.bin"
MARK = "mark.json"
TOKENS = "tokens.bin"
META = "meta.json"
FLAGS = "flags.bin"
CHECKSUMS = "checksums.json"


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
    file_ends: int | None = None  # end-of-text tokens between plain files; None: joined as before
    compact_tokens: int | None = None  # of the training split, if a compact vocabulary is from it

    @property
    def changes(self) -> list[tuple[str, int]]:
        """What there is to say about how the text was read: names, and numbers above 0."""
        titles = {**COUNTED, "cut_words": "Overlong words cut"}
        numbers = ((title, getattr(self, name)) for name, title in titles.items())
        return [(title, number) for title, number in numbers if number]


class TokenFile(NamedTuple):
    tokens: np.ndarray  # (N,) uint16 or uint32, memory-mapped
    tokenizer: Tokenizer
    info: CorpusInfo
    flags: np.ndarray | None  # (N,) uint8 of conversations, memory-mapped: see answers.split_flags


@dataclass
class Mark:
    """Up to where ids.bin is safely on the disk.

    Args:
        num_parts: of the text, that are encoded.
        num_characters: in them, which shows whether a later release cuts the text there too.
        num_ids: of them.
        crc32: of the ids.
        tokenizer: sha256 of the one whose ids they are.
        ends: parts and ids up to the end of a batch, for some batches.
    """

    num_parts: int = 0
    num_characters: int = 0
    num_ids: int = 0
    crc32: int = 0
    tokenizer: str = ""
    ends: list[tuple[int, int]] = field(default_factory=list)


def split_at(num_tokens: int, train_fraction: float) -> int:
    """Number of tokens in the training split, which comes first; the rest is for validation."""
    return int(num_tokens * train_fraction)


def smallest_dtype(tokenizer: Tokenizer) -> np.dtype:
    """The type that ids are stored in: uint16 or uint32."""
    return np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)


def texts_for(reader: Reader, tokenizer: Tokenizer) -> Iterable[str | None]:
    """The text; a blank line ends a document where no token does.

    The tokenizer may have no such token, or its model never learnt it and is not to learn it now.
    """
    if tokenizer.end_of_text is not None and (reader.ends_files or tokenizer.end_is_used):
        return reader
    return (END_OF_TEXT.decode() if text is None else text for text in reader)


class _Ids:
    """The ids of the full vocabulary, in a file that is continued where it was left."""

    def __init__(self, folder: Path, tokenizer: Tokenizer) -> None:
        self.path = folder / IDS
        self._mark_path = folder / MARK
        self._tokenizer = tokenizer
        self.counts = np.zeros(tokenizer.vocab_size, dtype=np.int64)  # of each token
        self.mark = Mark()
        self._file = self._continued()
        self._marked = time.monotonic()

    @cached_property
    def _digest(self) -> str:
        return hashlib.sha256(json.dumps(self._tokenizer.to_dict()).encode()).hexdigest()

    def _continued(self) -> IO[bytes]:
        """The file up to its mark, or an empty one."""
        with suppress(OSError, ValueError, TypeError):
            mark = Mark(**storage.read_json(self._mark_path))
            counts = np.zeros_like(self.counts)
            crc32 = num_ids = 0
            if mark.tokenizer == self._digest:
                with self.path.open("rb") as file:
                    for ids in _read_ids(file, mark.num_ids):
                        crc32 = zlib.crc32(ids.data, crc32)
                        counts += np.bincount(ids & np.uint32(ID), minlength=len(counts))
                        num_ids += len(ids)
                if (num_ids, crc32) == (mark.num_ids, mark.crc32):
                    os.truncate(self.path, 4 * num_ids)
                    self.mark = mark
                    self.counts = counts
                    return self.path.open("ab")
        self._mark_path.unlink(missing_ok=True)
        return self.path.open("wb")

    def add(self, texts: list[Any], ids: np.ndarray) -> None:
        self._file.write(ids.data)
        self.mark.crc32 = zlib.crc32(ids.data, self.mark.crc32)
        np.add.at(self.counts, ids & np.uint32(ID), 1)
        self.mark.num_ids += len(ids)
        self.mark.num_parts += len(texts)
        self.mark.num_characters += sum(len(text or "") for text in texts)
        self.mark.ends.append((self.mark.num_parts, self.mark.num_ids))
        if len(self.mark.ends) > ENDS:
            del self.mark.ends[::2]
        if time.monotonic() - self._marked >= MARKED:
            storage.flush(self._file)
            self.mark.tokenizer = self._digest
            storage.write_json(self._mark_path, asdict(self.mark))
            self._marked = time.monotonic()

    def close(self) -> None:
        self._file.close()

    def start_from(self, at: int) -> int:
        """Where the first conversation from there on begins, or else the last."""
        found = read = 0
        for ids in self._ids():
            starts = read + np.flatnonzero(ids & np.uint32(START))
            if len(starts):
                found = int(starts[min(int(np.searchsorted(starts, at)), len(starts) - 1)])
            if found >= at:
                break
            read += len(ids)
        return found

    def used(self, num_ids: int) -> np.ndarray:
        """The distinct ones among the first ids."""
        counts = np.zeros_like(self.counts)
        for ids in self._ids(num_ids):
            counts += np.bincount(ids & np.uint32(ID), minlength=len(counts))
        return np.flatnonzero(counts)

    def known(self, new_ids: np.ndarray) -> tuple[int, int]:
        """How many parts and ids precede the first token that has no new id, in whole batches."""
        at = 0
        for ids in self._ids():
            unknown = np.flatnonzero(new_ids[ids & np.uint32(ID)] < 0)
            if len(unknown):
                at += int(unknown[0])
                break
            at += len(ids)
        return max(((parts, ids) for parts, ids in self.mark.ends if ids <= at), default=(0, 0))

    def renumbered(self, new_ids: np.ndarray, most: int) -> Iterator[tuple[np.ndarray, ...]]:
        """The first ids by their new numbers, and their flags."""
        for ids in self._ids(most):
            ids, flags = split_flags(ids)
            yield new_ids[ids], flags

    def _ids(self, most: int | None = None) -> Iterator[np.ndarray]:
        with self.path.open("rb") as file:
            yield from _read_ids(file, self.mark.num_ids if most is None else most)

    def remove(self) -> None:
        self.close()
        self.path.unlink()
        self._mark_path.unlink(missing_ok=True)


def _read_ids(file: IO[bytes], most: int) -> Iterator[np.ndarray]:
    while most > 0 and len(ids := np.fromfile(file, np.uint32, min(CHUNK, most))):
        most -= len(ids)
        yield ids


def encode(
    folder: Path, reader: Reader, full: Tokenizer, train_fraction: float | None = None
) -> None:
    """Writes tokens.bin and meta.json.

    All text is encoded by the full vocabulary first. A compact one keeps the tokens of the training
    split. Up to the last noted batch before a token that it lacks, ids are renumbered; the rest of
    the text is encoded again. A continued encoding reads what is already encoded, to find its
    place, but doesn't encode it twice.

    Args:
        train_fraction: share of the tokens, from the front, that a compact vocabulary is made from
            (1: all); None: no compact vocabulary.
    """
    kept = _Ids(folder, full)
    cuts: Counter[str] = Counter()
    reader.task = "Encoding the text"
    with closing(kept), closing(_parts(reader, full, cuts)) as parts:
        if begun := kept.mark.num_characters:
            print(f"{begun:,} characters are already encoded: continuing there", file=sys.stderr)
        again = islice(parts, kept.mark.num_parts)
        if sum(len(part or "") for part in again) != begun:
            kept.remove()
            return encode(folder, reader, full, train_fraction)
        with closing(_encoded(parts, reader, full)) as encoded:
            for texts, ids in encoded:
                kept.add(texts, ids)
    tokenizer = full
    new_ids = np.arange(full.vocab_size)
    parts_known, ids_known = kept.mark.num_parts, kept.mark.num_ids
    compact_tokens = None
    if train_fraction == 1:
        tokenizer, new_ids = full.compact(np.flatnonzero(kept.counts))
    elif train_fraction is not None:
        compact_tokens = split_at(ids_known, train_fraction)
        if reader.is_chat:
            compact_tokens = kept.start_from(compact_tokens)
        tokenizer, new_ids = full.compact(kept.used(compact_tokens))
        parts_known, ids_known = kept.known(new_ids)
    types = [smallest_dtype(tokenizer), np.dtype(np.uint8)]
    paths = [folder / TOKENS, folder / FLAGS] if reader.is_chat else [folder / TOKENS]
    with ExitStack() as stack:
        rows: Any = kept.renumbered(new_ids, ids_known)
        if parts_known < kept.mark.num_parts:
            parts = stack.enter_context(closing(_parts(reader, tokenizer)))
            unknown = _encoded(islice(parts, parts_known, None), reader, tokenizer)
            encoded = stack.enter_context(closing(unknown))
            rows = chain(rows, (split_flags(ids) for _, ids in encoded))
        num_tokens, checksums = _write(paths, types, rows)
    counts: dict[str, Any] = {**reader.counts}
    if not reader.ends_files:
        counts["file_ends"] = None
    info = CorpusInfo(
        fingerprint=reader.fingerprint,
        num_characters=kept.mark.num_characters,
        num_bytes=int(kept.counts @ full.token_lengths()),
        num_tokens=num_tokens,
        cut_words=cuts["words"],
        compact_tokens=compact_tokens,
        **counts,
    )
    kept.remove()
    meta = {"info": asdict(info), "dtype": types[0].name, "tokenizer": tokenizer.to_dict()}
    keys = ("crc32", "flags_crc32")
    storage.write_json(folder / META, meta | dict(zip(keys, checksums, strict=False)))


def _parts(reader: Reader, tokenizer: Tokenizer, cuts: Counter[str] | None = None) -> Any:
    """The text, in parts that encode one by one."""
    if reader.is_chat:
        return reader.conversations()
    return cut_safely(texts_for(reader, tokenizer), tokenizer.pattern, cuts)


def _encoded(parts: Any, reader: Reader, tokenizer: Tokenizer) -> Any:
    """Batches of the parts, and the ids of each batch."""
    encode_parts: Any = tokenizer.encode_parts
    if reader.is_chat:
        template = ChatTemplate.of(tokenizer)
        encode_parts = partial(encode_conversations, tokenizer, template, reader.loss_on)
    return encode_in_order(encode_parts, batches(parts))


def _write(
    paths: list[Path], types: list[np.dtype], rows: Iterable[tuple[np.ndarray, ...]]
) -> tuple[int, list[int]]:
    """Writes each column of the rows to a file; returns its length, and the CRC-32 of each."""
    checksums = [0] * len(paths)
    length = 0
    with ExitStack() as stack:
        files = [stack.enter_context(path.open("wb")) for path in paths]
        for row in rows:
            length += len(row[0])
            for i, file in enumerate(files):
                values = row[i].astype(types[i])
                checksums[i] = zlib.crc32(values.data, checksums[i])
                file.write(values.data)
        for file in files:
            storage.flush(file)
    return length, checksums


def is_begun(folder: Path) -> bool:
    """Whether a part of a text is encoded there, to be continued."""
    return (folder / MARK).exists()


def open_tokens(folder: Path, is_checked: bool = False) -> TokenFile | None:
    """The encoded text; None if there is none or it is damaged.

    All of it is read, which takes a third of a second for 1 GB, unless it has more than CHECKED
    blocks and was read before, and its size and times are still the same: then so many of them.

    Args:
        is_checked: whether another process has just done that.
    """
    path = folder / TOKENS
    try:
        meta = storage.read_json(folder / META)
        info = CorpusInfo(**meta["info"])
        tokenizer = Tokenizer.from_dict(meta["tokenizer"])
        # As a plain view: indexing a memmap is slow.
        tokens = np.asarray(np.memmap(path, dtype=meta["dtype"], mode="r"))
        if len(tokens) != info.num_tokens or path.stat().st_size != tokens.nbytes:
            return None
        if not is_checked and not _is_whole(path, meta, tokenizer.vocab_size):
            return None
        flags = _open_flags(folder / FLAGS, meta, info.num_tokens, is_checked)
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return TokenFile(tokens, tokenizer, info, flags)


def _open_flags(path: Path, meta: dict[str, Any], size: int, is_checked: bool) -> np.ndarray | None:
    """The flags of conversations; None of any other text. ValueError: they are damaged."""
    if "flags_crc32" not in meta:
        return None
    is_whole = path.stat().st_size == size
    if is_whole and not is_checked:
        checksum = 0
        with path.open("rb") as file:
            while block := file.read(BLOCK):
                checksum = zlib.crc32(block, checksum)
        is_whole = checksum == meta["flags_crc32"]
    if not is_whole:
        raise ValueError(f"{path} is damaged")
    return np.asarray(np.memmap(path, dtype=np.uint8, mode="r"))


def _is_whole(path: Path, meta: dict[str, Any], vocab_size: int) -> bool:
    """Whether the tokens are those that were written, and all in the vocabulary.

    The file is read, not mapped: mapped pages would count as memory of this process.
    """
    known = path.with_name(CHECKSUMS)
    num_blocks = -(-path.stat().st_size // BLOCK)
    with path.open("rb") as file:
        stat = os.fstat(file.fileno())
        stamp = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
        if num_blocks > CHECKED:
            with suppress(OSError, ValueError, LookupError, TypeError):
                earlier = storage.read_json(known)
                if earlier["stamp"] == stamp:
                    places = random.SystemRandom().sample(range(num_blocks), CHECKED)
                    return all(_checksum(file, i) == earlier["crc32"][i] for i in places)
        total = 0
        checksums = []
        while block := file.read(BLOCK):
            total = zlib.crc32(block, total)
            if num_blocks > CHECKED:
                checksums.append(zlib.crc32(block))
            if np.frombuffer(block, meta["dtype"]).max() >= vocab_size:
                return False
        if total == meta["crc32"] and checksums and is_settled(stat):
            with suppress(OSError):
                storage.write_json(known, {"stamp": stamp, "crc32": checksums})
    return total == meta["crc32"]


def _checksum(file: IO[bytes], block: int) -> int:
    file.seek(block * BLOCK)
    return zlib.crc32(file.read(BLOCK))
