"""Completion: prompts in, pieces of text out, until a stop, the document's end or the limit."""

from __future__ import annotations

import codecs
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from lit_gpt.command import HIDDEN
from lit_gpt.errors import UserError, check_least
from lit_gpt.generation.rows import Rows, fill_gaps
from lit_gpt.generation.sampling import Sampling
from lit_gpt.model import GPT
from lit_gpt.text.tokenizer import Tokenizer

NUM_LIKELIEST = 5
MAX_LOGITS = 1 << 25  # at a time, to score a prompt: 128 MB
FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Request:
    """What to complete, and how.

    Args:
        prompt: text to continue; without one the model starts a new document, or a new line if it
            was trained on text without documents.
        max_new_tokens: the most tokens to add.
        sampling: how tokens are drawn.
        seed: of the random draws; further samples use the following seeds.
        stop: stop sequences; the text ends before the first.
        trace: show the likeliest tokens of each step.
        ids: the prompt as token ids, instead of `prompt`; of prompts that are scored, the model
            reads up to context_length + 1.
        logprobs: gives the log-probability of each token, and of so many of the likeliest.
        scores_prompt: gives those of the prompt's tokens first; then max_new_tokens may be 0.

    Raises:
        UserError: a value out of range.
    """

    prompt: str = ""
    max_new_tokens: int = 100
    sampling: Sampling = field(default_factory=Sampling)
    seed: int = 1337
    stop: tuple[str, ...] = ()
    trace: bool = False
    ids: tuple[int, ...] = field(default=(), metadata=HIDDEN)
    logprobs: int | None = field(default=None, metadata=HIDDEN)
    scores_prompt: bool = field(default=False, metadata=HIDDEN)

    def __post_init__(self) -> None:
        check_least(0 if self.scores_prompt else 1, max_new_tokens=self.max_new_tokens)
        if not 0 <= self.seed < 2**63:
            raise UserError("must be in [0, 2**63)", field="seed", value=self.seed)
        if "" in self.stop:
            raise UserError("must not be empty", field="stop", hint="leave it out")


@dataclass(frozen=True)
class Choice:
    """How a token was chosen."""

    token: int
    probability: float  # the model's
    drawn_with: float  # after temperature, top_k, ...
    likeliest: list[tuple[int, float]]  # tokens and the model's probabilities


@dataclass(frozen=True)
class Logprob:
    """How likely a token is for the model, before temperature, top_k, ...; natural logarithms."""

    token: int
    logprob: float | None  # None: nothing precedes the token
    likeliest: list[tuple[int, float]]  # tokens with their logarithms, as many as asked for


@dataclass(frozen=True)
class CompletionChunk:
    """What one token adds to a completion; its text may be empty."""

    index: int  # of the request
    text: str
    num_tokens: int  # so far
    finish_reason: FinishReason | None = None  # given with the last piece
    choice: Choice | None = None  # if the request asks for a trace
    logprobs: Sequence[Logprob] = ()  # of this token; before the first one, of all in the prompt


def encode_prompt(tokenizer: Tokenizer, prompt: str, ids: Sequence[int] = ()) -> list[int]:
    """The prompt's ids; at least one, as the model needs something to continue.

    Args:
        tokenizer: the model's.
        prompt: the text.
        ids: what it is instead, if not empty.
    """
    if ids:
        return list(ids)
    start = [tokenizer.special[name] for name in tokenizer.start_names]
    if not prompt and not start and tokenizer.learnt_end is not None:
        start = [tokenizer.learnt_end]
    return start + ([] if start and not prompt else tokenizer.encode(prompt or "\n").tolist())


