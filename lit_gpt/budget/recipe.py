"""The recipe: the options that follow once model, batch and number of steps are chosen.

Provisional, but for the learning rate at a width of 80, which is that of configs/modern.yaml.
"""

from __future__ import annotations

import math

TABLE_RATE = 3.0
TABLE_EPS = 1e-4
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
DROPOUT = ((1.5, 0.0), (4.0, 0.1), (8.0, 0.2), (math.inf, 0.3))  # up to so many epochs
MOST_EPOCHS = 16  # more hardly help, and then harm (Muennighoff et al. 2023)


def learning_rate(width: int, optimizer: str) -> float:
    """Falls with the root of the width; two digits, which can be read and typed."""
    rate, at = RATES[optimizer]
    return float(f"{rate * math.sqrt(at / width):.2g}")


def warmup_steps(steps: int) -> int:
    return min(100, steps // 20)


def dropout(epochs: float) -> float:
    return next(share for most, share in DROPOUT if epochs <= most)


def weight_decay(epochs: float) -> float:
    return 0.1 if epochs <= DROPOUT[1][0] else 0.3
