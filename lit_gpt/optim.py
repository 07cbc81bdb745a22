"""The optimizer, its parameter groups and the learning-rate schedule.

To add an optimizer, follow docs/architecture.md#adding-an-optimizer.
"""

from __future__ import annotations

import math
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial, reduce
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:
    from lit_gpt.model import GPT

EPS = 1e-8  # AdamW's epsilon
CPU_CLOCK = time.perf_counter if os.name == "nt" else time.thread_time  # Windows' has 16 ms ticks
OptimizerKind = Literal["adamw", "muon"]
Schedule = Literal["constant", "linear", "cosine"]


MUON_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}  # by their name in checkpoints


class Muon(torch.optim.Muon):
    """torch.optim.Muon, whose matrices of one shape are orthogonalized together, in `dtype`.

    torch's own takes them one by one, in bfloat16, which is up to 80 times slower than float32 on a
    processor without bfloat16 units. In bfloat16, updates are the same up to rounding.

    Args:
        matrices: (M, N) each.
        dtype: of the iteration; a checkpoint keeps it, so that a resumed run goes on with it.
        options: see torch.optim.Muon.

    Attributes:
        orthogonalize: the results (m, N) of matrices of one shape, of which this process has (m, N)
            each; by default all rows. distributed/fsdp2.py has another.
    """

    def __init__(self, matrices: list[Tensor], dtype: torch.dtype, **options: Any) -> None:
        super().__init__(matrices, **options, adjust_lr_fn="match_rms_adamw")
        for group in self.param_groups:
            group["ns_dtype"] = str(dtype).removeprefix("torch.")
        self.orthogonalize: Callable[[list[Tensor], torch.Size, torch.dtype], Iterable[Tensor]]
        self.orthogonalize = lambda rows, _, dtype: orthogonalize(torch.stack(rows), dtype)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        with torch.enable_grad():
            loss = closure() if closure else None
        for group in self.param_groups:
            shapes: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for weight in group["params"]:
                if weight.grad is not None:
                    shapes[weight.shape].append(weight)
            for weights in shapes.values():
                self._update(weights, group)
        return loss

    def _update(self, weights: list[Tensor], group: dict[str, Any]) -> None:
        """Updates weights of one shape (M, N)."""
        for weight in weights:
            if "momentum_buffer" not in self.state[weight]:
                self.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
        momenta = [local(self.state[weight]["momentum_buffer"]) for weight in weights]
        gradients = [local(weight.grad) for weight in weights if weight.grad is not None]
        torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
        directions = torch._foreach_lerp(gradients, momenta, group["momentum"])
        dtype = MUON_DTYPES[group.get("ns_dtype", "bfloat16")]  # of 0.1.0: no other
        updates = self.orthogonalize(list(directions), weights[0].shape, dtype)
        # The root mean square of an orthogonal matrix's entries is 1 / sqrt(max(M, N)), AdamW's
        # updates have about 0.2.
        rate = group["lr"] * 0.2 * math.sqrt(max(weights[0].shape))
        for weight, update in zip(map(local, weights), updates, strict=True):
            weight.mul_(1 - group["lr"] * group["weight_decay"])
            weight.add_(update.to(weight.dtype), alpha=-rate)


def local(tensor: Any) -> Tensor:
    """The rows of a sharded tensor that this process has."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def orthogonalize(matrices: Tensor, dtype: torch.dtype) -> Tensor:
    """Five steps of Newton-Schulz towards the nearest orthogonal matrices (Jordan et al. 2024).

    Each maps the singular values, at first divided by the root of the sum of their squares, by
    s -> 3.4445 s - 4.775 s^3 + 2.0315 s^5, which takes most of them to between 0.7 and 1.2.

    Args:
        matrices: (B, M, N).
        dtype: to compute in.

    Returns:
        (B, M, N), of type `dtype`.
    """
    if matrices.size(1) > matrices.size(2):
        return orthogonalize(matrices.mT, dtype).mT
    a, b, c = (3.4445, -4.7750, 2.0315)
    x = matrices.to(dtype)
    x = x / x.flatten(1).norm(dim=1).clamp(min=1e-7)[:, None, None]
    if dtype is torch.float32 and x.is_cpu and x.size(2) >= 2 * x.size(1):
        # Iterating on the M x M products alone takes two thirds of the time. It needs all the
        # digits of float32, so it is not for TF32: each step makes small errors 12 times as large.
        gram = x @ x.mT  # (B, M, M)
        factors: list[Tensor] = []
        for _ in range(5):
            if factors:
                gram = factors[-1] @ gram @ factors[-1]
            factors.append(torch.baddbmm(gram, gram, gram, beta=b, alpha=c))
            factors[-1].diagonal(dim1=1, dim2=2).add_(a)
        return reduce(torch.matmul, factors) @ x
    for _ in range(5):
        gram = x @ x.mT  # (B, M, M)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def shortest_times(
    *calls: Callable[[], Any], limit: float = 0.1, clock: Callable[[], float] = CPU_CLOCK
) -> list[float]:
    """The shortest time of each in seconds, as often as they fit into `limit` seconds, in turn.

    On one thread, and by its own time, so that a busy machine finds what an idle one does.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    shortest = [math.inf] * len(calls)
    end = clock() + limit
    while clock() < end:
        for i, call in enumerate(calls):
            start = clock()
            call()
            shortest[i] = min(shortest[i], clock() - start)
    torch.set_num_threads(threads)
    return shortest