class Completion:
    """The text of one request as it grows."""

    def __init__(self, index: int, request: Request, tokenizer: Tokenizer) -> None:
        self.index = index
        self.request = request
        self.tokenizer = tokenizer
        self.prompt = encode_prompt(tokenizer, request.prompt, request.ids)
        self.end_ids = tokenizer.end_ids
        self.written: list[int] = []
        self.generator = torch.Generator().manual_seed(request.seed)
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.held = ""  # text that may turn out to be the beginning of a stop
        self.is_finished = False

    def score_prompt(self, model: GPT) -> CompletionChunk:
        """The piece before the first token: how likely those of the prompt are."""
        self.is_finished = self.request.max_new_tokens == 0
        logprobs = score(model, self.prompt, self.request.logprobs or 0)
        reason: FinishReason | None = "length" if self.is_finished else None
        return CompletionChunk(self.index, "", 0, reason, logprobs=logprobs)

    def add(
        self, token: int, choice: Choice | None = None, logits: Tensor | None = None
    ) -> CompletionChunk:
        """Adds a token; its piece has the text that no later token can take back.

        Args:
            token: its id.
            choice: how it was chosen, if the request asks for a trace.
            logits: the model's, (V,), if the request asks for log-probabilities.
        """
        self.written.append(token)
        is_last = len(self.written) == self.request.max_new_tokens
        reason: FinishReason | None = "length" if is_last else None
        if token in self.end_ids:
            reason = "stop"
        else:
            self.held += self.decoder.decode(self.tokenizer.tokens[token])
        text = self.held
        starts = [start for stop in self.request.stop if (start := text.find(stop)) >= 0]
        if starts:
            text = text[: min(starts)]
            reason = "stop"
        elif reason is None:
            text = text[: len(text) - overlap(text, self.request.stop)]
        self.held = self.held[len(text) :]
        self.is_finished = reason is not None
        logprobs: list[Logprob] = []
        if self.request.logprobs is not None and logits is not None:
            logprobs = log_probabilities(logits[None], [token], self.request.logprobs)
        return CompletionChunk(self.index, text, len(self.written), reason, choice, logprobs)


def overlap(text: str, stops: Sequence[str]) -> int:
    """The length of the longest end of the text that is the beginning of a stop sequence."""
    longest = max(map(len, stops), default=1) - 1
    ends = (text[-n:] for n in range(min(longest, len(text)), 0, -1))
    return next((len(end) for end in ends if any(stop.startswith(end) for stop in stops)), 0)


def log_probabilities(logits: Tensor, tokens: Sequence[int], num_likeliest: int) -> list[Logprob]:
    """What logits (N, V) say of N tokens, and of the likeliest."""
    logarithms = logits.float().log_softmax(dim=-1)  # (N, V)
    index = torch.tensor(tokens, device=logits.device)[:, None]  # (N, 1)
    its_own = logarithms.gather(1, index)[:, 0].tolist()
    best = logarithms.topk(min(num_likeliest, logits.size(-1)))
    likeliest = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return [
        Logprob(token, own, list(zip(*pair, strict=True)))
        for token, own, pair in zip(tokens, its_own, likeliest, strict=True)
    ]


