"""The loss over a whole text, each token predicted once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lit_gpt.data import Batch, padding, read_windows
from lit_gpt.model import GPT
from lit_gpt.module import LossTotals, next_token_loss
from lit_gpt.reports.history import FinalResult
from lit_gpt.text.packing import Packs


@dataclass(eq=False)
class WholeText:
    """Batches in which each token, except the first, is a target exactly once.

    Several ranks share them, and have equally many: `padding` fills up.

    Args:
        tokens: (N,) ids, N at least 2; or conversations, of which some tokens are targets.
        batch_size: windows per batch.
        context_length: tokens per window; the last one is shorter if they do not divide the text.
        max_tokens: how many targets there may be: those of whole windows, at least one, spread
            evenly over the text; 0: none; None: all.
    """

    tokens: Any
    batch_size: int
    context_length: int
    max_tokens: int | None = None
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        if isinstance(self.tokens, Packs):
            self._choose_packs(self.tokens)
            return
        self.num_targets = len(self.tokens) - 1
        windows, rest = divmod(self.num_targets, self.context_length)
        self.starts = np.arange(windows) * self.context_length
        self.rest = rest
        if windows and self.max_tokens is not None and self.max_tokens < self.num_targets:
            chosen = max(self.max_tokens // self.context_length, int(self.max_tokens > 0))
            self.starts = np.linspace(0, windows - 1, chosen).astype(int) * self.context_length
            self.rest = 0
        self.whole_batches = -(-len(self.starts) // self.batch_size)

    def _choose_packs(self, packs: Packs) -> None:
        self.num_targets = packs.num_counted
        self.rest = 0
        self.starts = np.arange(len(packs))
        most = self.num_targets if self.max_tokens is None else self.max_tokens
        chosen = min(len(packs), int(most / self.num_targets * len(packs)))
        while packs.counts[self.starts].sum() > most and len(self.starts) > 1:
            self.starts = np.linspace(0, len(packs) - 1, max(1, chosen)).astype(int)
            chosen -= 1
        self.starts = self.starts[:most]
        self.whole_batches = -(-len(self.starts) // self.batch_size)

    def __len__(self) -> int:
        return -(-(self.whole_batches + (self.rest > 0)) // self.world_size)

    def __iter__(self) -> Iterator[Batch]:
        return (self._batch(i * self.world_size + self.rank) for i in range(len(self)))

    def _batch(self, i: int) -> Batch:
        if i < self.whole_batches:
            starts = self.starts[i * self.batch_size :][: self.batch_size]
            return read_windows(self.tokens, starts, self.context_length)
        if i == self.whole_batches and self.rest:
            return read_windows(self.tokens, np.array([self.num_targets - self.rest]), self.rest)
        return padding(self.tokens, min(self.context_length, self.num_targets))


@torch.inference_mode()
def whole_loss(
    model: GPT,
    batches: Iterable[Batch],
    token_lengths: torch.Tensor,
    num_targets: int,
    context: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> FinalResult:
    """The loss over all of `batches`, those of all processes together.

    Args:
        model: is set to eval mode.
        token_lengths: bytes of each token, (V,).
        num_targets: tokens that could be predicted, of which `batches` may hold a part.
        context: the precision to compute in.
    """
    model.eval()
    device = model.embedding.weight.device
    totals = LossTotals()
    totals.start(device)
    for x, y in batches:
        with context():
            loss = next_token_loss(model, x.to(device), (y if len(y) else x).to(device))
        totals.update(loss, y, token_lengths)
    loss, bits_per_byte, num_tokens = totals.compute()
    return FinalResult(loss.item(), bits_per_byte.item(), int(num_tokens), num_targets)
