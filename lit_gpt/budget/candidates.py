"""The models and batches to choose from, and what is counted of each."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Any

from lit_gpt.budget import recipe
from lit_gpt.budget.text_facts import TokenizerFacts
from lit_gpt.embeddings import PARTS
from lit_gpt.errors import UserError
from lit_gpt.model import GPTConfig

WIDTHS = (32, 48, 64, 80, 96, 128, 160, 192, 256, 320, 384, 512, 640, 768, 1024, 1280, 1600)
DEPTHS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 36, 48)
ASPECT = (32, 80)  # least and most width per block, as the law was fitted; GPT-2 has 64
BATCHES = (4, 8, 16, 32, 64)  # windows
CONTEXTS = (128, 256)
MOST_BATCH_TOKENS = 1 << 15
NEWTON_SCHULZ = 5  # iterations of Muon


@dataclass(frozen=True)
class Candidate:
    """A model, and the batches it trains on.

    Args:
        accumulate: batches per step.
    """

    tokenizer: TokenizerFacts
    config: GPTConfig
    batch_size: int
    optimizer: str = "muon"
    accumulate: int = 1

    @property
    def step_tokens(self) -> int:
        return self.batch_size * self.config.context_length * self.accumulate

    def epochs(self, steps: float) -> float:
        """Passes over the training text."""
        return steps * self.step_tokens / self.tokenizer.train_tokens

    @cached_property
    def weights(self) -> int:
        """Weights of the blocks, without biases and norms: what scaling laws count."""
        return self.config.num_blocks * sum(m * n for m, n in matrices(self.config))

    @cached_property
    def vocabulary_weights(self) -> int:
        """Weights of the embedding, the output layer, pairs of tokens and parts of tokens."""
        config = self.config
        assert config.bigram_rows is not None
        rows = config.vocab_size * (1 if config.tie_embeddings else 2) + config.bigram_rows
        rows += config.spelling_rows + config.output_spelling_rows + bool(config.cutoff)
        return rows * config.d_model

    @property
    def weights_per_token(self) -> float:
        """Weights for each token of the training text."""
        return (self.weights + self.vocabulary_weights) / self.tokenizer.train_tokens

    @property
    def own_weights_per_token(self) -> float:
        """The same without the weights of spelling, which tokens share."""
        config = self.config
        shared = (config.spelling_rows + config.output_spelling_rows) * config.d_model
        return self.weights_per_token - shared / self.tokenizer.train_tokens

    @property
    def head_rows(self) -> float:
        """Rows of the output layer that a target is compared with, on average."""
        size, cutoff = self.config.vocab_size, self.config.cutoff
        return cutoff + (1 - self.frequent) * (size - cutoff) if cutoff else size

    @property
    def frequent(self) -> float:
        """Share of the text's tokens below the cutoff: a power law, exact at the recipe's."""
        power = math.log(self.config.softmax_cutoff) / math.log(recipe.SOFTMAX_CUTOFF)
        return self.tokenizer.frequent**power

    @property
    def flops(self) -> float:
        """Operations of a step: each weight multiplies and adds twice backward and once forward.

        Attention multiplies each pair of tokens twice more, and Muon's iteration each matrix with
        itself.
        """
        config = self.config
        head = self.head_rows * config.d_model
        attention = config.num_blocks * config.context_length * config.num_heads * head_size(config)
        products = 6 * self.step_tokens * (self.weights + head + 2 * attention)
        return products + (self.muon_flops if self.optimizer == "muon" else 0)

    @property
    def muon_flops(self) -> float:
        sides = [(min(pair), max(pair)) for pair in matrices(self.config)]
        once = sum(4 * m * m * n + 2 * m**3 for m, n in sides)
        return NEWTON_SCHULZ * self.config.num_blocks * once

    @property
    def bytes_moved(self) -> float:
        """Bytes that a step moves, roughly: where arithmetic waits for memory."""
        config = self.config
        logits = 5 * self.step_tokens * self.head_rows
        moments = 7 * (self.weights + self.vocabulary_weights)
        activations = 40 * self.step_tokens * config.num_blocks * config.d_model
        spelled = 2 * PARTS * config.vocab_size * config.d_model * bool(config.output_spelling_rows)
        return 4.0 * (logits + moments + activations + spelled)

    @property
    def key(self) -> tuple[Any, ...]:
        """What the time of a step depends on."""
        config = vars(self.config).values()
        frequent = self.tokenizer.frequent if self.config.cutoff else 1.0
        return (*config, self.batch_size, self.optimizer, self.accumulate, frequent)


def head_size(config: GPTConfig) -> int:
    assert config.head_size is not None
    return config.head_size


def matrices(config: GPTConfig) -> list[tuple[int, int]]:
    """Shapes of the matrices of a block."""
    width = config.d_model
    assert config.num_kv_heads is not None
    assert config.hidden_size is not None
    inner = config.num_heads * head_size(config)
    keys = config.num_kv_heads * head_size(config)
    hidden = config.hidden_size
    up = 2 * hidden if config.activation == "swiglu" else hidden
    return [(inner + 2 * keys, width), (width, inner), (up, width), (width, hidden)]


def num_heads(width: int) -> int:
    """Heads of 32 channels, or 64 in a wide model; wider if those don't divide the width."""
    most = max(1, width // (32 if width <= 256 else 64))
    return next((n for n in range(most, 0, -1) if width % (2 * n) == 0), 1)


def candidates(
    tokenizers: tuple[TokenizerFacts, ...], given: Mapping[str, Any], fixed: Mapping[str, Any]
) -> list[Candidate]:
    """All models and batches that the given options allow.

    Args:
        given: options that the user set, by plain name, which leave one choice each.
        fixed: arguments of GPTConfig for all of them.

    Raises:
        UserError: the given options don't fit together.
    """
    found: list[Candidate] = []
    problem: UserError | None = None
    for tokenizer, context in product(tokenizers, choices(given, "context_length", CONTEXTS)):
        if context >= min(tokenizer.train_tokens, tokenizer.val_tokens):
            continue
        cuts = cutoffs(fixed, tokenizer.vocab_size)
        for (width, depth), cutoff in product(shapes(given), cuts):
            heads = given.get("num_heads", num_heads(width))
            sizes = {"d_model": width, "num_blocks": depth, "num_heads": heads}
            sizes |= {"vocab_size": tokenizer.vocab_size, "context_length": context}
            try:
                config = GPTConfig(**{**fixed, **sizes, "softmax_cutoff": cutoff})
            except UserError as error:
                problem = error
                continue
            more = (given.get("optimizer", "muon"), given.get("accumulate_grad_batches", 1))
            found += (
                Candidate(tokenizer, config, batch, *more)
                for batch in choices(given, "batch_size", BATCHES)
                if "batch_size" in given or batch * context <= MOST_BATCH_TOKENS
            )
    if not found:
        hint = "use more text or a smaller `context_length`"
        raise problem or UserError(
            "too short for a window and a validation split", field="path", hint=hint
        )
    return found


def cutoffs(fixed: Mapping[str, Any], vocab_size: int) -> tuple[float, ...]:
    """Of the output layer's first softmax: none, and in the fast style the recipe's."""
    if "softmax_cutoff" in fixed:
        return (fixed["softmax_cutoff"],)
    is_worth = fixed.get("style") == "fast" and vocab_size >= recipe.LEAST_ADAPTIVE
    return (0.0, recipe.SOFTMAX_CUTOFF) if is_worth else (0.0,)


def choices(given: Mapping[str, Any], name: str, values: tuple[int, ...]) -> tuple[int, ...]:
    return (given[name],) if name in given else values


def shapes(given: Mapping[str, Any]) -> Iterator[tuple[int, int]]:
    """Widths and numbers of blocks, neither too thin nor too flat unless they were asked for."""
    least, most = ASPECT
    for width in choices(given, "d_model", WIDTHS):
        for depth in choices(given, "num_blocks", DEPTHS):
            is_asked = "d_model" in given or "num_blocks" in given
            if is_asked or least <= width / depth <= most:
                yield width, depth
