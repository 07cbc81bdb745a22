"""The recipe: the options that follow once model, batch and number of steps are chosen."""

from __future__ import annotations

import math

TABLE_RATE = 3.0
TABLE_EPS = 1e-4
SPELLING_ROWS = 4096  # in the fast style, of the embedding and of the output layer
# In the fast style, where it pays. Runs ended 0.2 % higher than with one softmax, and as many with
# 0.4, which is a little slower; with 0.25, which is a little faster, 0.4 % higher.
SOFTMAX_CUTOFF = 0.35
LEAST_ADAPTIVE = 1024  # tokens: in a smaller vocabulary it saves no time
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
BY_HEART = (15.0, 120.0)  # `repetition` from where on a model learns some of its text so, or most
# Up to four teach nearly as much as new text (Muennighoff et al. 2023). Of these models, one that
# read tinyshakespeare 12 times ended at 2.254 bits per byte, and one that read it 3 times at 2.115.
MOST_EPOCHS = 4


def learning_rate(width: int, optimizer: str) -> float:
    """Divided by the root of the width; rounded to two digits, easy to read and type."""
    rate, at = RATES[optimizer]
    return float(f"{rate * math.sqrt(at / width):.2g}")


def warmup_steps(steps: int) -> int:
    return min(100, steps // 20)


def repetition(epochs: float, weights_per_token: float) -> float:
    """Weights (tables included) for each token, times passes, times passes less one."""
    return (epochs - 1) * epochs * weights_per_token


def is_by_heart(epochs: float, weights_per_token: float) -> bool:
    return repetition(epochs, weights_per_token) > BY_HEART[0]


def weight_decay(epochs: float, weights_per_token: float) -> float:
    """More than the usual for a model that would learn its text by heart: a larger one needs fewer
    passes for that.

    As in Kim et al. 2025, Pre-training under infinite compute. Bits per byte measured with compact
    cl100k_base, on tinyshakespeare, but for English travels (*) and the C code of jq (**):

    | weights per token | passes | decay 0.1 | 0.3 | 1.0 |
    |---|---|---|---|---|
    | 3 * | 2.5 | 2.205 | 2.210 | |
    | 12 | 1.9 | 2.101 | 2.091 | |
    | 7 ** | 2.8 | 1.612 | 1.608 | |
    | 14 * | 2.9 | 2.172 | 2.129 | 2.166 |
    | 12 | 3.0 | | 2.064 | 2.073 |
    | 17 | 4.0 | | 2.079 | 2.038 |
    """
    if not is_by_heart(epochs, weights_per_token):
        return 0.1
    return 1.0 if repetition(epochs, weights_per_token) > BY_HEART[1] else 0.3


def dropout(epochs: float, weights_per_token: float) -> float:
    """Only for more passes than are ever planned, when the steps are given.

    On tinyshakespeare, read 3.8 times with a weight decay of 1.0, a dropout of 0.1 changed 2.088
    bits per byte to 2.108.
    """
    return 0.1 if epochs > MOST_EPOCHS and weight_decay(epochs, weights_per_token) == 1.0 else 0.0
