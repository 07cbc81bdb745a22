"""The optimizer, its parameter groups and the learning-rate schedule.

To add an optimizer, follow docs/architecture.md#adding-an-optimizer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:
    from lit_gpt.model import GPT

OptimizerKind = Literal["adamw", "muon"]
Schedule = Literal["constant", "linear", "cosine"]


class MuonAdamW(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) for matrices and AdamW for the rest, as one optimizer.

    Muon's updates are scaled to the size of AdamW's ("Muon is scalable for LLM training", Liu et
    al. 2025), so one learning rate serves both. The first beta is Muon's momentum. State, schedule
    and clipping work as for any optimizer.
    """

    def __init__(
        self, matrices: list[Tensor], groups: list[dict[str, Any]], adamw: dict[str, Any]
    ) -> None:
        self.muon = torch.optim.Muon(
            matrices,
            lr=adamw["lr"],
            weight_decay=groups[0]["weight_decay"],
            momentum=adamw["betas"][0],
            adjust_lr_fn="match_rms_adamw",
        )
        self.adamw = torch.optim.AdamW(groups, **adamw)
        super().__init__([*self.muon.param_groups, *self.adamw.param_groups], {})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        with torch.enable_grad():
            loss = closure() if closure else None
        # Shared again at each step, because loading a state replaces the groups and the state.
        self.muon.param_groups = self.param_groups[:1]
        self.adamw.param_groups = self.param_groups[1:]
        self.muon.state = self.state
        self.adamw.state = self.state
        self.muon.step()
        self.adamw.step()
        return loss


def build_optimizer(
    model: GPT,
    learning_rate: float,
    weight_decay: float,
    betas: tuple[float, float],
    fused: bool = True,
    kind: OptimizerKind = "adamw",
) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter 2019), or Muon for the matrices of `model.blocks`.

    Matrices and embedding tables decay, biases and norms do not.

    Args:
        fused: whether AdamW updates all weights in one kernel; False under a gradient scaler.
    """
    weights = [p for p in model.parameters() if p.requires_grad]
    matrices: list[Tensor] = [p for p in model.blocks.parameters() if p.ndim > 1 and kind == "muon"]
    taken = {id(p) for p in matrices}
    decayed = [p for p in weights if p.ndim > 1 and id(p) not in taken]
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": [p for p in weights if p.ndim <= 1], "weight_decay": 0.0},
    ]
    adamw: dict[str, Any] = {"lr": learning_rate, "betas": betas, "fused": fused}
    return MuonAdamW(matrices, groups, adamw) if matrices else torch.optim.AdamW(groups, **adamw)


def learning_rate_factor(
    step: int,
    max_steps: int,
    warmup_steps: int,
    schedule: Schedule,
    final_share: float,
    horizons: Sequence[Sequence[int]] | None = None,
) -> float:
    """The learning rate of optimizer step `step` (from 0), as a share of its peak.

    Rises linearly over `warmup_steps`, then stays (constant) or falls to `final_share` at
    `max_steps`, linearly or along half a cosine (Loshchilov and Hutter 2017). Without an end
    (max_steps -1) it stays.

    Args:
        horizons: (step, last step) pairs instead of `max_steps`: from `step` on, what is left of
            the fall takes until `last step`.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    plan = horizons or [(0, max_steps)]
    if schedule == "constant" or plan[-1][1] < 0:
        return 1.0
    progress = 0.0
    ends = [start for start, _ in plan[1:]] + [step]
    for (start, last), end in zip(plan, ends, strict=True):
        start = max(start, warmup_steps)
        if (done := min(step, end) - start) > 0:
            progress += (1.0 - progress) * min(1.0, done / max(1, last - start))
    fall = progress if schedule == "linear" else (1 - math.cos(math.pi * progress)) / 2
    return 1.0 - (1.0 - final_share) * fall
