"""Owns the way from text files to one token array on disk, cached by content.

Files are read and encoded piece by piece, so memory does not grow with the corpus.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from lit_gpt.errors import UserError
from lit_gpt.tokenizer import Tokenizer, load_tokenizer

CACHE_VERSION = 1  # a part of every cache's key: raise it when what is stored changes
CHUNK = 1 << 20  # bytes read at a time

# No split pattern of tiktoken's joins a letter or digit with white space or punctuation after it
# (save the apostrophe of "it's"), nor looks back, so text may be cut there and encoded in parts.
# Matches up to the last such place.
SAFE_CUT = re.compile(r".*[^\W_](?=[\s,.;:!?()，。、；：！？（）“”《》])", re.DOTALL)


@dataclass(frozen=True)
class CorpusInfo:
    """What is known of a corpus besides its tokens."""

    fingerprint: str  # sha256 of the files' bytes and ends
    num_characters: int
    num_bytes: int  # of the text as UTF-8
    num_tokens: int
    removed_boms: int  # byte-order marks at the start of files: the only text that is dropped


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
    path: str, tokenizer: str | Tokenizer, compact: bool, encoding: str, cache: str
) -> Corpus:
    """The tokens of a text file, or of all files in a folder in the order of their names.

    Encodes once; later calls with the same text and options map the cached array.

    Raises:
        UserError: the path, the text or the tokenizer can't be used.
    """
    files = find_files(path)
    fingerprint = hash_files(files)
    label = tokenizer if isinstance(tokenizer, str) else tokenizer.to_dict()
    options = json.dumps([CACHE_VERSION, fingerprint, label, compact, encoding])
    folder = Path(cache).expanduser() / hashlib.sha256(options.encode()).hexdigest()[:24]
    if corpus := _open(folder):
        return corpus
    full = load_tokenizer(tokenizer) if isinstance(tokenizer, str) else tokenizer
    reader = _Reader(files, encoding, fingerprint)
    work = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix="unfinished-", dir=folder.parent))
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
    corpus = _open(folder)
    assert corpus, f"{folder} was written and can't be read"
    return corpus


def find_files(path: str) -> list[Path]:
    """The file itself, or the files of a folder and its subfolders; hidden ones are left out."""
    try:
        root = Path(path).expanduser()
        exists = bool(path) and os.path.exists(root)
    except RuntimeError:  # ~ of a user who is not there
        exists = False
    if not exists:
        raise UserError(f"no such file or folder: {path!r} (--data.path)")
    if not root.is_dir():
        return [root]
    inside = sorted(p for p in root.rglob("*") if p.is_file())
    files = [p for p in inside if not any(x.startswith(".") for x in p.relative_to(root).parts)]
    if not files:
        raise UserError(f"no files in the folder {path!r}: give --data.path a text file or folder")
    return files


def hash_files(files: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for _ in _read_bytes(files, digest):
        pass
    return digest.hexdigest()


def _read_bytes(files: Iterable[Path], digest) -> Iterator[tuple[Path, bytes]]:
    """Chunks of each file, the last of each b"", every byte and every file's end in the digest."""
    for path in files:
        try:
            with path.open("rb") as file:
                while chunk := file.read(CHUNK):
                    digest.update(chunk)
                    yield path, chunk
                digest.update(f"end {file.tell()}".encode())
                yield path, b""
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from error


class _Reader:
    """Text of the files, chunk by chunk; at the end it must have been that of `fingerprint`."""

    def __init__(self, files: list[Path], encoding: str, fingerprint: str) -> None:
        self.files, self.encoding, self.fingerprint = files, encoding, fingerprint
        self.removed_boms = 0
        try:
            codec = codecs.lookup(encoding)
            if not codec._is_text_encoding:  # as base64 or rot13
                raise LookupError
        except LookupError as error:
            raise UserError(
                f"unknown --data.encoding {encoding!r}: try utf-8 or gb18030"
            ) from error
        self.codec = codec.incrementaldecoder

    def __iter__(self) -> Iterator[str]:
        decoder, offset, last, digest = self.codec(), 0, "", hashlib.sha256()
        for path, chunk in _read_bytes(self.files, digest):
            text = self._decode(decoder, chunk, path, offset)
            if offset == 0 and text.startswith("\ufeff"):
                self.removed_boms += 1
                text = text[1:]
            if offset == 0 and text and last not in ("", "\n"):
                text = "\n" + text  # two files never run into one line
            if text:
                last = text[-1]
                yield text
            offset += len(chunk)
            if not chunk:
                decoder, offset = self.codec(), 0
        if not last:
            where = (
                self.files[0] if len(self.files) == 1 else f"the files of {self.files[0].parent}"
            )
            raise UserError(f"no text in {where}: give --data.path a file that has some")
        if digest.hexdigest() != self.fingerprint:
            raise UserError(f"{self.files[0]} was changed while it was read: start again")

    def _decode(self, decoder: codecs.IncrementalDecoder, chunk: bytes, path: Path, at: int) -> str:
        pending = len(decoder.getstate()[0])  # bytes of a character that the last chunk cut
        try:
            text = decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            where = at - pending + error.start
            guess = "gb18030" if codecs.lookup(self.encoding).name == "utf-8" else "utf-8"
            if chunk.startswith((b"\xff\xfe", b"\xfe\xff")):
                guess = "utf-16"
            elif b"\0" in chunk:
                raise _looks_binary(path, at + chunk.find(b"\0")) from error
            raise UserError(
                f"{path} is not {self.encoding} text (byte 0x{error.object[error.start]:02x} at "
                f"offset {where:,}): name its encoding with --data.encoding (perhaps {guess}), "
                "or convert it"
            ) from error
        except UnicodeError as error:
            raise UserError(f"{path} is not {self.encoding} text: {error}") from error
        if "\0" in text:
            raise _looks_binary(path, at + max(0, chunk.find(b"\0")))
        return text


def _looks_binary(path: Path, offset: int) -> UserError:
    return UserError(
        f"{path} looks like a binary file (NUL byte at offset {offset:,}): "
        "--data.path takes text files; UTF-16 ones need --data.encoding=utf-16"
    )


def cut_safely(texts: Iterable[str]) -> Iterator[str]:
    """The same text in parts that encode, one by one, to the tokens of the whole."""
    rest = ""
    for text in texts:
        rest += text
        if cut := SAFE_CUT.match(rest):
            yield cut.group()
            rest = rest[cut.end() :]
    if rest:
        yield rest


def _build(folder: Path, reader: _Reader, full: Tokenizer, compact: bool) -> None:
    """Writes tokens.bin and meta.json: full ids first, renumbered once the used ones are known."""
    used = np.zeros(full.vocab_size, dtype=bool)
    num_characters = num_tokens = num_bytes = 0
    parts = cut_safely(reader)
    with (folder / "ids.bin").open("wb") as file:
        while texts := list(islice(parts, 8)):
            ids = full.encode_parts(texts)
            used[ids] = True
            num_characters += sum(map(len, texts))
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
        file.flush()
        os.fsync(file.fileno())
    (folder / "ids.bin").unlink()
    info = CorpusInfo(
        reader.fingerprint, num_characters, num_bytes, num_tokens, reader.removed_boms
    )
    meta = {"info": asdict(info), "dtype": np.dtype(dtype).name, "tokenizer": tokenizer.to_dict()}
    (folder / "meta.json").write_text(json.dumps(meta), encoding="utf-8")


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
