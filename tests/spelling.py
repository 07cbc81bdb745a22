"""A stand-in for a tokenizer, for models that have none."""

from __future__ import annotations

import numpy as np

from lit_gpt.embeddings import PARTS


class RandomSpelling:
    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def spelling_rows(self, num_rows: int) -> np.ndarray:
        rows = np.random.default_rng(0).integers(num_rows, size=(self.vocab_size, PARTS))
        return rows.astype(np.int32)
