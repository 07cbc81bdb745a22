"""Text as tokens write it, which are bytes: it may end inside a character."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from lit_gpt.text.tokenizer import Tokenizer


def unfinished_bytes(text: bytes) -> bytes | None:
    """The bytes of a character that the end of `text` begins; None if it is not UTF-8."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        decoder.decode(text)
    except UnicodeDecodeError:
        return None
    rest = decoder.getstate()[0]
    return None if b"\xed\xa0" <= rest < b"\xee" else rest  # would become a surrogate


def unfinished_end(text: bytes) -> bytes:
    """As `unfinished_bytes`, of a text that may begin inside a character."""
    ends = [text[-length:] for length in (3, 2, 1)]
    return next((end for end in ends if unfinished_bytes(end) == end), b"")


def may_follow(tokens: list[bytes], begun: bytes) -> np.ndarray:
    """Which of the tokens, (V,) bool, can continue a character that begins with these bytes."""
    allowed = np.zeros(len(tokens), dtype=bool)
    for i, token in enumerate(tokens):
        # Only 10xxxxxx can continue a character: most tokens need no closer look.
        if (token[0] >> 6 == 0b10) == bool(begun):
            allowed[i] = unfinished_bytes(begun + token) is not None
    return allowed


def stream_text(tokenizer: Tokenizer, ids: Iterable[int]) -> Iterator[str]:
    """Yields the text of ids as they come, but only whole characters."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for i in ids:
        if text := decoder.decode(tokenizer.tokens[i]):
            yield text
