"""Owns generation: logits -> next id, rows of ids that grow with a KV cache, generate()."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lit_gpt.errors import UserError
from lit_gpt.model import GPT, KVCache
from lit_gpt.text.tokenizer import Tokenizer, unfinished_bytes


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn from the model's logits.

    Args:
        temperature: divides the logits; 0 (or next to it) always takes the likeliest token.
        top_k: only the k likeliest tokens; None: all.
        top_p: only the likeliest tokens that together reach this probability (Holtzman 2019).
        repetition_penalty: makes tokens that the model sees already less likely when above 1
            (Keskar et al. 2019), 1 changes nothing; between 0.01 and 100.
        min_p: only tokens at least this share as likely as the likeliest (Nguyen et al. 2024).

    Raises:
        UserError: values out of range.
    """

    temperature: float = 0.8
    top_k: int | None = None
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature <= 1e6:
            raise UserError(f"--temperature must be in [0, 1e6], not {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"--top_k must be at least 1, not {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise UserError(f"--top_p must be in (0, 1], not {self.top_p}")
        if not 0.01 <= self.repetition_penalty <= 100:
            raise UserError(
                f"--repetition_penalty must be in [0.01, 100], not {self.repetition_penalty}"
            )
        if not 0 <= self.min_p <= 1:
            raise UserError(f"--min_p must be in [0, 1], not {self.min_p}")

    @property
    def is_greedy(self) -> bool:
        return self.temperature < 1e-4  # where float32 would overflow

    def __call__(
        self,
        logits: Tensor,
        seen: Tensor,
        generator: torch.Generator | Sequence[torch.Generator],
    ) -> Tensor:
        """Logits (B, V) and the ids (B, T) that the model saw to the next ids (B,).

        The random draws are of one generator, or of one for each row.
        """
        if self.is_greedy:
            return self._penalize(logits, seen).argmax(dim=-1)
        # On the CPU, so that a seed gives the same random draws on every device.
        probabilities = self.probabilities(logits, seen).cpu()
        if isinstance(generator, torch.Generator):
            ids = torch.multinomial(probabilities, 1, generator=generator)
        else:
            pairs = zip(probabilities, generator, strict=True)
            ids = torch.stack([torch.multinomial(row, 1, generator=own) for row, own in pairs])
        return ids[:, 0].to(seen.device)

    def probabilities(self, logits: Tensor, seen: Tensor) -> Tensor:
        """What the next ids are drawn with, (B, V); arguments as above."""
        logits = self._penalize(logits, seen)
        if self.is_greedy:
            return torch.zeros_like(logits).scatter(1, logits.argmax(-1, keepdim=True), 1)
        logits = logits / self.temperature
        if self.top_k is not None and self.top_k < logits.size(-1):
            best = logits.topk(self.top_k)
            logits = torch.full_like(logits, -torch.inf).scatter(1, best.indices, best.values)
        probabilities = logits.softmax(dim=-1)
        if self.top_p < 1:
            ordered, order = probabilities.sort(dim=-1, descending=True)
            before = ordered.cumsum(dim=-1) - ordered  # what the likelier tokens add up to
            ordered = ordered.masked_fill((before >= self.top_p) & (before > 0), 0)
            probabilities = torch.zeros_like(ordered).scatter(1, order, ordered)
        if self.min_p > 0:
            least = self.min_p * probabilities.amax(dim=-1, keepdim=True)
            probabilities = probabilities.masked_fill(probabilities < least, 0)
        if self.top_p < 1 or self.min_p > 0:
            probabilities = probabilities / probabilities.sum(dim=-1, keepdim=True)
        return probabilities

    def _penalize(self, logits: Tensor, seen: Tensor) -> Tensor:
        if self.repetition_penalty == 1:
            return logits
        old = logits.gather(1, seen)
        lower = torch.where(old > 0, old / self.repetition_penalty, old * self.repetition_penalty)
        return logits.scatter(1, seen, lower)


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

    def mask(self, of: list[int] | slice) -> Tensor:
        """Which tokens may come next in those rows, (B, V) bool."""
        begun = np.array(self.unfinished, dtype=object)[of]
        rows = [self.tokenizer.may_follow(part) for part in begun]
        return torch.from_numpy(np.stack(rows))

    def add(self, ids: Tensor) -> None:
        """Takes note of the ids (B,) that were chosen."""
        pairs = zip(self.unfinished, ids.tolist(), strict=True)
        texts = (begun + self.tokenizer.tokens[i] for begun, i in pairs)
        self.unfinished = [unfinished_bytes(text) or b"" for text in texts]


class Rows:
    """Ids of a batch of texts that grow together, and what the model says of the next ones.

    The model sees the last context_length tokens at most. When they fill up, the window slides on
    to its later half, so that the cache is made anew only every context_length / 2 tokens.

    Args:
        model: in eval mode.
        ids: the prompts, (B, T), T at least 1.
        tokenizer: given it, tokens that can't go on as UTF-8 are ruled out.
        use_cache: False computes the same window at each token (the oracle of the tests).
    """

    def __init__(
        self, model: GPT, ids: Tensor, tokenizer: Tokenizer | None = None, use_cache: bool = True
    ) -> None:
        assert not model.training, "call model.eval() first: dropout would garble the text"
        self.model, self.use_cache = model, use_cache
        self.seen = ids[:, -model.config.context_length :]  # (B, T)
        self.cache: KVCache | None = None
        self.valid = ValidText(tokenizer, ids) if tokenizer else None

    def logits(self, of: list[int] | slice = slice(None)) -> Tensor:
        """Of the next ids of those rows, (B, V); once before each `append`."""
        context = self.model.config.context_length
        if self.seen.size(1) > context:
            self.seen, self.cache = self.seen[:, -max(1, context // 2) :], None
        if self.use_cache and self.cache is None:
            self.cache = KVCache(self.model.config, len(self.seen), self.model.embedding.weight)
        new = self.seen[:, self.cache.length :] if self.use_cache else self.seen
        last = self.model.features(new, self.cache)[of, -1]  # (B, C)
        logits = self.model.head(last).float()  # (B, V)
        if self.valid:
            logits = logits.masked_fill(~self.valid.mask(of).to(logits.device), -torch.inf)
        return logits

    def append(self, ids: Tensor) -> None:
        """Adds the ids (B,) that were chosen."""
        if self.valid:
            self.valid.add(ids)
        self.seen = torch.cat([self.seen, ids[:, None]], dim=1)

    def keep(self, rows: list[int]) -> None:
        """Goes on with these rows alone."""
        self.seen = self.seen[rows]
        if self.cache:
            self.cache.keys, self.cache.values = (
                self.cache.keys[:, rows],
                self.cache.values[:, rows],
            )
        if self.valid:
            self.valid.unfinished = [self.valid.unfinished[row] for row in rows]


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
    """Yields the next ids (B,), one at a time, after the prompts `ids`; see `Rows`."""
    sampling, generator = sampling or Sampling(), torch.Generator().manual_seed(seed)
    rows = Rows(model, ids, tokenizer, use_cache)
    for _ in range(max_new_tokens):
        next_ids = sampling(rows.logits(), rows.seen, generator)
        rows.append(next_ids)
        yield next_ids


def stream_text(tokenizer: Tokenizer, ids: Iterable[int]) -> Iterator[str]:
    """Text of the ids as they come; a character of several tokens appears once it is whole.

    A character that the last ids begin and don't end is left out.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for i in ids:
        if text := decoder.decode(tokenizer.tokens[i]):
            yield text