def score(model: GPT, ids: Sequence[int], num_likeliest: int) -> list[Logprob]:
    """How likely each token is for the model after those before it.

    Args:
        model: in eval mode.
        ids: of a text, up to context_length + 1; of a longer one, the last are scored.
        num_likeliest: tokens that are shown beside each.
    """
    ids = list(ids)[-model.config.context_length - 1 :]
    scores = [Logprob(ids[0], None, [])]
    if len(ids) == 1:
        return scores
    device = model.embedding.weight.device
    hidden = model.hidden_states(torch.tensor([ids[:-1]], device=device))[0]  # (T, C)
    size = max(1, MAX_LOGITS // model.config.vocab_size)
    for start in range(0, len(hidden), size):
        logits = model.head(hidden[start : start + size])
        tokens = ids[start + 1 : start + 1 + size]
        scores += log_probabilities(logits, tokens, num_likeliest)
    return scores


def _draw(
    logits: Tensor, seen: Tensor, completions: list[Completion]
) -> tuple[Tensor, list[Choice | None]]:
    """Draws the next ids (N,) as each request asks; those with a trace get a Choice."""
    ids = torch.empty(len(completions), dtype=torch.long, device=seen.device)
    groups: dict[Sampling, list[int]] = {}
    for row, completion in enumerate(completions):
        groups.setdefault(completion.request.sampling, []).append(row)
    for sampling, group in groups.items():
        generators = [completions[row].generator for row in group]
        written = [completions[row].written for row in group]
        ids[group] = sampling(logits[group], seen[group], generators, written)
    return ids, [
        _choice(completion, *row) if completion.request.trace else None
        for completion, *row in zip(completions, logits, seen, ids, strict=True)
    ]


def _choice(completion: Completion, logits: Tensor, seen: Tensor, token: Tensor) -> Choice:
    probabilities = logits.softmax(dim=-1)
    sampling = completion.request.sampling
    drawn_with = sampling.probabilities(logits[None], seen[None], [completion.written])[0, token]
    best = probabilities.topk(min(NUM_LIKELIEST, len(probabilities)))
    likeliest = list(zip(best.indices.tolist(), best.values.tolist(), strict=True))
    return Choice(int(token), float(probabilities[token]), float(drawn_with), likeliest)


class Batch:
    """Requests that are completed side by side; others may join and leave between two steps.

    The others don't change a request's text.

    Args:
        model: in eval mode; it sees the last context_length tokens.
        tokenizer: the model's.
    """

    def __init__(self, model: GPT, tokenizer: Tokenizer) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.rows = Rows(model, tokenizer)
        self.completions: list[Completion] = []  # of the rows
        self.unscored: deque[Completion] = deque()  # their prompts' scores come first

    def __len__(self) -> int:
        return len(self.completions) + len(self.unscored)

    def add(self, index: int, request: Request) -> None:
        """Takes in a request.

        Args:
            index: of its pieces.
            request: the next steps read its prompt.

        Raises:
            UnicodeEncodeError: the prompt is not valid Unicode.
        """
        completion = Completion(index, request, self.tokenizer)
        if request.scores_prompt:
            self.unscored.append(completion)
        else:
            self._start(completion)

    @torch.inference_mode()
    def _start(self, completion: Completion) -> None:
        self.rows.add(completion.prompt)
        self.completions.append(completion)

    @torch.inference_mode()
    def step(self) -> Iterator[CompletionChunk]:
        """Yields a token of each request whose prompt is read, and reads on in the others.

        It scores no more than one prompt. If it fails, go on after `drop_failed`.
        """
        self.rows.at_work = []
        if self.unscored:
            scored = self.unscored[0]
            yield scored.score_prompt(self.model)
            if not scored.is_finished:
                self._start(scored)
            self.unscored.popleft()
        if self.completions:
            yield from self._write()

    def _write(self) -> Iterator[CompletionChunk]:
        rows, logits = self.rows.logits()
        completions = [self.completions[row] for row in rows]
        drawn_from = self.rows.as_text(logits, rows)
        ids, choices = _draw(drawn_from, self.rows.seen(rows), completions)
        self.rows.append(rows, ids)
        for completion, *drawn in zip(completions, ids.tolist(), choices, logits, strict=True):
            yield completion.add(*drawn)
        finished = {completion.index for completion in completions if completion.is_finished}
        self.keep(lambda index: index not in finished)

    def keep(self, is_wanted: Callable[[int], bool]) -> None:
        """Drops the requests with other indices."""
        self.unscored = deque(waiting for waiting in self.unscored if is_wanted(waiting.index))
        kept = [row for row, running in enumerate(self.completions) if is_wanted(running.index)]
        if len(kept) < len(self.completions):
            kept = fill_gaps(kept)
            with torch.inference_mode():
                self.rows.keep(kept)
            self.completions = [self.completions[row] for row in kept]

    def drop_failed(self) -> list[int]:
        """Drops the requests that the last step, which failed, worked on; returns their indices."""
        failed = [self.completions[row].index for row in self.rows.at_work]
        failed = failed or [self.unscored[0].index]
        self.keep(lambda index: index not in failed)
        return failed


def complete(
    model: GPT,
    tokenizer: Tokenizer,
    requests: Sequence[Request],
    is_wanted: Callable[[int], bool] = lambda index: True,
) -> Iterator[CompletionChunk]:
    """Completes requests side by side; see `Batch`.

    Args:
        model: in eval mode; it sees the last context_length tokens.
        tokenizer: the model's.
        requests: at least one.
        is_wanted: asked after each token; if False, the request with this index is dropped.

    Raises:
        UnicodeEncodeError: a prompt is not valid Unicode.
    """
    batch = Batch(model, tokenizer)
    for index, request in enumerate(requests):
        batch.add(index, request)
    while batch:
        yield from batch.step()
        batch.keep(is_wanted)
