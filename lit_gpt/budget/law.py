"""The law: predicts the bits per byte that a model will reach.

Its form is that of Hoffmann et al. 2022, Training Compute-Optimal Large Language Models, with
repeated text counted as in Muennighoff et al. 2023, Scaling Data-Constrained Language Models. The
bits per byte that counting pairs of tokens reaches tell how hard a text is, and how much harder in
the tokens of one tokenizer than of another. `benchmarks/budget_law.py fit` fits the numbers;
docs/benchmarks.md#law shows how well.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from lit_gpt.budget.candidates import Candidate
from lit_gpt.budget.text_facts import TokenizerFacts

RANGE = (0.86, 1.16)  # reached / expected, a text's mean: 21 of 22 that the fit had not seen
REPEATS = 15.4  # passes after which a repeated text is worth 1 - 1/e of new ones (Muennighoff)
# Times the bits per byte, for an output layer in two steps: the mean of 12 pairs of runs.
ADAPTIVE = 1.002
OUTPUT = 0.58  # of what spelling saves, that of the output layer saves again: 12 pairs of runs
FEWER = 0.9  # `useful_steps` tries this share of the steps, again and again
# Tokens per step at which half of all are wasted, in a run of so many; it grows with their root.
CRITICAL = (1500, 256_000)
LARGE = 4.0  # weights, tables included, for each token of the training text
BEYOND = 0.1  # of what the first LARGE weights for each token add to overfitting, further ones add


@dataclass(frozen=True)
class Law:
    """Bits per byte = difficulty + size / N**weights + data / D**tokens + repeated * overfitting.

    All of it is multiplied by 1 - spelling * (V / 10,000)**vocabulary for models that have
    `spelling_rows` and a vocabulary of V tokens. `output_spelling_rows` save OUTPUT times as much
    again, and an output layer in two steps costs ADAPTIVE. N is millions of weights in the blocks,
    D millions of useful tokens. Counting pairs of tokens reaches T bits per byte with the best
    tokenizer and B with this one; the difficulty, which no model and no amount of text takes away,
    is floor * T**text * (B / T)**pairs.

    Args:
        floor: scale of the difficulty.
        size: bits per byte that a model of a million weights loses by being small.
        data: bits per byte lost with only a million useful tokens.
        weights: exponent of N.
        tokens: exponent of D.
        text: exponent of T.
        pairs: exponent of B / T.
        repeated: bits per byte for each unit of `overfitting`.
        spelling: share that the spelling of 10,000 tokens saves.
        vocabulary: exponent of V.
    """

    floor: float
    size: float
    data: float
    weights: float
    tokens: float
    text: float
    pairs: float
    repeated: float
    spelling: float
    vocabulary: float

    def difficulty(self, tokenizer: TokenizerFacts) -> float:
        harder = tokenizer.bigram / tokenizer.text_bits
        return self.floor * tokenizer.text_bits**self.text * harder**self.pairs


FITTED = Law(0.3570, 0.0176, 0.2435, 0.5690, 0.2841, 1.7396, 0.8795, 0.0207, 0.0163, 0.6837)


def expected(candidate: Candidate, steps: int, law: Law = FITTED) -> float:
    """Bits per byte on the validation split after `steps` steps."""
    tokenizer = candidate.tokenizer
    seen = steps * candidate.step_tokens
    useful = useful_tokens(seen, tokenizer.train_tokens, candidate.step_tokens)
    size = law.size * (candidate.weights / 1e6) ** -law.weights
    data = law.data * (useful / 1e6) ** -law.tokens
    repeated = law.repeated * overfitting(candidate, candidate.epochs(steps))
    bits = law.difficulty(tokenizer) + size + data + repeated
    config = candidate.config
    saved = law.spelling * (tokenizer.vocab_size / 10_000) ** law.vocabulary
    if config.spelling_rows:
        bits *= 1 - saved
    if config.output_spelling_rows:
        bits *= 1 - OUTPUT * saved
    return bits * (ADAPTIVE if config.cutoff else 1)


def useful_steps(candidate: Candidate, most: int) -> int:
    """The number of steps, at most `most`, with the fewest expected bits per byte."""
    best = steps = most
    least = expected(candidate, most)
    while candidate.epochs(steps) > 1 and (fewer := math.ceil(FEWER * steps)) < steps:
        steps = fewer
        if (bits := expected(candidate, steps)) <= least:
            best, least = steps, bits
    return best


def overfitting(candidate: Candidate, epochs: float) -> float:
    """Grows with the passes after the first, and with the weights for each token of the text."""
    weights = candidate.weights_per_token
    beyond = max(0.0, math.sqrt(weights) - math.sqrt(LARGE))
    return math.log(max(1.0, epochs)) * (math.sqrt(min(weights, LARGE)) + BEYOND * beyond)


def useful_tokens(seen: float, different: int, step_tokens: int) -> float:
    """How many new tokens, in very small steps, would teach as much.

    Args:
        seen: tokens read, repeats included.
        different: tokens of the training text.
    """
    new = min(seen, different)
    repeated = (seen - new) / different
    worth = new + different * REPEATS * (1 - math.exp(-repeated / REPEATS))
    critical = CRITICAL[0] * math.sqrt(worth / CRITICAL[1])
    return worth / (1 + step_tokens / critical)
