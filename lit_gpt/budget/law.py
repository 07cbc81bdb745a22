"""The law: the bits per byte that a model reaches, before it is trained.

Provisional: its form is that of Hoffmann et al. 2022 and Muennighoff et al. 2023, its numbers are
set by hand.
"""

from __future__ import annotations

import math

from lit_gpt.budget.candidates import Candidate
from lit_gpt.budget.text_facts import TextFacts

RANGE = (0.90, 1.12)  # of what is expected: nine of ten runs end within
FLOOR = 0.68  # as shares of what bzip2 reaches: at any size of model and text,
MODEL = (0.09, 0.12)  # times (weights / million) ** -0.12,
DATA = (0.153, 0.2)  # times (megabytes seen) ** -0.2,
CONTEXT = 0.02  # for 512 bytes of context,
LONG = 0.1  # all times (bytes per token) ** -0.1: long tokens hold what others have to learn
RARE = 0.1  # times the vocabulary's size by training token: tokens too rare to be learnt
REPEATS = 15.4  # passes after which a repeated text is worth 1 - 1/e of new ones (Muennighoff)
CRITICAL = (800, 250_000)  # tokens per step at which half of each is lost, for so many tokens


def expected(text: TextFacts, candidate: Candidate, steps: int) -> float:
    """Bits per byte on the validation split after `steps` steps."""
    tokenizer = candidate.tokenizer
    seen = steps * candidate.step_tokens
    seen_bytes = useful_tokens(seen, tokenizer.train_tokens, candidate.step_tokens)
    seen_bytes *= tokenizer.bytes_per_token
    context = candidate.config.context_length * tokenizer.bytes_per_token
    share = FLOOR
    share += MODEL[0] * (candidate.weights / 1e6) ** -MODEL[1]
    share += DATA[0] * (seen_bytes / 1e6) ** -DATA[1]
    share += CONTEXT * (context / 512) ** -0.5
    share += RARE * tokenizer.vocab_size / tokenizer.train_tokens
    return text.compressed * share * tokenizer.bytes_per_token**-LONG


def useful_tokens(seen: float, different: int, step_tokens: int) -> float:
    """Tokens that would teach as much if all were new and taken one step at a time."""
    new = min(seen, different)
    repeated = (seen - new) / different
    worth = new + different * REPEATS * (1 - math.exp(-repeated / REPEATS))
    critical = CRITICAL[0] * math.sqrt(worth / CRITICAL[1])
    return worth / (1 + step_tokens / critical)
