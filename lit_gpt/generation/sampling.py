"""Sampling: from logits to the next ids, again and again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lit_gpt.errors import UserError
from lit_gpt.generation.rows import Rows
from lit_gpt.model import GPT
from lit_gpt.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn from the model's logits.

    Args:
        temperature: divides the logits; 0 always takes the likeliest token.
        top_k: draw from the k likeliest tokens only.
        top_p: draw from the likeliest tokens that together reach this probability
            (Holtzman et al. 2019).
        repetition_penalty: above 1, makes tokens that the model already sees less likely
            (Keskar et al. 2019); 1 changes nothing.
        min_p: draw from tokens at least this fraction as likely as the likeliest
            (Nguyen et al. 2024).
        frequency_penalty: is subtracted from a token's logit for each time that it was generated.
        presence_penalty: is subtracted once from the logits of all tokens that were generated;
            both as OpenAI defines them, so the prompt's tokens don't count.

    Raises:
        UserError: a value out of range.
    """

    temperature: float = 0.8
    top_k: int | None = None
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0

    def __post_init__(self) -> None:
        for name, is_valid, wanted in (
            ("temperature", 0 <= self.temperature <= 1e6, "in [0, 1e6]"),
            ("top_k", self.top_k is None or self.top_k >= 1, "at least 1"),
            ("top_p", 0 < self.top_p <= 1, "in (0, 1]"),
            ("repetition_penalty", 0.01 <= self.repetition_penalty <= 100, "in [0.01, 100]"),
            ("min_p", 0 <= self.min_p <= 1, "in [0, 1]"),
            ("frequency_penalty", -2 <= self.frequency_penalty <= 2, "in [-2, 2]"),
            ("presence_penalty", -2 <= self.presence_penalty <= 2, "in [-2, 2]"),
        ):
            if not is_valid:
                raise UserError(f"must be {wanted}", field=name, value=getattr(self, name))

    @property
    def is_greedy(self) -> bool:
        return self.temperature < 1e-4  # dividing by less can overflow float32

    def __call__(
        self,
        logits: Tensor,
        seen: Tensor,
        generator: torch.Generator | Sequence[torch.Generator],
        written: Sequence[Sequence[int]] = (),
    ) -> Tensor:
        """Draws the next ids (B,).

        Args:
            logits: of the next ids, (B, V).
            seen: ids that the model saw, (B, T).
            generator: one for all rows, or one for each.
            written: those that were generated, of each row; needed for the penalties only.
        """
        if self.is_greedy:
            return self._penalize(logits, seen, written).argmax(dim=-1)
        # Drawn on the CPU, so that a seed gives the same text on every device.
        probabilities = self.probabilities(logits, seen, written).cpu()
        if isinstance(generator, torch.Generator):
            ids = probabilities.multinomial(1, generator=generator)  # (B, 1)
        else:
            rows = zip(probabilities, generator, strict=True)
            ids = torch.stack([row.multinomial(1, generator=g) for row, g in rows])  # (B, 1)
        return ids[:, 0].to(seen.device)

    def probabilities(
        self, logits: Tensor, seen: Tensor, written: Sequence[Sequence[int]] = ()
    ) -> Tensor:
        """The probabilities (B, V) to draw the next ids with; arguments as for `__call__`."""
        logits = self._penalize(logits, seen, written)
        if self.is_greedy:
            return torch.zeros_like(logits).scatter(1, logits.argmax(-1, keepdim=True), 1)
        logits = logits / self.temperature
        if self.top_k is not None and self.top_k < logits.size(-1):
            best = logits.topk(self.top_k)
            logits = torch.full_like(logits, -torch.inf).scatter(1, best.indices, best.values)
        probabilities = logits.softmax(dim=-1)
        if self.top_p < 1:
            ordered, order = probabilities.sort(dim=-1, descending=True)
            before = ordered.cumsum(dim=-1) - ordered  # total of the likelier tokens
            ordered = ordered.masked_fill((before >= self.top_p) & (before > 0), 0)
            probabilities = torch.zeros_like(ordered).scatter(1, order, ordered)
        if self.min_p > 0:
            least = self.min_p * probabilities.amax(dim=-1, keepdim=True)
            probabilities = probabilities.masked_fill(probabilities < least, 0)
        if self.top_p < 1 or self.min_p > 0:
            probabilities = probabilities / probabilities.sum(dim=-1, keepdim=True)
        return probabilities

    def _penalize(self, logits: Tensor, seen: Tensor, written: Sequence[Sequence[int]]) -> Tensor:
        if self.repetition_penalty != 1:
            old = logits.gather(1, seen)
            factor = self.repetition_penalty
            logits = logits.scatter(1, seen, torch.where(old > 0, old / factor, old * factor))
        if self.frequency_penalty or self.presence_penalty:
            counts = torch.stack(
                [torch.tensor(ids).long().bincount(minlength=logits.size(1)) for ids in written]
            ).to(logits.device)  # (B, V)
            penalty = self.frequency_penalty * counts + self.presence_penalty * (counts > 0)
            logits = logits - penalty
        return logits


@torch.inference_mode()
def generate(
    model: GPT,
    ids: Tensor,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    seed: int = 1337,
    tokenizer: Tokenizer | None = None,
) -> Iterator[Tensor]:
    """Yields the next ids (B,) of the prompts `ids` (B, T), one step at a time; see `Rows`."""
    sampling = sampling or Sampling()
    generator = torch.Generator().manual_seed(seed)
    rows = Rows(model, tokenizer)
    for prompt in ids.tolist():
        rows.add(prompt)
    every = list(range(len(ids)))
    written: list[list[int]] = [[] for _ in ids]
    for _ in range(max_new_tokens):
        _, logits = rows.logits()  # of all, as they are equally long
        next_ids = sampling(rows.as_text(logits, every), rows.seen(every), generator, written)
        rows.append(every, next_ids)
        for row, token in zip(written, next_ids.tolist(), strict=True):
            row.append(token)
        yield next_ids
