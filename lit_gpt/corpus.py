"""Owns the way from text to one token array on disk, cached by content.

Text is read and encoded piece by piece, so memory does not grow with the corpus.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from filelock import FileLock, Timeout

from lit_gpt.errors import UserError
from lit_gpt.files import Reader, find_files, hash_files
from lit_gpt.tokenizer import Tokenizer, load_tokenizer

CACHE_VERSION = 3  # a part of every cache's key: raise it when what is stored changes
CHUNK = 1 << 20  # ids renumbered at a time
SHORT = 1000  # characters: what shorter parts cost to encode is mostly the call
ABANDONED = 60.0  # seconds: what nobody works on for that long may be removed
NO_LOCK = (OSError, NotImplementedError)  # what filelock raises where a file system has no locks

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
            unfinished = path.with_suffix(f".{os.getpid()}")
            unfinished.write_text(json.dumps(value), encoding="utf-8")
            unfinished.replace(path)
        return value


def load_corpus(
    path: str | list[str],
    tokenizer: str | Tokenizer,
    compact: bool,
    encoding: str,
    cache: str,
    text_field: str | None = None,
) -> Corpus:
    """The tokens of the files that `path` leads to, see `find_files`, in that order.

    Encodes once; later calls with the same text and options map the cached array. The vocabulary
    has an end-of-text token only where a file has documents, see `Reader`.

    Raises:
        UserError: the path, the text or the tokenizer can't be used.
    """
    files = find_files(path)
    fingerprint = hash_files(files, text_field)
    label = tokenizer if isinstance(tokenizer, str) else tokenizer.to_dict()
    options = json.dumps([CACHE_VERSION, fingerprint, label, compact, encoding])
    folder = _cache_folder(cache) / hashlib.sha256(options.encode()).hexdigest()[:24]
    if corpus := _open(folder):
        return corpus
    reader = Reader(files, encoding, fingerprint, text_field)
    full = load_tokenizer(tokenizer) if isinstance(tokenizer, str) else tokenizer
    if reader.has_documents and full.end_of_text is None:
        if full is tokenizer:
            raise UserError(
                f"{path} has documents, and the tokenizer of the checkpoint has no end-of-text "
                "token to put after them, as it comes from plain text: give plain text, or train "
                "a model of its own"
            )
        full = full.with_end_of_text()
    _encode_into(folder, reader, full, compact)
    corpus = _open(folder)
    assert corpus, f"{folder} was written and can't be read"
    return corpus


def _encode_into(folder: Path, reader: Reader, full: Tokenizer, compact: bool) -> None:
    """Makes the folder, whole or not at all."""
    work = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(folder.parent)
        work = Path(tempfile.mkdtemp(prefix="unfinished-", dir=folder.parent))
        with _locked(work):
            _build(work, reader, full, compact)
        if folder.exists() and not _open(folder):
            shutil.rmtree(folder, ignore_errors=True)  # damaged
        work.rename(folder)  # fails where another process was quicker
    except OSError as error:
        if not _open(folder):
            raise UserError(
                f"cannot keep the tokens in {folder.parent}: {error.strerror}; "
                "name another folder with --data.cache"
            ) from error
    finally:
        if work:
            shutil.rmtree(work, ignore_errors=True)


def _cache_folder(cache: str) -> Path:
    try:
        folder = Path(cache).expanduser()
        with suppress(OSError):
            folder.stat()
    except (RuntimeError, ValueError) as error:  # ~ of nobody; no name of a folder
        raise UserError(f"--data.cache {cache!r} can't be the name of a folder") from error
    return folder


@contextmanager
def _locked(work: Path) -> Iterator[None]:
    """Shows other processes that somebody works there; the lock goes when the process does."""
    lock = FileLock(work / "lock")
    with suppress(*NO_LOCK):
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
        (work / "lock").unlink(missing_ok=True)


def _remove_abandoned(cache: Path) -> None:
    """Removes what killed processes left: old, and nobody holds its lock."""

    def is_old(work: Path) -> bool:
        return time.time() - work.stat().st_mtime > ABANDONED

    for work in cache.glob("unfinished-*"):
        with suppress(Timeout, *NO_LOCK):
            if is_old(work):  # the lock is not even touched where somebody has just begun
                with FileLock(work / "lock", timeout=0):
                    if is_old(work):  # not renamed, nor finished, since
                        shutil.rmtree(work)


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
        _flush(file)
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
        _flush(file)


def _flush(file: IO) -> None:
    """To the disk itself: a power cut after the rename finds whole files."""
    file.flush()
    os.fsync(file.fileno())


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
