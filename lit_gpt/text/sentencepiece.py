"""SentencePiece models: those of byte-pair encoding, as our Tokenizer with the same pieces.

The file is a protocol buffer (sentencepiece_model.proto), of which a few fields are read.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from typing import Any

from lit_gpt.errors import UserError
from lit_gpt.text.patterns import WORDS
from lit_gpt.text.tokenizer import SINGLE_BYTES, Tokenizer

SUFFIX = ".model"
SPACE = "▁"  # how a piece writes a space
ALGORITHMS = {1: "unigram", 2: "BPE", 3: "word", 4: "char"}  # TrainerSpec.ModelType
MAX_PIECE = 1000  # characters; by default, SentencePiece allows 16
NORMAL, USER_DEFINED = 1, 4  # SentencePiece.Type


def parse_sentencepiece(content: bytes, name: str) -> Tokenizer:
    """The tokenizer in a SentencePiece model; its pieces are renumbered, after the 256 bytes.

    Text is split into the same pieces as by SentencePiece without normalization: no space is put
    before a text, and none is removed. A character without a piece becomes its bytes, or a prefix
    that it shares with one that has. Control symbols are left out.

    Raises:
        UserError: damaged, or a model that works differently.
    """
    try:
        scores, algorithm = _read(content)
    except (ValueError, LookupError, TypeError, AttributeError, struct.error) as error:
        why = error if isinstance(error, ValueError) else "it is damaged"
        raise _refused(name, f"is not a SentencePiece model of the usual kind: {why}") from error
    if algorithm != "BPE":
        raise _refused(name, f"uses SentencePiece's {algorithm} algorithm, not byte-pair encoding")
    joined = [piece for piece in scores if not re.fullmatch(WORDS, piece)]
    if joined:
        raise _refused(name, f"has pieces of more than a word, such as {joined[0]!r}")
    ranked = sorted(scores, key=lambda piece: -scores[piece])  # stable
    tokens = dict.fromkeys(SINGLE_BYTES)
    for char in dict.fromkeys("".join(ranked)):  # SentencePiece begins with whole characters
        encoded = char.encode()
        tokens |= dict.fromkeys(encoded[:end] for end in range(2, len(encoded) + 1))
    tokens |= dict.fromkeys(piece.encode() for piece in ranked)
    tokenizer = Tokenizer(f"of a {SUFFIX} file", WORDS, list(tokens))
    # tiktoken would find a piece that no merges lead to where it is a whole word.
    reachable = [t for i, t in enumerate(tokens) if len(t) < 2 or tokenizer.is_merged(i)]
    return Tokenizer(tokenizer.name, WORDS, reachable)


def _refused(name: str, problem: str) -> UserError:
    hint = "use a BPE model (spm_train --model_type=bpe), or bpe:4096 to train one on your text"
    return UserError(problem, field="tokenizer", value=name, hint=hint)


def _read(content: bytes) -> tuple[dict[str, float], str]:
    """The normal pieces with their scores, and the algorithm."""
    scores: dict[str, float] = {}
    algorithm = 1  # the default
    for field, value in _fields(content):
        if field == 1:  # a SentencePiece
            piece = dict(_fields(value))
            kind, text = piece.get(3, NORMAL), piece[1].decode().replace(SPACE, " ")
            if kind == USER_DEFINED:
                raise ValueError(f"it has a user-defined symbol, {text!r}, which is not supported")
            if len(text) > MAX_PIECE:
                raise ValueError(f"it has a piece of {len(text):,} characters")
            if kind == NORMAL and text:
                scores.setdefault(text, struct.unpack("<f", piece[2])[0])
        elif field == 2:  # TrainerSpec
            algorithm = dict(_fields(value)).get(3, algorithm)
    if not scores:
        raise ValueError("it has no pieces")
    return scores, ALGORITHMS[algorithm]


def _fields(message: Any) -> Iterator[tuple[int, Any]]:
    """Number of each field, and its value, an int or bytes; protobuf.dev, "Encoding"."""
    if not isinstance(message, bytes):
        raise ValueError("it is damaged")
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        kind = key & 7
        if kind == 0:
            value, at = _varint(message, at)
            yield key >> 3, value
            continue
        size = {1: 8, 5: 4}.get(kind)
        if kind == 2:
            size, at = _varint(message, at)
        if size is None or at + size > len(message):
            raise ValueError("it is damaged")
        yield key >> 3, message[at : at + size]
        at += size


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """The number that begins there, and where it ends."""
    value = 0
    for shift in range(0, 70, 7):
        byte = message[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError("it is damaged")