@cache
def fastest_dtype(device: torch.device) -> torch.dtype:
    """The type that Muon iterates in: bfloat16 if that is 1.5 times as fast as float32.

    Measured, as neither the kind of device nor the names of its instructions tell. Measured were
    ratios of 0.06 with AVX2, 0.35 with AVX-512 and 1.05 with AVX512_BF16, each within 0.05.
    """
    size = 128 if device.type == "cpu" else 2048  # enough to keep a GPU busy
    x = torch.ones(1, size, 2 * size, device=device)

    def iterate(dtype: torch.dtype) -> float:
        return float(orthogonalize(x, dtype)[0, 0, 0])  # waits for a GPU

    types = (torch.bfloat16, torch.float32)
    clock = CPU_CLOCK if device.type == "cpu" else time.perf_counter
    half, single = shortest_times(*(partial(iterate, dtype) for dtype in types), clock=clock)
    return torch.bfloat16 if 1.5 * half < single else torch.float32


class MuonAdamW(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) for matrices and AdamW for the rest, as one optimizer.

    Muon's updates are scaled to the size of AdamW's ("Muon is scalable for LLM training", Liu et
    al. 2025), so one learning rate serves both. The first beta is Muon's momentum. State, schedule
    and clipping work as for any optimizer.
    """

    def __init__(
        self,
        matrices: list[Tensor],
        groups: list[dict[str, Any]],
        adamw: dict[str, Any],
        muon_dtype: torch.dtype,
    ) -> None:
        self.muon = Muon(
            matrices,
            muon_dtype,
            lr=adamw["lr"],
            weight_decay=groups[0]["weight_decay"],
            momentum=adamw["betas"][0],
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
    muon_dtype: torch.dtype | None = None,
    table_rate: float = 1.0,
    table_eps: float = EPS,
) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter 2019), or Muon for the matrices of `model.blocks`.

    Matrices and embedding tables decay, biases and norms do not.

    Args:
        table_rate: the learning rate of the tables (embeddings, output layer), as a multiple.
        table_eps: added to the root of the tables' second moments. With a large one, rows of tokens
            that are hardly ever seen move as little as their gradients say, not as far as others.
        fused: whether AdamW updates all weights in one kernel; False under a gradient scaler.
        muon_dtype: that Muon iterates in; None: the fastest. Weights in bfloat16 keep to theirs.
    """
    weights = [p for p in model.parameters() if p.requires_grad]
    in_blocks = {id(p) for p in model.blocks.parameters()}
    matrices: list[Tensor] = [
        p for p in weights if p.ndim > 1 and id(p) in in_blocks and kind == "muon"
    ]
    taken = {id(p) for p in matrices}
    decayed = [p for p in weights if p.ndim > 1 and id(p) not in taken]
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": [p for p in weights if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if (table_rate, table_eps) != (1.0, EPS):
        groups[0]["params"] = [p for p in decayed if id(p) in in_blocks]  # none with Muon
        tables = [p for p in decayed if id(p) not in in_blocks]
        rates = {"lr": table_rate * learning_rate, "eps": table_eps}
        groups.insert(1, {"params": tables, "weight_decay": weight_decay, **rates})
    adamw: dict[str, Any] = {"lr": learning_rate, "betas": betas, "eps": EPS, "fused": fused}
    if not matrices:
        return torch.optim.AdamW(groups, **adamw)
    is_half = matrices[0].dtype is torch.bfloat16
    dtype = torch.bfloat16 if is_half else muon_dtype or fastest_dtype(matrices[0].device)
    return MuonAdamW(matrices, groups, adamw, dtype)


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
            the fall takes until `last step`. If that is so late that a run planned for it from
            the beginning would not have fallen as far, the rate rises to where that run's is.
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
            progress = min(progress, (start - warmup_steps) / max(1, last - warmup_steps))
            progress += (1.0 - progress) * min(1.0, done / max(1, last - start))
    fall = progress if schedule == "linear" else (1 - math.cos(math.pi * progress)) / 2
    return 1.0 - (1.0 - final_share) * fall
