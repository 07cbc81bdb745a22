"""The recipe: the options that follow once model, batch and number of steps are chosen."""

from __future__ import annotations

import math

TABLE_RATE = 3.0
TABLE_EPS = 1e-4
SPELLING_ROWS = 4096  # in the fast style
FIXED = {  # for all: what learns most from a token
    "style": "fast",
    "optimizer": "muon",
    "table_rate": TABLE_RATE,
    "table_eps": TABLE_EPS,
    "tie_embeddings": False,
    "schedule": "linear",
    "order": "shuffled",  # each token once an epoch
}
RATES = {"muon": (6e-3, 80), "adamw": (3e-3, 80)}  # learning rates at this width
BY_HEART = 50.0  # weights (tables included) for each token, times passes, times passes less one
# Up to four teach nearly as much as new text (Muennighoff et al. 2023). Of these models, one that
# read tinyshakespeare 12 times ended at 2.254 bits per byte, and one that read it 3 times at 2.115.
MOST_EPOCHS = 4


def learning_rate(width: int, optimizer: str) -> float:
    """Divided by the root of the width; rounded to two digits, easy to read and type."""
    rate, at = RATES[optimizer]
    return float(f"{rate * math.sqrt(at / width):.2g}")


def warmup_steps(steps: int) -> int:
    return min(100, steps // 20)


def is_by_heart(epochs: float, weights_per_token: float) -> bool:
    """Whether a model would learn its text by heart; a larger one does in fewer passes."""
    return (epochs - 1) * epochs * weights_per_token > BY_HEART


def dropout(epochs: float, weights_per_token: float) -> float:
    """Only for more passes than are ever planned, when the steps are given.

    On tinyshakespeare, read 3.8 times with a weight decay of 1.0, a dropout of 0.1 changes 2.088
    bits per byte to 2.108.
    """
    return 0.1 if epochs > MOST_EPOCHS and is_by_heart(epochs, weights_per_token) else 0.0


def weight_decay(epochs: float, weights_per_token: float) -> float:
    """Ten times the usual for a model that would learn its text by heart.

    As in Kim et al. 2025, Pre-training under infinite compute. Measured on tinyshakespeare:

    | weights per token | passes | decay 0.1 | decay 1.0 |
    |---|---|---|---|
    | 1 | 4.8 | 2.139 | 2.186 |
    | 7 | 2.4 | 2.102 | 2.118 |
    | 21 | 2.0 | 2.034 | 2.050 |
    | 29 | 2.1 and 1.9 | 2.098 | 2.068 |
    | 15 | 2.6 and 2.8 | 2.075 | 2.031 |
    | 7 | 3.8 | 2.127 | 2.088 |
    """
    return 1.0 if is_by_heart(epochs, weights_per_token) else 0.1
