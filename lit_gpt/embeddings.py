"""What the fast style adds to a token's embedding: its spelling, and the token before it.

Shapes: B batch, T time (tokens), C d_model, V vocabulary.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

PARTS = 6  # of a token's spelling


class Spelling(Protocol):
    """A tokenizer that knows how its tokens are spelled."""

    def spelling_rows(self, num_rows: int) -> np.ndarray:
        """The rows of each token's parts in a table, (V, PARTS)."""


class _SumOfParts(torch.autograd.Function):
    """The sum of each token's parts.

    Backward, it sums over the tokens of each part, several times as fast as `embedding_bag` does.
    """

    @staticmethod
    def forward(ctx: Any, table: Tensor, rows: Tensor, tokens: Tensor, starts: Tensor) -> Tensor:
        ctx.save_for_backward(tokens, starts)
        return F.embedding_bag(rows, table, mode="sum")

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        tokens, starts = ctx.saved_tensors
        return F.embedding_bag(tokens, gradient, starts, mode="sum"), None, None, None


class Parts(nn.Module):
    """A vector for each token: the sum of those of the parts of its spelling.

    Tokens spelled alike, such as a word with and without a capital, thus learn from each other.
    `lit_gpt.text.spelling` says what the parts are.
    """

    rows: Tensor  # (V, PARTS) of the table, of each token
    tokens: Tensor  # (V * PARTS,) that have each row, one row after the other
    starts: Tensor  # (num_rows,) where those of each row start

    def __init__(self, vocab_size: int, d_model: int, num_rows: int) -> None:
        super().__init__()
        self.num_rows = num_rows
        self.weight = nn.Parameter(torch.empty(num_rows, d_model))
        rows = torch.full((vocab_size, PARTS), -1, dtype=torch.int32)  # so that none is forgotten
        self.register_buffer("rows", rows, persistent=False)
        self.register_buffer("tokens", torch.zeros_like(rows).flatten(), persistent=False)
        self.register_buffer("starts", rows.new_zeros(num_rows), persistent=False)

    def spell(self, rows: Tensor) -> None:
        """Takes the rows of each token, (V, PARTS)."""
        self.rows.copy_(rows)
        in_order, places = self.rows.flatten().sort(stable=True)
        self.tokens.copy_(places // PARTS)
        numbers = torch.arange(self.num_rows, device=rows.device)
        self.starts.copy_(torch.searchsorted(in_order, numbers))

    def forward(self, ids: Tensor) -> Tensor:
        """The vectors (..., C) of ids (...)."""
        found = F.embedding_bag(self.rows[ids].flatten(0, -2), self.weight, mode="sum")
        return found.view(*ids.shape, -1)

    def of_all_tokens(self) -> Tensor:
        """The vectors of the vocabulary, (V, C)."""
        found: Tensor = _SumOfParts.apply(self.weight, self.rows, self.tokens, self.starts)
        return found

    def logits(self, x: Tensor) -> Tensor:
        """Products of x (..., C) with the vectors of the vocabulary, (..., V).

        Where x are few, it is faster to sum the products with the rows than the rows.
        """
        products = F.linear(self.weight, x.flatten(0, -2))  # (num_rows, N)
        return F.embedding_bag(self.rows, products, mode="sum").T.view(*x.shape[:-1], -1)


class SpelledEmbedding(nn.Embedding):
    """Adds to each token's own embedding those of the parts of its spelling."""

    def __init__(self, vocab_size: int, d_model: int, num_rows: int) -> None:
        super().__init__(vocab_size, d_model)
        self.parts = Parts(vocab_size, d_model, num_rows)

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) + self.parts(ids)


def make_embedding(vocab_size: int, d_model: int, spelling_rows: int) -> nn.Embedding:
    if spelling_rows:
        return SpelledEmbedding(vocab_size, d_model, spelling_rows)
    return nn.Embedding(vocab_size, d_model)


class Pairs(nn.Module):
    """What the token before each adds to its embedding."""

    def __init__(self, d_model: int, smear: bool, bigram_rows: int) -> None:
        super().__init__()
        self.share = nn.Parameter(torch.empty(d_model)) if smear else None
        self.table = nn.Embedding(bigram_rows, d_model) if bigram_rows else None

    def forward(self, ids: Tensor, first: Tensor, embedding: nn.Embedding) -> Tensor:
        """Of ids (B, T), before which are `first` (B, 1): (B, T, C)."""
        x = embedding(ids)
        if self.share is not None:
            x = x + self.share * torch.cat([embedding(first), x[:, :-1]], dim=1)
        if self.table is not None:
            before = torch.cat([first, ids[:, :-1]], dim=1)  # (B, T)
            # Two primes spread the pairs over the rows, as in modded-nanogpt.
            x = x + self.table((36_313 * ids ^ 27_191 * before) % self.table.num_embeddings)
        return x
