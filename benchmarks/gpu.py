"""Benchmarks for one NVIDIA GPU: GPT-2 124M's shape, the loss, where a step's time goes.

Each part takes a device, so that a CPU can test it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.measure import Options, Side, at_least_one, flops_per_token, read_text, report
from benchmarks.step import Size, config, measure_size, report_steps
from lit_gpt.model import GPT, GPTConfig
from lit_gpt.module import next_token_loss
from lit_gpt.optim import build_optimizer
from lit_gpt.output_layer import cross_entropy_in_parts

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
VOCABULARY = 50_304  # GPT-2's, rounded up to a multiple of 64
GPT2 = {"position": "learned", "activation": "gelu", "tie_embeddings": True, "bias": False}
LAYOUTS = {
    "GPT-2's layout": GPTConfig(VOCABULARY, 1024, 768, 12, 12, 0.0, **GPT2),
    "modern style": GPTConfig(VOCABULARY, 1024, 768, 12, 12, 0.0, "modern"),
}


def synchronize(device: str) -> None:
    if device != "cpu":
        torch.accelerator.synchronize()


def peak_bytes(device: str) -> int | None:
    """The most memory of the device since `reset_peak`; unknown on a CPU."""
    return None if device == "cpu" else torch.cuda.max_memory_allocated()


def reset_peak(device: str) -> None:
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()


def megabytes(num_bytes: int | None) -> float | None:
    return None if num_bytes is None else num_bytes / 1e6


def flash_attention(device: str) -> bool:
    """Whether scaled_dot_product_attention has FlashAttention for our causal bfloat16 heads."""
    q = torch.randn(1, 12, 128, 64, device=device, dtype=torch.bfloat16)
    try:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            F.scaled_dot_product_attention(q, q, q, is_causal=True)
    except RuntimeError:
        return False
    return True


def time_bare_steps(
    config: GPTConfig, compiled: bool, batch_size: int, groups: int, device: str = "cuda"
) -> tuple[float, float, int | None]:
    """Seconds per step, operations per token and peak bytes; the median of groups of steps."""
    torch.manual_seed(1337)
    reset_peak(device)
    with torch.device(device):
        model = GPT(config)
        ids = torch.randint(config.vocab_size, (batch_size, config.context_length + 1))
    if compiled:
        for block in model.blocks:
            block.compile()
    optimizer = build_optimizer(model, 6e-4, 0.1, (0.9, 0.95))

    def group(steps: int = 5) -> float:
        start = time.perf_counter()
        for _ in range(steps):
            with torch.autocast(device, torch.bfloat16):
                loss = next_token_loss(model, ids[:, :-1], ids[:, 1:])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        synchronize(device)
        return (time.perf_counter() - start) / steps

    group()  # warm-up, and compilation
    seconds = median([group() for _ in range(groups)])
    return seconds, flops_per_token(config, model), peak_bytes(device)


def losses(
    tokens: int, d_model: int, vocab_size: int, device: str = "cuda"
) -> dict[str, Callable[[], Tensor]]:
    """The output layer and the loss, forward and backward, with all logits at once and in parts.

    Each returns the loss.
    """
    torch.manual_seed(1337)
    hidden_states = torch.randn(tokens, d_model, device=device)
    head = nn.Linear(d_model, vocab_size, bias=False, device=device)
    targets = torch.randint(vocab_size, (tokens,), device=device)

    def backward(loss_of: Callable[[Tensor], Tensor]) -> Tensor:
        head.weight.grad = None
        with torch.autocast(device, torch.bfloat16):
            loss = loss_of(hidden_states.requires_grad_())
        loss.backward()
        return loss.detach()

    def at_once(hidden_states: Tensor) -> Tensor:
        return F.cross_entropy(head(hidden_states).float(), targets)

    def in_parts(hidden_states: Tensor) -> Tensor:
        rows = max(1, tokens // 16)
        return cross_entropy_in_parts(hidden_states, head.weight, targets, rows)

    return {"all logits at once": lambda: backward(at_once), "in parts": lambda: backward(in_parts)}


def compare_losses(
    tokens: int,
    repeats: int,
    device: str = "cuda",
    d_model: int = 768,
    vocab_size: int = VOCABULARY,
) -> list[Side]:
    rows: list[Side] = []
    for name, loss in losses(tokens, d_model, vocab_size, device).items():
        value = loss()  # warm-up
        reset_peak(device)
        seconds = []
        for _ in range(3 * repeats):
            synchronize(device)
            start = time.perf_counter()
            loss()
            synchronize(device)
            seconds.append(time.perf_counter() - start)
        found = 1e3 * median(seconds)
        ratio = rows[0].value / found if rows else 1.0
        memory = megabytes(peak_bytes(device))
        rows.append(Side(name, found, "ms", ratio, loss=value.item(), peak_mb=memory))
    return rows


def compare_layouts(
    layouts: dict[str, GPTConfig],
    batch_size: int,
    repeats: int,
    peak: float | None,
    device: str = "cuda",
) -> list[Side]:
    """Bare steps in bfloat16, eager and compiled: speed, memory, share of the peak speed."""
    rows: list[Side] = []
    for (name, layout), compiled in product(layouts.items(), (False, True)):
        seconds, flops, memory = time_bare_steps(layout, compiled, batch_size, 2 * repeats, device)
        rate = batch_size * layout.context_length / seconds
        ratio = rate / rows[0].value if rows else 1.0
        share = flops * rate / peak if peak else None
        how = "compiled" if compiled else "eager"
        label = f"{name}, {how} ({1e3 * seconds:.1f} ms/step)"
        rows.append(Side(label, rate, "tokens/s", ratio, peak_mb=megabytes(memory), share=share))
    return rows


def gpu(options: Options, batch_size: int = 32) -> None:
    """GPT-2 124M's shape: bare steps, the loss, and where a step's time goes in the Trainer.

    Args:
        options: shared by all benchmarks.
        batch_size: windows of 1,024 tokens.
    """
    at_least_one(repeats=options.repeats, batch_size=batch_size)
    if not torch.cuda.is_available():
        print("No NVIDIA GPU here: nothing to measure")
        return
    read_text(options.path)
    torch.set_float32_matmul_precision("high")
    card = torch.cuda.get_device_name()
    peak = next((flops for name, flops in PEAK_FLOPS.items() if name in card), None)
    note = f"{card}, bfloat16 autocast, batch {batch_size} x 1024"
    note += "" if peak else "; its peak speed is unknown"
    note += f"; FlashAttention: {'yes' if flash_attention('cuda') else 'no'}; FP8 is not tried"
    rows = compare_layouts(LAYOUTS, batch_size, options.repeats, peak)
    report("gpu", rows, options.out, note)
    report("gpu_loss", compare_losses(batch_size * 1024, options.repeats), options.out, card)
    argv = [f"--data.path={Path(options.path).resolve()}", "--trainer.accelerator=gpu"]
    argv += [f"--data.batch_size={batch_size}", "--trainer.accumulate_grad_batches=1"]
    size = Size([config("gpt2_124m.yaml")], group=5, vocab_size=VOCABULARY)
    limits: dict[torch.dtype, float] = {}
    shares = measure_size("124M", size, argv, 2 * options.repeats, limits)
    report_steps("gpu_step", [shares], limits, options.out)
