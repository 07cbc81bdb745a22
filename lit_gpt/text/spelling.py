"""The parts of a token's spelling, which tokens that are spelled alike share."""

from __future__ import annotations

from collections.abc import Iterable
from zlib import crc32

import numpy as np

LENGTHS = (1, 2)  # of beginnings and ends, in characters


def spelling_rows(tokens: Iterable[bytes], num_rows: int) -> np.ndarray:
    """In which rows of a table the parts of each token's spelling are, (V, 6) int32.

    As in Bojanowski et al. 2017, Enriching Word Vectors with Subword Information: a checksum of a
    part says where it is, so some parts share a row by chance.
    """
    rows = [[crc32(part) % num_rows for part in parts(token)] for token in tokens]
    return np.array(rows, dtype=np.int32)


def parts(token: bytes) -> list[bytes]:
    """All of it and its shape, then its beginnings and its ends.

    Without case and the white space around it, which are its shape. An empty part stands for
    beginnings and ends that are longer than all of it.
    """
    text = token.decode("utf-8", "surrogateescape")
    letters = text.strip()
    folded = letters.casefold()  # stable: Unicode never changes it for a character that it has
    shape = (text[:1].isspace(), letters[:1].isupper(), letters.isupper(), letters.isalnum())
    found = [f"all {folded}", f"shape {shape}"]
    for length in LENGTHS:
        is_part = length <= len(folded)
        found.append(f"begins {folded[:length]}" if is_part else "")
        found.append(f"ends {folded[-length:]}" if is_part else "")
    return [part.encode("utf-8", "surrogateescape") for part in found]
