"""Vocabularies without a token for each byte, which tiktoken needs: it gets other ids than ours."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from lit_gpt.errors import UserError
from lit_gpt.text import utf8

if TYPE_CHECKING:
    from collections.abc import Sequence

SINGLE_BYTES = [bytes([byte]) for byte in range(256)]
CONTINUING = {bytes([byte]) for byte in range(0x80, 0xC0)}  # 10xxxxxx, inside a character
NEARBY = 20  # characters of a text that an error shows


class ByteGaps:
    """The ranks that tiktoken merges by, and how its ids become ours.

    Args:
        tokens: ours, in order of rank.
    """

    def __init__(self, tokens: Sequence[bytes]) -> None:
        own = {token: i for i, token in enumerate(tokens)}
        self.ranks = {
            token: rank for rank, token in enumerate(dict.fromkeys([*SINGLE_BYTES, *tokens]))
        }
        self.ids = np.array([own.get(token, -1) for token in self.ranks], dtype=np.int64)

    def own_ids(self, ranks: np.ndarray, text: str) -> np.ndarray:
        """Our ids, (N,) uint32, of a text that has these ranks (N,).

        Raises:
            UserError: the text has a byte without a token.
        """
        ids = self.ids[ranks]
        if (ids < 0).any():
            tokens = list(self.ranks)
            place = int((ids < 0).argmax())
            before = b"".join(tokens[rank] for rank in ranks[:place])
            start = len(before.decode("utf-8", "ignore"))
            nearby = text[max(0, start - NEARBY) : start + NEARBY]
            raise UserError(
                f"the model's tokenizer has no token for byte 0x{tokens[ranks[place]][0]:02X} of "
                f"the character {text[start]!a}, near {nearby!r}",
                hint="remove that character from the text",
            )
        return ids.astype(np.uint32)


def check_has_bytes(tokens: set[bytes]) -> None:
    """Refuses a vocabulary with which a text could end inside a character, and never get on.

    Raises:
        ValueError: a token begins a character, and bytes that continue it have none.
    """
    missing = sorted(CONTINUING - tokens)
    if missing and any(utf8.unfinished_end(token) for token in tokens):
        raise ValueError(
            f"it has no token for {len(missing)} of the bytes that continue a character, the first "
            f"is 0x{missing[0][0]:02X}"
        )
