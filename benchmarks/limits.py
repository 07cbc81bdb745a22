"""How fast this machine multiplies matrices: the limit of any training step."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable

import torch
from torch import nn

from lit_gpt.model import GPT


def operation_rate(flop: float, operation: Callable[[], object], device: str = "cpu") -> float:
    """Operations per second, of the fastest of several calls: others only slow it down."""

    def seconds() -> float:
        start = time.perf_counter()
        operation()
        if device != "cpu":
            torch.accelerator.synchronize()
        return time.perf_counter() - start

    first = seconds()
    return flop / min(seconds() for _ in range(max(3, min(200, int(0.2 / first)))))


def product_rate(dtype: torch.dtype, device: str = "cpu") -> float:
    """The machine's limit: operations per second of its fastest large square matrix product."""
    rates = []
    for size in (512, 1024, 2048) if device == "cpu" else (4096, 8192):
        a, b = torch.randn(2, size, size, device=device).to(dtype)
        rates.append(operation_rate(2 * size**3, lambda a=a, b=b: a @ b, device))
    return max(rates)


def shape_rate(model: GPT, tokens: int, dtype: torch.dtype, device: str = "cpu") -> float:
    """Operations per second of the linear layers' own products, forward and backward.

    Attention's products and everything that is no product are left out: a bound for this model.
    """
    layers = [m for m in model.modules() if isinstance(m, nn.Linear)]
    shapes = Counter((layer.in_features, layer.out_features) for layer in layers)
    flop = 0.0
    seconds = 0.0
    for (width, out), count in shapes.items():
        x = torch.randn(tokens, width, device=device).to(dtype)
        weight = torch.randn(out, width, device=device).to(dtype)
        gradient = torch.randn(tokens, out, device=device).to(dtype)
        for product in (
            lambda x=x, w=weight: x @ w.T,
            lambda g=gradient, w=weight: g @ w,
            lambda g=gradient, x=x: g.T @ x,
        ):
            one = 2.0 * tokens * width * out
            flop += count * one
            seconds += count * one / operation_rate(one, product, device)
    return flop / seconds
