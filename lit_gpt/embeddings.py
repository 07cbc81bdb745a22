"""What the fast style adds to a token's embedding: its spelling, and the token before it.

Shapes: B batch, T time (tokens), C d_model, V vocabulary.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

PARTS = 6  # of a token's spelling


class Spelling(Protocol):
    """What a tokenizer knows of it."""

    def spelling_rows(self, num_rows: int) -> np.ndarray:
        """In which rows of a table the parts of each token are, (V, PARTS)."""


class SpelledEmbedding(nn.Embedding):
    """Adds to each token's own embedding those of the parts of its spelling.

    Tokens that are spelled alike, as a word with and without its capital, so learn from each other.
    """

    rows: Tensor  # (V, PARTS) of the table, of each token

    def __init__(self, vocab_size: int, d_model: int, num_rows: int) -> None:
        super().__init__(vocab_size, d_model)
        self.parts = nn.EmbeddingBag(num_rows, d_model, mode="sum")
        rows = torch.full((vocab_size, PARTS), -1, dtype=torch.int32)  # so that none is forgotten
        self.register_buffer("rows", rows, persistent=False)

    def spell(self, tokenizer: Spelling) -> None:
        self.rows.copy_(torch.from_numpy(tokenizer.spelling_rows(self.parts.num_embeddings)))

    def forward(self, ids: Tensor) -> Tensor:
        of_parts = self.parts(self.rows[ids].flatten(0, -2))  # (N, C)
        return super().forward(ids) + of_parts.view(*ids.shape, -1)


def make_embedding(vocab_size: int, d_model: int, spelling_rows: int) -> nn.Embedding:
    if spelling_rows:
        return SpelledEmbedding(vocab_size, d_model, spelling_rows)
    return nn.Embedding(vocab_size, d_model)


class Pairs(nn.Module):
    """What the token before each adds to its embedding; the first of a window precedes itself."""

    def __init__(self, d_model: int, smear: bool, bigram_rows: int) -> None:
        super().__init__()
        self.share = nn.Parameter(torch.empty(d_model)) if smear else None
        self.table = nn.Embedding(bigram_rows, d_model) if bigram_rows else None

    def forward(self, ids: Tensor, before: Tensor, embedding: nn.Embedding) -> Tensor:
        """Of ids and those before them, (B, T) each: (B, T, C)."""
        x = embedding(ids)
        if self.share is not None:
            x = x + self.share * embedding(before)
        if self.table is not None:
            # Two primes spread the pairs over the rows, as in modded-nanogpt.
            x = x + self.table((36_313 * ids ^ 27_191 * before) % self.table.num_embeddings)
        return x
