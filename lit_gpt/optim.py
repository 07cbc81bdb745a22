"""Owns the optimizer, its parameter groups and the learning-rate schedule."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import nn

Schedule = Literal["constant", "linear", "cosine"]


def build_adamw(
    model: nn.Module,
    learning_rate: float,
    weight_decay: float,
    betas: tuple[float, float],
    fused: bool = True,
) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019); matrices and tables decay, biases and norms don't.

    One fused kernel updates all weights; `fused=False` where a gradient scaler needs to step in.
    """
    weights = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in weights if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in weights if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=fused)


def learning_rate_factor(
    step: int, max_steps: int, warmup_steps: int, schedule: Schedule, final_share: float
) -> float:
    """The share of the peak learning rate that optimizer step `step` (from 0) uses.

    Rises linearly over `warmup_steps`, then stays (constant) or falls to `final_share` at
    `max_steps`, in a line or half a cosine (Loshchilov and Hutter 2017). Without an end
    (max_steps -1) it stays.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "constant" or max_steps < 0:
        return 1.0
    progress = min(1.0, (step - warmup_steps) / max(1, max_steps - warmup_steps))
    fall = progress if schedule == "linear" else (1 - math.cos(math.pi * progress)) / 2
    return 1.0 - (1.0 - final_share) * fall
