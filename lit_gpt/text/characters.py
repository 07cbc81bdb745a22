"""The vocabulary `chars`: a token for each character of the training split."""

from __future__ import annotations

from collections.abc import Iterable

from lit_gpt.text.patterns import CHARACTERS
from lit_gpt.text.tokenizer import SINGLE_BYTES, Tokenizer

CHARS = "chars"


def character_tokenizer(texts: Iterable[str | None], train_fraction: float) -> Tokenizer:
    """The 256 bytes, then each further character of the first part of a text, by its code point.

    ASCII characters are bytes themselves. Any other character, in the validation split or in a
    prompt, becomes the two to four bytes of its UTF-8.

    Args:
        texts: the text in parts; None ends a document.
        train_fraction: the share of its characters, from the front, that is looked at.
    """
    first: dict[str, int] = {}  # where each character is found first, in tokens
    num_tokens = 0
    for text in texts:
        for char in set(text or "") - first.keys():
            first[char] = num_tokens + (text or "").index(char)
        num_tokens += 1 if text is None else len(text)
    end = int(num_tokens * train_fraction)
    chars = sorted(char for char, at in first.items() if at < end and not char.isascii())
    return Tokenizer(CHARS, CHARACTERS, [*SINGLE_BYTES, *(char.encode() for char in chars)])
