"""Benchmarks of single parts: generating, and encoding a text."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.measure import (
    Options,
    Process,
    Side,
    at_least_one,
    in_turn,
    read_text,
    report,
    run_script,
)
from lit_gpt.generation.sampling import Sampling, generate
from lit_gpt.model import GPT, GPTConfig
from lit_gpt.output_layer import cross_entropy_in_parts, rows_at_once

VOCABULARIES = (1245, 4096, 8192, 13_340)  # of the loss
SAMPLE_VOCABULARY = 1245  # rows of the sample corpus: the default job's model


@torch.inference_mode()
def recompute(model: GPT, ids: Tensor, max_new_tokens: int) -> None:
    """Generates the plain way: the whole window goes through the model for each token."""
    draw = Sampling()
    generator = torch.Generator().manual_seed(1337)
    for _ in range(max_new_tokens):
        window = ids[:, -model.config.context_length :]
        logits = model.head(model.hidden_states(window)[:, -1])  # (B, V)
        ids = torch.cat([ids, draw(logits, window, generator)[:, None]], dim=1)


def generation(options: Options, tokens: int = 256) -> None:
    """Tokens/s of the default model with a key/value cache, against the whole window each token.

    Args:
        options: shared by all benchmarks.
        tokens: to generate after a prompt that fills the window.
    """
    at_least_one(tokens=tokens)
    torch.manual_seed(1337)
    model = GPT(GPTConfig(SAMPLE_VOCABULARY)).eval()
    rows: list[Side] = []
    for batch_size in (1, 32):
        ids = torch.randint(SAMPLE_VOCABULARY, (batch_size, model.config.context_length))

        def rate(run: Callable[[], object], batch_size: int = batch_size) -> float:
            start = time.perf_counter()
            run()
            return tokens * batch_size / (time.perf_counter() - start)

        sides = {
            "whole window each token": lambda ids=ids: rate(lambda: recompute(model, ids, tokens)),
            "generate()": lambda ids=ids: rate(lambda: list(generate(model, ids, tokens))),
        }
        rates = [median(found) for found in in_turn(sides, options.repeats).values()]
        rows += [
            Side(f"{name}, batch of {batch_size}", found, "tokens/s", found / rates[0])
            for name, found in zip(sides, rates, strict=True)
        ]
    report("generate", rows, options.out)


def loss(options: Options, targets: int = 1024, width: int = 96) -> None:
    """Milliseconds of the output layer and the loss, forward and backward: all at once, in parts.

    Args:
        options: shared by all benchmarks.
        targets: tokens to predict.
        width: of the hidden states.
    """
    at_least_one(targets=targets, width=width)
    torch.manual_seed(1337)
    rows: list[Side] = []
    for vocab_size in VOCABULARIES:
        sides = ways_to_a_loss(vocab_size, targets, width)
        times = [median(found) for found in in_turn(sides, 3 + options.repeats).values()]
        rows += [
            Side(f"{vocab_size:,} tokens, {name}", found, "ms", times[0] / found)
            for name, found in zip(sides, times, strict=True)
        ]
    report("loss", rows, options.out)


def ways_to_a_loss(vocab_size: int, targets: int, width: int) -> dict[str, Callable[[], float]]:
    """Each returns its milliseconds."""
    hidden_states = torch.randn(targets, width, requires_grad=True)
    weight = torch.randn(vocab_size, width, requires_grad=True)
    wanted = torch.randint(vocab_size, (targets,))
    rows = rows_at_once(hidden_states, vocab_size)

    def milliseconds(compute: Callable[[], Tensor]) -> float:
        start = time.perf_counter()
        compute().backward()
        return 1000 * (time.perf_counter() - start)

    def at_once() -> Tensor:
        return F.cross_entropy(F.linear(hidden_states, weight), wanted)

    def in_parts() -> Tensor:
        return cross_entropy_in_parts(hidden_states, weight, wanted, rows)

    return {
        "all at once": lambda: milliseconds(at_once),
        f"{rows:,} targets at a time": lambda: milliseconds(in_parts),
    }


def tokenization(options: Options, megabytes: int = 50, only_ours: bool = False) -> None:
    """MB/s and peak memory from a text file to the token cache, against tiktoken.

    Args:
        options: shared by all benchmarks.
        megabytes: to which the text is repeated.
        only_ours: measure the token cache alone.
    """
    at_least_one(megabytes=megabytes)
    text = read_text(options.path)
    size = 0
    with tempfile.TemporaryDirectory() as folder:
        with (Path(folder) / "text").open("wb") as file:
            while size < megabytes * 1_000_000:
                size += file.write(text)

        def tiktoken() -> Process:
            return run_script("benchmarks/encode.py", file.name)

        def token_cache() -> Process:
            with tempfile.TemporaryDirectory(dir=folder) as cache:
                return run_script("benchmarks/encode.py", file.name, cache)

        sides = {"text file to token cache": token_cache}
        if not only_ours:
            sides = {"tiktoken.encode_ordinary": tiktoken} | sides
        results = in_turn(sides, options.repeats)
    rows: list[Side] = []
    for name, processes in results.items():
        measured = [process.result() for process in processes]
        rate = size / 1e6 / median(result["seconds"] for result in measured)
        ratio = rate / rows[0].value if rows else 1.0
        peak_mb = max(result["peak_mb"] for result in measured)
        rows.append(Side(name, rate, "MB/s", ratio, peak_mb=peak_mb))
    report("tokenize", rows, options.out, f"{options.path} repeated to {size / 1e6:,.1f} MB.")
