"""A run's numbers, computed once more with windows, sums and counts of its own.

Nothing of lit_gpt is used but the model's logits.
"""

from __future__ import annotations

import math
from collections import Counter
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from typing import Any

import numpy as np
import torch


def nats_of(
    model: torch.nn.Module,
    tokens: np.ndarray,
    starts: list[int],
    length: int,
    context: AbstractContextManager[Any] | None = None,
) -> list[float]:
    """-log p of each target of the windows at `starts`, one window at a time."""
    found: list[float] = []
    model.eval()
    for start in starts:
        ids = [int(token) for token in tokens[start : start + length + 1]]
        with torch.no_grad(), context or nullcontext():
            logits = model(torch.tensor([ids[:-1]]))[0]  # (T, V)
        for row, target in zip(logits.double().numpy(), ids[1:], strict=True):
            found.append(float(row.max() + np.log(np.exp(row - row.max()).sum()) - row[target]))
    return found


def spread(num_tokens: int, windows: int, length: int) -> list[int]:
    """Starts of the windows of an evaluation."""
    last = num_tokens - length - 1
    return [last * i // (windows - 1) for i in range(windows)] if windows > 1 else [0]


def one_after_another(num_tokens: int, length: int) -> list[tuple[int, int]]:
    """Start and length of windows that predict each token but the first once."""
    return [(i, min(length, num_tokens - 1 - i)) for i in range(0, num_tokens - 1, length)]


def whole_nats(
    model: torch.nn.Module,
    tokens: np.ndarray,
    length: int,
    context: AbstractContextManager[Any] | None = None,
) -> list[float]:
    """-log p of every token but the first."""
    windows = one_after_another(len(tokens), length)
    return [x for start, size in windows for x in nats_of(model, tokens, [start], size, context)]


def counted_bits(train: list[int], val: list[int], vocab_size: int) -> tuple[float, float]:
    """Bits of val[1:] by unigram and by bigram counts of the training text, smoothed best."""
    tokens, pairs = Counter(train), Counter(pairwise(train))
    contexts = Counter(train[:-1])
    strengths = [2.0**n for n in range(-2, 18)]

    def unigram(a: float, w: int) -> float:
        return (tokens[w] + a / vocab_size) / (len(train) + a)

    def unigram_bits(a: float) -> float:
        return -sum(math.log2(unigram(a, w)) for w in val[1:])

    best = min(strengths, key=unigram_bits)

    def bigram_bits(a: float) -> float:
        return -sum(
            math.log2((pairs[c, w] + a * unigram(best, w)) / (contexts[c] + a))
            for c, w in pairwise(val)
        )

    return unigram_bits(best), min(map(bigram_bits, strengths))


def adaptive_nats(tokens: list[int], vocab_size: int) -> tuple[float, float]:
    """Nats of tokens[1:], each by the counts of the tokens before it, smoothed best."""
    strengths = [2.0**n for n in range(-2, 18)]

    def both(a: float, b: float) -> tuple[float, float]:
        seen, pairs, contexts = Counter([tokens[0]]), Counter(), Counter()
        unigram = bigram = 0.0
        for t in range(1, len(tokens)):
            context, target = tokens[t - 1], tokens[t]
            p = (seen[target] + a / vocab_size) / (t + a)
            unigram -= math.log(p)
            bigram -= math.log((pairs[context, target] + b * p) / (contexts[context] + b))
            seen[target] += 1
            pairs[context, target] += 1
            contexts[context] += 1
        return unigram, bigram

    best = min(strengths, key=lambda a: both(a, 1.0)[0])
    return both(best, 1.0)[0], min(both(best, b)[1] for b in strengths)
