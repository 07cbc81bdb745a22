"""Benchmarks of single parts: generating, encoding a text, GPT-2's shape on a GPU."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from itertools import product
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
from lit_gpt.module import next_token_loss
from lit_gpt.optim import build_optimizer

SAMPLE_VOCABULARY = 1246  # rows of the sample corpus: the default job's model


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


# Dense bfloat16 operations per second, from NVIDIA's data sheets.
PEAK_FLOPS = {
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}


def flops_per_token(config: GPTConfig, model: GPT) -> float:
    """Operations of forward and backward: PaLM's formula (Chowdhery et al. 2022, appendix B).

    6 for each weight that multiplies (an untied embedding doesn't), and 12 C T per block for
    attention.
    """
    multiplying = sum(p.numel() for p in model.parameters()) - (
        0 if config.tie_embeddings else model.embedding.weight.numel()
    )
    return 6 * multiplying + 12 * config.num_blocks * config.d_model * config.context_length


def gpu(options: Options, batch_size: int = 32) -> None:
    """GPT-2 124M's shape on synthetic tokens, eager and compiled: speed, memory, utilization.

    Args:
        options: shared by all benchmarks.
        batch_size: windows of 1,024 tokens.
    """
    at_least_one(repeats=options.repeats, batch_size=batch_size)
    if not torch.cuda.is_available():
        print("No NVIDIA GPU here: nothing to measure")
        return
    torch.set_float32_matmul_precision("high")
    card = torch.cuda.get_device_name()
    peak = next((flops for name, flops in PEAK_FLOPS.items() if name in card), None)
    modern = GPTConfig(50_304, 1024, 768, 12, 12, 0.0, "modern")
    classic = {"position": "learned", "activation": "gelu", "tie_embeddings": True, "bias": False}
    gpt2 = GPTConfig(50_304, 1024, 768, 12, 12, 0.0, **classic)
    configs = {"GPT-2's layout": gpt2, "modern style": modern}
    rows: list[Side] = []
    for (name, config), compiled in product(configs.items(), (False, True)):
        seconds, flops, memory = step_on_gpu(config, compiled, batch_size, 2 * options.repeats)
        rate = batch_size * 1024 / seconds
        ratio = rate / rows[0].value if rows else 1.0
        share = flops * rate / peak if peak else None
        how = "compiled" if compiled else "eager"
        label = f"{name}, {how} ({1e3 * seconds:.1f} ms/step)"
        rows.append(Side(label, rate, "tokens/s", ratio, peak_mb=memory / 1e6, share=share))
    note = f"{card}, bfloat16 autocast, batch {batch_size} x 1024"
    report("gpu", rows, options.out, note + ("" if peak else "; its peak speed is unknown"))


def step_on_gpu(
    config: GPTConfig, compiled: bool, batch_size: int, groups: int
) -> tuple[float, float, int]:
    """Seconds per step, operations per token and peak bytes; the median of groups of steps."""
    torch.manual_seed(1337)
    torch.cuda.reset_peak_memory_stats()
    with torch.device("cuda"):
        model = GPT(config)
        ids = torch.randint(50_257, (batch_size, config.context_length + 1))
    if compiled:
        for block in model.blocks:
            block.compile()
    optimizer = build_optimizer(model, 6e-4, 0.1, (0.9, 0.95))

    def group(steps: int = 5) -> float:
        start = time.perf_counter()
        for _ in range(steps):
            with torch.autocast("cuda", torch.bfloat16):
                loss = next_token_loss(model, ids[:, :-1], ids[:, 1:])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        torch.cuda.synchronize()
        return (time.perf_counter() - start) / steps

    group()  # warm-up, and compilation
    seconds = median([group() for _ in range(groups)])
    return seconds, flops_per_token(config, model), torch.cuda.max_memory_allocated()
