"""Owns vocabularies of one's own: trained on the text by byte-pair encoding, or read from a file.

Both split text as cl100k_base does, so that merges stay inside words, numbers and runs of blanks.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from lit_gpt.errors import UserError
from lit_gpt.tokenizer import OFFLINE, Tokenizer

PATTERN = OFFLINE["cl100k_base"][0]
SUFFIX = ".tiktoken"
MAX_TOKENS = 1 << 20
MAX_FILE = 1 << 27  # bytes: no vocabulary is as large
SAMPLE = 1 << 26  # bytes of text to train on: 4096 merges of them take a minute and 1.3 GB at worst
PIECE = 1 << 19  # characters handed over at a time; of a million blanks rustbpe makes a panic
BUFFER = 16  # pieces held at a time


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


def training_text(texts: Iterable[str], num_bytes: int) -> Iterator[str]:
    """The first bytes of a text, in pieces; where they are more than SAMPLE, every n-th part."""
    every, at = -(-num_bytes // SAMPLE), 0
    for i, text in enumerate(texts):
        if at >= num_bytes:
            return
        if not text:
            continue
        size = len(encoded := text.encode())
        if at + size > num_bytes:
            text = encoded[: num_bytes - at].decode("utf-8", "ignore")  # no half character
        at += size
        if i % every == 0:
            yield from (text[start : start + PIECE] for start in range(0, len(text), PIECE))


def load_trainer(size: int) -> Callable[[Iterable[str]], Tokenizer]:
    """What makes a vocabulary of texts: `size` tokens, the 256 bytes, then merges as found.

    Each merge joins the pair of tokens that stands most often side by side inside a piece; of
    equals, the pair with the smaller ids. So the same text gives the same vocabulary, on any
    number of cores. Where the text runs out of pairs there are fewer tokens than `size`.

    Raises:
        UserError: rustbpe is not installed.
    """
    try:
        import rustbpe
    except ImportError as error:
        raise UserError(
            f'--data.tokenizer=bpe:{size} needs the package rustbpe: pip install -e ".[bpe]"'
        ) from error
    return partial(_train, rustbpe, size)


def _train(rustbpe: Any, size: int, texts: Iterable[str]) -> Tokenizer:
    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator(texts, size, buffer_size=BUFFER, pattern=PATTERN)
    ranks = sorted(trainer.get_mergeable_ranks(), key=lambda pair: pair[1])
    tokenizer = Tokenizer(f"bpe:{size}", PATTERN, [bytes(token) for token, _ in ranks])
    # As with cl100k_base, whose pattern it is: 170,000 odd texts split as tiktoken splits them.
    import splintr

    vocabulary = tokenizer.to_dict()["vocabulary"].encode()
    tokenizer.fast = splintr.Tokenizer.from_bytes(vocabulary, splintr.CL100K_BASE_PATTERN)
    return tokenizer


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
