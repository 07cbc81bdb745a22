"""Owns the checks that keep a result honest: lines in both splits, baselines, copied text.

Pure functions of token arrays, which may be memory-mapped: the training split is read in chunks, so
memory does not grow with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from operator import itemgetter

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

CHUNK = 1 << 16  # tokens at a time: what is made of them stays in the processor's cache
MAX_LINE = 1 << 16  # bytes; longer lines are told apart by these first ones


@dataclass(frozen=True)
class SharedLines:
    num_lines: int  # whole lines of the validation text that are not blank
    num_shared: int  # those of them that stand in the training text too
    share_of_bytes: float  # their bytes of the bytes of all those lines, 0 to 1


def shared_lines(train: np.ndarray, val: np.ndarray, tokens: list[bytes]) -> SharedLines:
    """Which lines of the validation text (N,) also stand in the training text (M,), as a whole.

    Lines end at a line feed and are compared without the white space around them, so Windows' line
    ends make no difference. The line that the split cuts in two is left out.

    Args:
        tokens: the bytes of token 0, 1, ...
    """
    text_of = decoder(tokens)
    # Where the one text ends with a line or the other begins with its end, nothing is cut.
    val_is_cut = not tokens[train[-1]].endswith(b"\n")
    train_is_cut = val_is_cut and not tokens[val[0]].startswith(b"\n")
    hashes, lengths = [], []  # of the lines of the validation text: 12 bytes a line
    for lines in read_lines(val, text_of, skip_first=val_is_cut, skip_last=False):
        hashes.append(hash_lines(lines))
        lengths.append(np.fromiter(map(len, lines), np.uint32, len(lines)))
    hashes, lengths = (
        np.concatenate(parts) if parts else np.zeros(0) for parts in (hashes, lengths)
    )
    if not len(hashes):
        return SharedLines(0, 0, 0.0)
    known = np.unique(hashes)
    found = np.zeros(len(known), dtype=bool)
    for lines in read_lines(train, text_of, skip_first=False, skip_last=train_is_cut):
        seen = np.sort(hash_lines(lines))  # the search is quicker in order
        at = np.searchsorted(known[:-1], seen)
        found[at[known[at] == seen]] = True
    shared = found[np.searchsorted(known, hashes)]
    share = lengths[shared].sum() / lengths.sum()
    return SharedLines(len(hashes), int(shared.sum()), float(share))


def decoder(tokens: list[bytes]) -> Callable[[np.ndarray], bytes]:
    """A function from ids (N,) to their bytes, four times as quick as joining them one by one."""
    joined = np.frombuffer(b"".join(tokens), np.uint8)
    token_lengths = np.array([len(token) for token in tokens])
    starts = np.cumsum(token_lengths) - token_lengths

    def text_of(ids: np.ndarray) -> bytes:
        lengths = token_lengths[ids]
        ends = np.cumsum(lengths)
        places = np.repeat(starts[ids] - ends + lengths, lengths)
        places += np.arange(len(places))
        return joined[places].tobytes()

    return text_of


def read_lines(
    ids: np.ndarray, text_of: Callable[[np.ndarray], bytes], skip_first: bool, skip_last: bool
) -> Iterator[list[bytes]]:
    """Lines of the text without white space around them, many at a time; blank ones left out."""
    rest, cut = b"", itemgetter(slice(MAX_LINE))
    for chunk in chunks(ids, CHUNK):
        lines = (rest + text_of(chunk)).split(b"\n")
        rest = cut(lines.pop())  # or a text without line ends would be held as a whole
        if skip_first and lines:
            del lines[0]
            skip_first = False
        yield list(filter(None, map(bytes.strip, map(cut, lines))))
    if rest.strip() and not skip_first and not skip_last:
        yield [rest.strip()]


def hash_lines(lines: list[bytes]) -> np.ndarray:
    """64-bit hashes (N,): two lines in a billion billion would be taken for the same."""
    return np.fromiter(map(hash, lines), np.int64, len(lines))


def copied_tokens(written: Sequence[Sequence[int]], train: np.ndarray, run: int) -> int:
    """How many of the written ids lie in `run` or more that stand in `train` (M,) just so."""
    rows = [np.array(ids, train.dtype) for ids in written if len(ids) >= run]
    if not rows:
        return 0
    windows = np.concatenate([sliding_window_view(row, run) for row in rows])  # (N, run)
    sought, found = set(as_bytes(windows)), set()
    # Token by token, by 16 bits of it, until hardly a place is left that could be one of them.
    possible = np.zeros((run, 1 << 16), dtype=bool)
    possible[np.arange(run), windows.astype(np.uint16)] = True
    for chunk in chunks(train, CHUNK, overlap=run - 1):
        ids = chunk.astype(np.uint16)
        places = np.arange(len(ids) - run + 1)
        for offset in range(run):
            places = places[possible[offset][ids[places + offset]]]
        if len(places):
            found |= sought.intersection(as_bytes(sliding_window_view(chunk, run)[places]))
    copied = 0
    for row in rows:
        is_copied = np.zeros(len(row), dtype=bool)
        for start, window in enumerate(as_bytes(sliding_window_view(row, run))):
            is_copied[start : start + run] |= window in found
        copied += int(is_copied.sum())
    return copied


def as_bytes(rows: np.ndarray) -> list[bytes]:
    """Each row (N, T) as one object that a set can hold."""
    rows = np.ascontiguousarray(rows)
    return rows.view(f"V{rows.shape[1] * rows.itemsize}")[:, 0].tolist()


def chunks(tokens: np.ndarray, size: int, overlap: int = 0) -> Iterator[np.ndarray]:
    """Parts that begin `size` apart, each with `overlap` tokens of the next."""
    return (tokens[i : i + size + overlap] for i in range(0, len(tokens), size))
