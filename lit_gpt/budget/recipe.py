"""The recipe: the options that follow once model, batch and number of steps are chosen."""

from __future__ import annotations

import math

TABLE_RATE = 3.0
TABLE_EPS = 1e-4
SPELLING_ROWS = 4096  # in the fast style, of the embedding and of the output layer
# In the fast style, where it pays: runs end 0.2 % higher (docs/benchmarks.md#cutoff).
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
BY_HEART = (12.0, 100.0)  # `repetition` from where on a model learns some of its text so, or most
DECAY = (0.1, 1.3)  # least and most
REACH = 80.0  # passes that the weights average over, for a `repetition` of one
REACHES = (0.65, 3.0)  # least and most
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
    """How far a model may learn a text by heart: w * passes * (passes - 1).

    Args:
        weights_per_token: w, of the training text: without those of spelling, which tokens share.
    """
    return (epochs - 1) * epochs * weights_per_token


def is_by_heart(epochs: float, weights_per_token: float) -> bool:
    return repetition(epochs, weights_per_token) > BY_HEART[0]


def weight_decay(epochs: float, weights_per_token: float, rate: float, epoch_steps: float) -> float:
    """More than the usual for a model that would learn its text by heart.

    As in Kim et al. 2025, Pre-training under infinite compute. Weights are an average of their
    updates that reaches back 1 / (rate * decay) steps (Wang and Aitchison 2024, How to set AdamW's
    weight decay as you scale model and dataset size), and what counts is how many passes over the
    text these are. docs/budget.md#the-recipe has what was measured.

    Args:
        rate: the learning rate's peak.
        epoch_steps: steps of a pass.
    """
    if not is_by_heart(epochs, weights_per_token):
        return DECAY[0]
    passes = clamp(REACH / repetition(epochs, weights_per_token), REACHES)
    return clamp(float(f"{1 / (rate * passes * epoch_steps):.2g}"), DECAY)


def clamp(value: float, limits: tuple[float, float]) -> float:
    return min(max(value, limits[0]), limits[1])


def dropout(epochs: float, weights_per_token: float) -> float:
    """0.1 only where the given steps make more passes than MOST_EPOCHS.

    On tinyshakespeare, read 3.8 times with a weight decay of 1.0, a dropout of 0.1 changed 2.088
    bits per byte to 2.108.
    """
    is_long = epochs > MOST_EPOCHS and repetition(epochs, weights_per_token) > BY_HEART[1]
    return 0.1 if is_long else 0.0
