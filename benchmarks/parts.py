"""Benchmarks of single parts: generating, and encoding a text."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

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
