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


@dataclass(eq=False)
class WholeText:
    """Batches in which each token, except the first, is a target exactly once.

    Several ranks share them, and have equally many: `padding` fills up.

    Args:
        tokens: (N,) ids, N at least 2.
        batch_size: windows per batch.
        context_length: tokens per window; the last one is shorter if they do not divide the text.
        max_tokens: how many targets there may be: those of whole windows, at least one, spread
            evenly over the text; 0: none; None: all.
    """

    tokens: np.ndarray
    batch_size: int
    context_length: int
    max_tokens: int | None = None
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        self.num_targets = len(self.tokens) - 1
        windows, rest = divmod(self.num_targets, self.context_length)
        self.starts = np.arange(windows) * self.context_length
        self.rest = rest
        if windows and self.max_tokens is not None and self.max_tokens < self.num_targets:
            chosen = max(self.max_tokens // self.context_length, int(self.max_tokens > 0))
            self.starts = np.linspace(0, windows - 1, chosen).astype(int) * self.context_length
            self.rest = 0

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
