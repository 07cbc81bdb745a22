"""Owns generation: logits -> next id, and generate() with a KV cache."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lit_gpt.errors import UserError
from lit_gpt.model import GPT, KVCache
from lit_gpt.tokenizer import Tokenizer, unfinished_bytes


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn from the model's logits.

    Args:
        temperature: divides the logits; 0 (or next to it) always takes the likeliest token.
        top_k: only the k likeliest tokens; None: all.
        top_p: only the likeliest tokens that together reach this probability (Holtzman 2019).
        repetition_penalty: makes tokens that the model sees already less likely when above 1
            (Keskar et al. 2019), 1 changes nothing; between 0.01 and 100.

    Raises:
        UserError: values out of range.
    """

    temperature: float = 0.8
    top_k: int | None = None
    top_p: float = 1.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"--temperature must be 0 or more, not {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"--top_k must be at least 1, not {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise UserError(f"--top_p must be in (0, 1], not {self.top_p}")
        if not 0.01 <= self.repetition_penalty <= 100:
            raise UserError(
                f"--repetition_penalty must be in [0.01, 100], not {self.repetition_penalty}"
            )

    def __call__(self, logits: Tensor, seen: Tensor, generator: torch.Generator) -> Tensor:
        """Logits (B, V) and the ids (B, T) that the model saw to the next ids (B,)."""
        if self.repetition_penalty != 1:
            old = logits.gather(1, seen)
            lower = torch.where(
                old > 0, old / self.repetition_penalty, old * self.repetition_penalty
            )
            logits = logits.scatter(1, seen, lower)
        if self.temperature < 1e-4:  # where float32 would overflow
            return logits.argmax(dim=-1)
        logits = logits / self.temperature
        if self.top_k is not None and self.top_k < logits.size(-1):
            best = logits.topk(self.top_k)
            logits = torch.full_like(logits, -torch.inf).scatter(1, best.indices, best.values)
        probabilities = logits.softmax(dim=-1)
        if self.top_p < 1:
            ordered, order = probabilities.sort(dim=-1, descending=True)
            before = ordered.cumsum(dim=-1) - ordered  # what the likelier tokens add up to
            ordered = ordered.masked_fill(before >= self.top_p, 0)
            probabilities = torch.zeros_like(ordered).scatter(1, order, ordered)
        # On the CPU, so that a seed gives the same random draws on every device.
        return torch.multinomial(probabilities.cpu(), 1, generator=generator)[:, 0].to(seen.device)


class ValidText:
    """Rules out tokens whose bytes can't go on as UTF-8, so that what is written is always text.

    Vocabularies of bytes (cl100k_base cuts most Chinese characters in two or three) let a model
    write half a character and then something else.
    """

    def __init__(self, tokenizer: Tokenizer, ids: Tensor) -> None:
        self.tokenizer = tokenizer
        ends = (tokenizer.decode_bytes(row)[-3:] for row in ids[:, -3:].tolist())
        # The bytes of a character that each text has begun.
        self.unfinished = [
            next((end[-k:] for k in (3, 2, 1) if unfinished_bytes(end[-k:]) == end[-k:]), b"")
            for end in ends
        ]

    def mask(self) -> Tensor:
        """Which tokens may come next, (B, V) bool."""
        rows = [self.tokenizer.may_follow(begun) for begun in self.unfinished]
        return torch.from_numpy(np.stack(rows))

    def add(self, ids: Tensor) -> None:
        """Takes note of the ids (B,) that were chosen."""
        pairs = zip(self.unfinished, ids.tolist(), strict=True)
        texts = (begun + self.tokenizer.tokens[i] for begun, i in pairs)
        self.unfinished = [unfinished_bytes(text) or b"" for text in texts]


@torch.inference_mode()
def generate(
    model: GPT,
    ids: Tensor,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    seed: int = 1337,
    tokenizer: Tokenizer | None = None,
    use_cache: bool = True,
) -> Iterator[Tensor]:
    """Yields the next ids (B,), one at a time, after the prompts `ids` (B, T), T at least 1.

    The model is in eval mode. Given the tokenizer, it writes nothing but valid UTF-8.

    The model sees the last context_length tokens at most. When they fill up, the window slides on
    to its later half, so that the cache is made anew only every context_length / 2 tokens;
    `use_cache=False` computes the same window at each token (the oracle of the tests).
    """
    assert not model.training, "call model.eval() first: dropout would garble the text"
    sampling, generator = sampling or Sampling(), torch.Generator().manual_seed(seed)
    context = model.config.context_length
    seen, cache = ids[:, -context:], None
    valid = ValidText(tokenizer, ids) if tokenizer else None
    for _ in range(max_new_tokens):
        if seen.size(1) > context:
            seen, cache = seen[:, -max(1, context // 2) :], None
        if use_cache and cache is None:
            cache = KVCache(model.config, len(seen), model.embedding.weight)
        new = seen[:, cache.length :] if use_cache else seen
        logits = model(new, cache)[:, -1].float()  # (B, V)
        if valid:
            logits = logits.masked_fill(~valid.mask().to(logits.device), -torch.inf)
        next_ids = sampling(logits, seen, generator)
        if valid:
            valid.add(next_ids)
        seen = torch.cat([seen, next_ids[:, None]], dim=1)
        yield next_ids


def stream_text(tokenizer: Tokenizer, ids: Iterable[int]) -> Iterator[str]:
    """Text of the ids as they come; a character of several tokens appears once it is whole.

    A character that the last ids begin and don't end is left out.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for i in ids:
        if text := decoder.decode(tokenizer.tokens[i]):
            yield text
