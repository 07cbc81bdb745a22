"""Text in two places: validation lines also in the training text, and copied text in samples.

Pure functions of token arrays, which may be memory-mapped: the training split is read in chunks, so
memory does not grow with it. Shapes: M tokens of the training text, N of the validation text.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

CHUNK = 1 << 15  # tokens at a time: few enough for the processor's cache
MAX_LINE = 1 << 16  # bytes; longer lines are compared by their first ones


@dataclass(frozen=True)
class SharedLines:
    num_lines: int  # of the validation text, without blank ones
    num_shared: int  # those also in the training text
    share_of_bytes: float  # shared bytes / bytes of all these lines


def shared_lines(
    train: np.ndarray, val: np.ndarray, tokens: list[bytes], is_one_text: bool = True
) -> SharedLines:
    """Counts the lines of the validation text (N,) that are also lines of the training text (M,).

    Lines end at a line feed and are compared without surrounding white space, so Windows line ends
    make no difference. A line that the split cuts in two is skipped.

    Args:
        train, val: ids.
        is_one_text: whether the validation text follows the training text, maybe in mid-line.
        tokens: the bytes of token 0, 1, ...
    """
    # If one text ends with a line, or the other begins with a line feed, nothing is cut.
    val_is_cut = is_one_text and not tokens[train[-1]].endswith(b"\n")
    train_is_cut = val_is_cut and not tokens[val[0]].startswith(b"\n")
    hashes = array("q")  # of the lines of the validation text
    lengths = array("I")
    for lines in _lines(val, tokens, skip_first=val_is_cut, skip_last=False):
        hashes.extend(map(hash, lines))
        lengths.extend(map(len, lines))
    if not hashes:
        return SharedLines(0, 0, 0.0)
    val_hashes = np.frombuffer(hashes, np.int64)
    known = np.unique(val_hashes)
    found = np.zeros(len(known), dtype=bool)
    for lines in _lines(train, tokens, skip_first=False, skip_last=train_is_cut):
        # 64 bits each: two different lines are practically never taken for the same.
        seen = np.sort(np.fromiter(map(hash, lines), np.int64))  # searching in order is faster
        at = np.searchsorted(known[:-1], seen)
        found[at[known[at] == seen]] = True
    is_shared = found[np.searchsorted(known, val_hashes)]
    num_bytes = np.frombuffer(lengths, np.uint32)
    share = num_bytes[is_shared].sum() / num_bytes.sum()
    return SharedLines(len(val_hashes), int(is_shared.sum()), float(share))


def _lines(
    ids: np.ndarray, tokens: list[bytes], skip_first: bool, skip_last: bool
) -> Iterator[list[bytes]]:
    """Lines without surrounding white space, many at a time; blank ones are skipped."""
    rest = b""
    for chunk in chunks(ids, CHUNK):
        text = b"".join(map(tokens.__getitem__, chunk.tolist()))
        lines = (rest + text).split(b"\n")
        rest = lines.pop()[:MAX_LINE]  # or all of a text without line ends would be held
        if skip_first and lines:
            del lines[0]
            skip_first = False
        yield [stripped for line in lines if (stripped := line[:MAX_LINE].strip())]
    if rest.strip() and not skip_first and not skip_last:
        yield [rest.strip()]


def copied_tokens(samples: Sequence[Sequence[int]], train: np.ndarray, run: int) -> int:
    """How many ids of the samples lie in runs of at least `run` that also occur in `train` (M,)."""
    rows = [np.array(ids, train.dtype) for ids in samples if len(ids) >= run]
    if not rows:
        return 0
    windows = np.concatenate([sliding_window_view(row, run) for row in rows])  # (N, run)
    wanted = set(_as_bytes(windows))
    found: set[bytes] = set()
    # Token by token, by 16 bits of each, until few places are left that could match.
    possible = np.zeros((run, 1 << 16), dtype=bool)
    possible[np.arange(run), windows.astype(np.uint16)] = True
    for chunk in chunks(train, CHUNK, overlap=run - 1):
        ids = chunk.astype(np.uint16)
        places = np.arange(len(ids) - run + 1)
        for offset in range(run):
            places = places[possible[offset][ids[places + offset]]]
        if len(places):
            found |= wanted.intersection(_as_bytes(sliding_window_view(chunk, run)[places]))
    copied = 0
    for row in rows:
        is_copied = np.zeros(len(row), dtype=bool)
        for start, window in enumerate(_as_bytes(sliding_window_view(row, run))):
            is_copied[start : start + run] |= window in found
        copied += int(is_copied.sum())
    return copied


def _as_bytes(rows: np.ndarray) -> list[bytes]:
    """Each row (N, run) as one object that a set can hold."""
    rows = np.ascontiguousarray(rows)
    return rows.view(f"V{rows.shape[1] * rows.itemsize}")[:, 0].tolist()


def chunks(tokens: np.ndarray, size: int, overlap: int = 0) -> Iterator[np.ndarray]:
    """Parts that begin `size` tokens apart, each with `overlap` tokens of the next."""
    return (tokens[i : i + size + overlap] for i in range(0, len(tokens), size))
