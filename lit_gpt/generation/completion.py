"""Owns completion: prompts in, pieces of text out, until a stop, the document's end or enough."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from lit_gpt.errors import UserError
from lit_gpt.generation.sampling import Rows, Sampling
from lit_gpt.model import GPT
from lit_gpt.text.tokenizer import Tokenizer

NUM_LIKELIEST = 5


@dataclass(frozen=True)
class Request:
    """What to complete, and how.

    Args:
        prompt: text to continue; without one the model starts a new document, or a new line if it
            was trained on text without documents.
        max_new_tokens: the most tokens to add.
        sampling: how tokens are drawn.
        seed: of the random draws; further samples use the following seeds.
        stop: texts to end before.
        trace: show the likeliest tokens of each step.

    Raises:
        UserError: a value out of range.
    """

    prompt: str = ""
    max_new_tokens: int = 100
    sampling: Sampling = field(default_factory=Sampling)
    seed: int = 1337
    stop: tuple[str, ...] = ()
    trace: bool = False

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            problem = "must be at least 1"
            raise UserError(problem, field="max_new_tokens", value=self.max_new_tokens)
        if not 0 <= self.seed < 2**63:
            raise UserError("must be in [0, 2**63)", field="seed", value=self.seed)
        if "" in self.stop:
            raise UserError("must not be empty", field="stop", hint="leave it out")


@dataclass(frozen=True)
class Choice:
    """How a token came about."""

    token: int
    probability: float  # as the model has it
    drawn_with: float  # after temperature, top_k, ...
    likeliest: list[tuple[int, float]]  # tokens and probabilities, as the model has them


@dataclass(frozen=True)
class Piece:
    """What a token adds to the completion of a request; perhaps no text as yet."""

    index: int  # of the request
    text: str
    num_tokens: int  # so far
    finish_reason: Literal["stop", "length"] | None = None  # given with the last piece
    choice: Choice | None = None  # where asked for


@torch.inference_mode()
def complete(
    model: GPT,
    tokenizer: Tokenizer,
    requests: Sequence[Request],
    is_wanted: Callable[[int], bool] = lambda index: True,
) -> Iterator[Piece]:
    """Completes one or more requests side by side, a token of each at a time.

    Prompts may differ in length: the batch begins after the shortest, and the longer ones are
    still read, a token at a time, while that one is already being continued.

    Args:
        model: in eval mode; it sees the last context_length tokens.
        tokenizer: the model's.
        is_wanted: asked at each token; what nobody waits for any more is not gone on with.

    Raises:
        UnicodeEncodeError: a prompt is no valid Unicode.
    """
    context = model.config.context_length
    prompts = [encode_prompt(tokenizer, request.prompt)[-context:] for request in requests]
    texts = [Text(i, request, tokenizer) for i, request in enumerate(requests)]
    rows, place = _begin(model, tokenizer, prompts)
    while True:
        read = [prompt[place] if place < len(prompt) else -1 for prompt in prompts]
        ids, new = rows.seen.new_tensor(read), [row for row, i in enumerate(read) if i < 0]
        logits = rows.logits(new)  # (N, V)
        ids[new], choices = _draw(logits, rows.seen[new], [texts[row] for row in new])
        for row, choice in zip(new, choices, strict=True):
            yield texts[row].add(int(ids[row]), choice)
        rows.append(ids)
        place += 1
        going = [i for i, t in enumerate(texts) if not t.is_finished and is_wanted(t.index)]
        if not going:
            return
        if len(going) < len(texts):
            rows.keep(going)
            prompts, texts = [prompts[row] for row in going], [texts[row] for row in going]
            if place < min(map(len, prompts)):  # all are still read: then, as at first
                rows, place = _begin(model, tokenizer, prompts)


def _begin(model: GPT, tokenizer: Tokenizer, prompts: list[list[int]]) -> tuple[Rows, int]:
    """All prompts as far as the shortest goes, and how far that is."""
    place = min(map(len, prompts))
    ids = torch.tensor([p[:place] for p in prompts], device=model.embedding.weight.device)
    return Rows(model, ids, tokenizer), place


def encode_prompt(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Its ids, at least one: the model needs something to go on from."""
    if not prompt and tokenizer.end_of_text is not None:
        return [tokenizer.end_of_text]
    return tokenizer.encode(prompt or "\n").tolist()


class Text:
    """The completion of one request as it grows."""

    def __init__(self, index: int, request: Request, tokenizer: Tokenizer) -> None:
        self.index, self.request, self.tokenizer = index, request, tokenizer
        self.generator = torch.Generator().manual_seed(request.seed)
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.held = ""  # may turn out to be the beginning of a stop
        self.num_tokens = 0
        self.is_finished = False

    def add(self, token: int, choice: Choice | None = None) -> Piece:
        """The text that is certain now; a character of several tokens comes once it is whole."""
        self.num_tokens += 1
        reason = "length" if self.num_tokens == self.request.max_new_tokens else None
        if token == self.tokenizer.end_of_text:
            reason = "stop"
        else:
            self.held += self.decoder.decode(self.tokenizer.tokens[token])
        certain = self.held
        found = [at for stop in self.request.stop if (at := certain.find(stop)) >= 0]
        if found:
            certain, reason = certain[: min(found)], "stop"
        elif reason is None:
            certain = certain[: len(certain) - begun(certain, self.request.stop)]
        self.held = self.held[len(certain) :]
        self.is_finished = reason is not None
        return Piece(self.index, certain, self.num_tokens, reason, choice)


def begun(text: str, stops: Sequence[str]) -> int:
    """How many characters at the end of the text a stop begins with."""
    longest = max(map(len, stops), default=1) - 1
    ends = (text[-n:] for n in range(min(longest, len(text)), 0, -1))
    return next((len(end) for end in ends if any(stop.startswith(end) for stop in stops)), 0)


def _draw(logits: Tensor, seen: Tensor, texts: list[Text]) -> tuple[Tensor, list[Choice | None]]:
    """The next ids (N,), as each text's request has it, and how, where that is traced."""
    ids = torch.empty(len(texts), dtype=torch.long, device=seen.device)
    groups: dict[Sampling, list[int]] = {}
    for row, text in enumerate(texts):
        groups.setdefault(text.request.sampling, []).append(row)
    for sampling, group in groups.items():
        generators = [texts[row].generator for row in group]
        ids[group] = sampling(logits[group], seen[group], generators)
    return ids, [
        _choice(text.request.sampling, *row) if text.request.trace else None
        for text, *row in zip(texts, logits, seen, ids, strict=True)
    ]


def _choice(sampling: Sampling, logits: Tensor, seen: Tensor, token: Tensor) -> Choice:
    probabilities = logits.softmax(dim=-1)
    drawn_with = sampling.probabilities(logits[None], seen[None])[0, token]
    best = probabilities.topk(min(NUM_LIKELIEST, len(probabilities)))
    likeliest = list(zip(best.indices.tolist(), best.values.tolist(), strict=True))
    return Choice(int(token), float(probabilities[token]), float(drawn_with), likeliest)
