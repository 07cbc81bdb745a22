"""Requests to the server's batcher, one every few milliseconds: latencies and tokens/s."""

from __future__ import annotations

import asyncio
import random
import time
from dataclasses import dataclass
from statistics import mean, median, quantiles
from typing import Literal

import torch

from benchmarks.measure import Options, Side, at_least_one, in_turn, read_text, report
from lit_gpt.errors import check_least
from lit_gpt.generation.completion import Request
from lit_gpt.model import GPT, GPTConfig
from lit_gpt.serving.batching import Batcher
from lit_gpt.text.tokenizer import Tokenizer
from lit_gpt.text.vocabularies import load_tokenizer

SIZES = {
    "default": {},
    "128x3": {"d_model": 128, "num_blocks": 3, "style": "modern"},
}
METRICS = (
    "tokens/s",
    "all requests, s",
    "a request, mean ms",
    "a request, 95th percentile, ms",
    "its first token, mean ms",
    "its first token, 95th percentile, ms",
)


@dataclass(frozen=True)
class Served:
    """When a request's first and last tokens came, in seconds after it was sent."""

    first: float
    last: float
    num_tokens: int


def some_requests(count: int, text: str, longest: int) -> list[Request]:
    """Requests for 20 to 60 tokens after prompts of 1 to `longest` characters."""
    dice = random.Random(1337)
    requests = []
    for seed in range(count):
        start = dice.randrange(max(1, len(text) - longest))
        prompt = text[start : start + dice.randint(1, longest)]
        requests.append(Request(prompt, dice.randint(20, 60), seed=seed))
    return requests


async def ask(batcher: Batcher, requests: list[Request], every: float) -> list[Served]:
    async def one(place: int) -> Served:
        await asyncio.sleep(place * every)
        sent = time.perf_counter()
        pieces = batcher.submit([requests[place]]).pieces()
        await anext(pieces)
        first = time.perf_counter() - sent
        num_tokens = 1
        async for piece in pieces:
            num_tokens = piece.num_tokens
        return Served(first, time.perf_counter() - sent, num_tokens)

    return await asyncio.gather(*(one(place) for place in range(len(requests))))


def measure(
    model: GPT, tokenizer: Tokenizer, requests: list[Request], every: float, max_batch_size: int
) -> list[float]:
    """The METRICS of one run."""
    batcher = Batcher(model, tokenizer, len(requests), max_batch_size)
    batcher.start()
    try:
        start = time.perf_counter()
        served = asyncio.run(ask(batcher, requests, every))
        seconds = time.perf_counter() - start
    finally:
        batcher.stop()
        batcher.join()
    first = [1000 * one.first for one in served]
    last = [1000 * one.last for one in served]
    speed = sum(one.num_tokens for one in served) / seconds
    latencies = [f(values) for values in (last, first) for f in (mean, percentile_95)]
    return [speed, seconds, *latencies]


def percentile_95(values: list[float]) -> float:
    return quantiles(values, n=20)[-1] if len(values) > 1 else values[0]


def serving(
    options: Options,
    size: Literal["default", "128x3"] = "128x3",
    requests: int = 50,
    every: float = 0.02,
) -> None:
    """Requests for 20 to 60 tokens each, side by side against one after the other.

    Args:
        options: shared by all benchmarks.
        size: of an untrained model, with the vocabulary of the text.
        requests: how many.
        every: seconds from one to the next.
    """
    at_least_one(requests=requests)
    check_least(0, every=every)
    text = read_text(options.path).decode(errors="replace")
    full = load_tokenizer("cl100k_base")
    tokenizer = full.compact(full.encode(text).tolist())[0]
    torch.manual_seed(1337)
    model = GPT(GPTConfig(tokenizer.vocab_size, **SIZES[size])).eval()
    asked = some_requests(requests, text, model.config.context_length)
    sides = {
        name: lambda most=most: measure(model, tokenizer, asked, every, most)
        for name, most in {"one after the other": 1, "side by side": 64}.items()
    }
    results = in_turn(sides, options.repeats)
    rows: list[Side] = []
    for place, metric in enumerate(METRICS):
        plain = 0.0
        for name, runs in results.items():
            value = median(run[place] for run in runs)
            plain = plain or value
            ratio = value / plain if metric == "tokens/s" else plain / value
            rows.append(Side(f"{metric}, {name}", value, "value", ratio))
    note = f"{requests} requests, one every {1000 * every:g} ms, {size}."
    report("serving", rows, options.out, note)
