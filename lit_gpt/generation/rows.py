"""Rows: texts of any lengths that grow side by side; some join and others leave at any step.

That is the iteration-level scheduling of Orca (Yu et al. 2022, section 3). As in Sarathi-Serve
(Agrawal et al. 2024), a step reads no more than a part of a long prompt while others are written.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lit_gpt.model import GPT, GPTConfig, KVCache
from lit_gpt.text.tokenizer import Tokenizer
from lit_gpt.text.utf8 import unfinished_bytes, unfinished_end

MAX_READ = 256  # tokens of prompts in a step, padding included, while other rows are written


def fill_gaps(kept: list[int]) -> list[int]:
    """Some of the rows, in ascending order, in another: the last ones fill the others' places."""
    staying = {row for row in kept if row < len(kept)}
    last = kept[len(staying) :]
    return [place if place in staying else last.pop() for place in range(len(kept))]


def as_slice(numbers: list[int]) -> slice | list[int]:
    """The same numbers as a slice, if they are a range: PyTorch takes it many times faster."""
    first = numbers[0]
    is_range = numbers == list(range(first, first + len(numbers)))
    return slice(first, first + len(numbers)) if is_range else numbers


class Slots(KVCache):
    """A cache with a length for each row; a call of the model adds tokens to the selected ones.

    It has room for more rows than it holds, so that few come and go at a cost.
    """

    def __init__(self, config: GPTConfig, like: Tensor) -> None:
        super().__init__(config, 0, like)
        self.config = config
        self.like = like
        self.lengths: list[int] = []
        self.counts: list[int] = []

    def select(self, rows: list[int], counts: list[int], last: Tensor | None) -> None:
        """Prepares the next call.

        Args:
            rows: to which it adds tokens, B of them.
            counts: how many to each. Fewer than T are padded on the right, where none sees them.
            last: the tokens before, (B, 1); None: there are none.
        """
        self._make_room(max(rows) + 1)
        device = self.like.device
        starts = [self.lengths[row] for row in rows]
        num_new = max(counts)
        self.rows = rows
        self.counts = counts
        self.last = last
        self._end = max(starts) + num_new
        self._index = as_slice(rows)
        self.mask = None
        self._places: slice | Tensor = slice(starts[0], self._end)
        if min(starts) < max(starts) or (num_new > 1 and starts[0]):
            new = torch.arange(num_new, device=device)
            self._places = torch.tensor(starts, device=device)[:, None] + new  # (B, T)
            self._rows = torch.tensor(rows, device=device)[:, None]  # (B, 1)
            age = self._places[..., None] - torch.arange(self._end, device=device)  # (B, T, L)
            sees = age >= 0
            if self.config.sliding_window is not None:
                sees &= age < self.config.sliding_window
            self.mask = sees[:, None]  # (B, 1, T, L)

    def _make_room(self, num_rows: int) -> None:
        held = self.keys.size(1)
        if num_rows > held:
            self.keys, self.values = (
                self._with_room(old, max(num_rows, 2 * held)) for old in (self.keys, self.values)
            )

    def _with_room(self, old: Tensor, num_rows: int) -> Tensor:
        """Keys or values with more rows; only what is filled takes memory on a CPU, and time."""
        blocks, held, heads, length, size = old.shape
        shape = (blocks, num_rows, heads, length, size)
        if old.device.type == "cpu":  # NumPy leaves it to the system, which has pages of zeros
            empty = np.zeros(math.prod(shape) * old.element_size(), np.uint8)
            new = torch.from_numpy(empty).view(old.dtype).view(shape)
        else:
            new = old.new_zeros(shape)
        filled = max(self.lengths)
        new[:, :held, :, :filled] = old[:, :, :, :filled]
        return new

    def places(self, num_new: int) -> slice | Tensor:
        return self._places

    def extend(self, block: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Adds k and v (B, K, T, D) of the selected rows; returns theirs, (B, K, L, D)."""
        places = self._places
        if v.dtype != self.values.dtype:  # under autocast
            k = k.to(self.keys.dtype)
            v = v.to(self.keys.dtype)
        if isinstance(places, slice):
            self.keys[block, self._index, :, places] = k
            self.values[block, self._index, :, places] = v
            if places.start == 0:
                return k, v
        else:
            self.keys[block, self._rows, :, places] = k.transpose(1, 2)
            self.values[block, self._rows, :, places] = v.transpose(1, 2)
        end = self._end
        return self.keys[block, self._index, :, :end], self.values[block, self._index, :, :end]

    def advance(self, ids: Tensor) -> None:
        for row, count in zip(self.rows, self.counts, strict=True):
            self.lengths[row] += count

    def keep(self, rows: list[int]) -> None:
        """Drops all other rows; those that are kept get this order."""
        moved = {new: old for new, old in enumerate(rows) if new != old and self.lengths[old]}
        if moved:
            new, old = list(moved), list(moved.values())
            self.keys[:, new] = self.keys[:, old]
            self.values[:, new] = self.values[:, old]
        self.lengths = [self.lengths[row] for row in rows]
        if not rows:
            super().__init__(self.config, 0, self.like)


class Rows:
    """Texts that grow side by side.

    The model sees at most the last context_length tokens. When the window of a row is full, its
    earlier half is dropped, so a row is read again only every context_length / 2 tokens.

    A token can be part of a character (cl100k_base splits most Chinese characters into two or
    three). A tokenizer rules out tokens whose bytes can't continue the text as UTF-8.

    Args:
        model: in eval mode.
        tokenizer: the model's; None: any token may follow any other.
    """

    def __init__(self, model: GPT, tokenizer: Tokenizer | None = None) -> None:
        assert not model.training, "call model.eval() first: dropout would garble the text"
        self.model = model
        self.tokenizer = tokenizer
        self.cache = Slots(model.config, model.embedding.weight)
        self.lengths: list[int] = []  # of the windows
        # The windows, (room, context_length + 1); beyond its length, each repeats its first token.
        device = model.embedding.weight.device
        width = model.config.context_length + 1
        self.windows = torch.empty(0, width, dtype=torch.long, device=device)
        self.unfinished: list[bytes] = []  # the first bytes of a character that each row ends in
        self.ages: list[int] = []  # a row's is above those of the rows that were there before
        self.at_work: list[int] = []  # rows of the last call of `logits`

    def __len__(self) -> int:
        return len(self.lengths)

    def add(self, ids: Sequence[int]) -> None:
        """Adds a row: a prompt of at least one token, which may end inside a character."""
        row = len(self)
        if row == len(self.windows):
            more = self.windows.new_zeros(max(row, 1), self.windows.size(1))
            self.windows = torch.cat([self.windows, more])
        end = self.tokenizer.decode_bytes(list(ids[-3:])) if self.tokenizer else b""
        self.unfinished.append(unfinished_end(end))
        self.ages.append(max(self.ages, default=0) + 1)
        self.cache.lengths.append(0)
        self.lengths.append(0)
        self._set_window(row, torch.tensor(ids[-self.model.config.context_length :]))

    def _set_window(self, row: int, ids: Tensor) -> None:
        self.lengths[row] = len(ids)
        self.cache.lengths[row] = 0
        self.windows[row, : len(ids)] = ids
        self.windows[row, len(ids) :] = ids[0]

    def seen(self, rows: list[int]) -> Tensor:
        """The ids that the model sees of these rows, (N, T); short ones repeat one of theirs."""
        return self.windows[as_slice(rows), : max(self.lengths[row] for row in rows)]

    def logits(self) -> tuple[list[int], Tensor]:
        """Reads tokens; call it once per `append`.

        Returns:
            The rows that are read to their end, at least one, and logits (N, V) of their next ids:
            the model's; `as_text` rules out what can't continue the text.
        """
        self._slide()
        starts = self.cache.lengths
        lengths = enumerate(zip(self.lengths, starts, strict=True))
        written = [row for row, (length, start) in lengths if length - 1 == start > 0]
        unread = sorted({*range(len(self))}.difference(written), key=self.ages.__getitem__)
        self.at_work = []
        ready: list[int] = []
        parts: list[Tensor] = []
        for rows, counts in (self._to_read(unread, bool(written)), (written, [1] * len(written))):
            if rows:
                last = self._read(rows, counts)  # (B, C)
                ends = [place for place, row in enumerate(rows) if starts[row] == self.lengths[row]]
                if ends:
                    parts.append(last[as_slice(ends)])  # (N, C)
                    ready += [rows[place] for place in ends]
        hidden_states = torch.cat(parts) if len(parts) > 1 else parts[0]
        return ready, self.model.head(hidden_states).float()  # (N, V)

    def _slide(self) -> None:
        context = self.model.config.context_length
        for row, length in enumerate(self.lengths):
            if length > context:
                self.at_work = [row]  # should there be no room for the copy
                kept = max(1, context // 2)
                self._set_window(row, self.windows[row, length - kept : length].clone())

    def _to_read(self, unread: list[int], is_limited: bool) -> tuple[list[int], list[int]]:
        """The rows of which a step reads more than a token, and how much of each.

        Args:
            unread: the oldest first.
            is_limited: to MAX_READ; otherwise the oldest, and those as long as it, are not.
        """
        rows: list[int] = []
        counts: list[int] = []
        for row in unread:
            start = self.cache.lengths[row]
            count = self.lengths[row] - start
            if not rows and (start or (is_limited and count > MAX_READ)):
                return [row], [min(count, MAX_READ) if is_limited else count]
            fits = (len(rows) + 1) * max([count, *counts]) <= MAX_READ
            is_equal = not is_limited and count == max(counts, default=count)
            if start == 0 and (not rows or fits or is_equal):
                rows.append(row)
                counts.append(count)
        return rows, counts

    def _read(self, rows: list[int], counts: list[int]) -> Tensor:
        """Reads ids of rows, as many or from the same place; returns the last states (B, C)."""
        self.at_work += rows
        num_new = max(counts)
        start = self.cache.lengths[rows[0]]
        last = self._ids(rows, -1, 0) if start else None  # (B, 1)
        self.cache.select(rows, counts, last)
        ids = self._ids(rows, 0, num_new)  # (B, T)
        hidden_states = self.model.hidden_states(ids, self.cache)  # (B, T, C)
        if min(counts) == num_new:
            return hidden_states[:, -1]
        return hidden_states[range(len(rows)), [count - 1 for count in counts]]

    def _ids(self, rows: list[int], begin: int, end: int) -> Tensor:
        """The ids from `begin` to `end`, counted from the first that is not in the cache, (B, T).

        Of rows that start at different places, it is one.
        """
        starts = [self.cache.lengths[row] for row in rows]
        if min(starts) == max(starts):
            return self.windows[as_slice(rows), starts[0] + begin : starts[0] + end]
        return self.windows[rows, [start + begin for start in starts]][:, None]

    def as_text(self, logits: Tensor, rows: list[int]) -> Tensor:
        """The logits of these rows, with -inf for tokens whose bytes can't continue the text."""
        if self.tokenizer is None:
            return logits
        allowed = [self.tokenizer.may_follow(self.unfinished[row]) for row in rows]
        mask = torch.from_numpy(np.stack(allowed)).to(logits.device)  # (N, V)
        return logits.masked_fill(~mask, -torch.inf)

    def append(self, rows: list[int], ids: Tensor) -> None:
        """Adds the ids (N,) that were chosen for these rows."""
        lengths = [self.lengths[row] for row in rows]
        same = min(lengths) == max(lengths)
        self.windows[as_slice(rows) if same else rows, lengths[0] if same else lengths] = ids
        for row, token in zip(rows, ids.tolist(), strict=True):
            self.lengths[row] += 1
            if self.tokenizer:
                text = self.unfinished[row] + self.tokenizer.tokens[token]
                self.unfinished[row] = unfinished_bytes(text) or b""

    def keep(self, rows: list[int]) -> None:
        """Drops all other rows; those that are kept get this order."""
        self.cache.keep(rows)
        self.windows[: len(rows)] = self.windows[rows]
        self.lengths = [self.lengths[row] for row in rows]
        self.unfinished = [self.unfinished[row] for row in rows]
        self.ages = [self.ages[row] for row in rows]
