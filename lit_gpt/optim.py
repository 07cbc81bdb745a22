"""Owns the optimizer, its parameter groups and the learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

OptimizerKind = Literal["adamw", "muon"]
Schedule = Literal["constant", "linear", "cosine"]


class MuonAdamW(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) for matrices, AdamW for all else, as one optimizer.

    Its updates are scaled as large as AdamW's ("Muon is scalable for LLM training", Liu et al.
    2025), so one learning rate serves both, and one momentum, the first beta. State, schedule and
    clipping are any optimizer's.
    """

    def __init__(
        self, matrices: list[Tensor], groups: list[dict[str, Any]], adamw: dict[str, Any]
    ) -> None:
        same = {"lr": adamw["lr"], "weight_decay": groups[0]["weight_decay"]}
        same["momentum"] = adamw["betas"][0]
        self.muon = torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw", **same)
        self.adamw = torch.optim.AdamW(groups, **adamw)
        super().__init__([*self.muon.param_groups, *self.adamw.param_groups], {})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        with torch.enable_grad():
            loss = closure() if closure else None
        # Anew each time: loading a state replaces the groups and the state.
        self.muon.param_groups, self.adamw.param_groups = (
            self.param_groups[:1],
            self.param_groups[1:],
        )
        self.muon.state = self.adamw.state = self.state
        self.muon.step()
        self.adamw.step()
        return loss


def build_optimizer(
    model: nn.Module,
    learning_rate: float,
    weight_decay: float,
    betas: tuple[float, float],
    fused: bool = True,
    kind: OptimizerKind = "adamw",
) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter 2019), or Muon for what `model.blocks` multiply with.

    Matrices and tables decay, biases and norms don't. AdamW's fused kernel updates all weights at
    once; `fused=False` where a gradient scaler needs to step in.
    """
    weights = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in model.blocks.parameters() if p.ndim > 1] if kind == "muon" else []
    taken = {id(p) for p in matrices}
    tables = [p for p in weights if p.ndim > 1 and id(p) not in taken]
    groups = [
        {"params": tables, "weight_decay": weight_decay},
        {"params": [p for p in weights if p.ndim <= 1], "weight_decay": 0.0},
    ]
    adamw = {"lr": learning_rate, "betas": betas, "fused": fused}
    return MuonAdamW(matrices, groups, adamw) if matrices else torch.optim.AdamW(groups, **adamw)


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
