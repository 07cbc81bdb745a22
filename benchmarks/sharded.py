"""Benchmarks of sharded models: what activation checkpointing saves, what Muon over shards costs.

Also the process that is measured: sharded.py ROOT activations true|false, or ROOT muon RANK SIZE.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SHAPE = {"vocab_size": 1000, "context_length": 256, "d_model": 256, "num_blocks": 12}
WINDOWS = 16
MATRICES = [(768, 256), (256, 256), (1376, 256), (256, 688)]  # of a block of that shape
REPEATS = 3


def measure_activations(checkpointing: bool) -> dict[str, Any]:
    """One step's CPU time, and the memory of the process and of what the backward pass needs."""
    import torch

    from lit_gpt.module import LitGPT, next_token_loss

    torch.manual_seed(0)
    lit = LitGPT(
        **SHAPE, num_heads=4, style="modern", dropout=0.1, activation_checkpointing=checkpointing
    )
    x, y = torch.randint(1000, (2, WINDOWS, 256))
    optimizer = torch.optim.AdamW(lit.parameters(), fused=True)
    weights = {p.untyped_storage().data_ptr() for p in lit.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    losses = []
    for _ in range(REPEATS):
        torch.manual_seed(1)
        start = time.process_time()
        loss = next_token_loss(lit.gpt, x, y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        seconds = time.process_time() - start
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    peak = int(status.partition("VmHWM:")[2].split()[0]) * 1024
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = next_token_loss(lit.gpt, x, y)
    return {"losses": losses, "kept": sum(kept.values()), "peak": peak, "seconds": seconds}


def measure_muon(rank: int, size: int) -> dict[str, Any]:
    """CPU seconds of a process to orthogonalize all matrices: exchanged, and gathered by all."""
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    from lit_gpt.distributed.sharded_muon import Exchange
    from lit_gpt.optim import orthogonalize

    dist.init_process_group("gloo", rank=rank, world_size=size)
    exchange = Exchange(init_device_mesh("cpu", (size,)))
    count = SHAPE["num_blocks"]
    parts = {s: list(torch.randn(count, *s).chunk(size, dim=1)[rank]) for s in MATRICES}

    def exchanged() -> None:
        for shape, shards in parts.items():
            exchange(shards, torch.Size(shape), torch.float32)

    def sent() -> None:
        for shards in parts.values():
            shares = torch.stack(shards).unflatten(0, (size, count // size))
            exchange.exchange(exchange.exchange(shares))

    def gathered() -> None:
        for shards in parts.values():
            own = torch.stack(shards)
            found = [torch.empty_like(own) for _ in range(size)]
            dist.all_gather(found, own)
            orthogonalize(torch.cat(found, dim=1), torch.float32)

    def cpu_seconds(call: Callable[[], None]) -> float:
        call()
        start = time.process_time()
        for _ in range(REPEATS):
            call()
        return (time.process_time() - start) / REPEATS

    calls = {"exchanged": exchanged, "sent": sent, "gathered": gathered}
    return {"processes": size, **{name: cpu_seconds(call) for name, call in calls.items()}}


if __name__ == "__main__":
    root, part, *rest = sys.argv[1:]
    sys.path.insert(0, root)
    if part == "activations":
        print(json.dumps(measure_activations(rest == ["true"])))
    else:
        print(json.dumps(measure_muon(int(rest[0]), int(rest[1]))))
    sys.exit()

import subprocess  # noqa: E402

from rich.table import Table  # noqa: E402

from benchmarks.measure import ROOT, Options, save, show  # noqa: E402
from lit_gpt.errors import UserError  # noqa: E402


def results(*commands: tuple[str, ...]) -> list[dict[str, Any]]:
    """What processes print that run at once."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    env = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(
            [sys.executable, __file__, str(ROOT), *words], stdout=subprocess.PIPE, env=env
        )
        for words in commands
    ]
    outputs = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        raise UserError("a process failed: see above")
    return [json.loads(output) for output in outputs]


def sharded(options: Options) -> None:
    """Activation checkpointing on one process; Muon over shards on 1, 2 and 4.

    Args:
        options: shared by all benchmarks.
    """
    table = Table("checkpointing", "kept, MB", "peak, MB", "step, s", "loss", title="Activations")
    rows = []
    for flag in ("false", "true"):
        (found,) = results(("activations", flag))
        rows.append({"checkpointing": flag, **found})
        numbers = (f"{found[name] / 1e6:,.0f}" for name in ("kept", "peak"))
        table.add_row(flag, *numbers, f"{found['seconds']:.1f}", f"{found['losses'][-1]:.6f}")
    show(table)
    table = Table("processes", "exchanged, ms", "sending, ms", "gathered, ms", title="Muon")
    for size in (1, 2, 4):
        first, *_ = results(*(("muon", str(rank), str(size)) for rank in range(size)))
        rows.append(first)
        times = (f"{1e3 * first[name]:.0f}" for name in ("exchanged", "sent", "gathered"))
        table.add_row(str(size), *times)
    save("sharded", rows, options.out)
    show(table)
