"""Adapters beside full tuning, and beside peft's on the same model in transformers."""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.measure import Options, at_least_one, in_turn, save, show
from lit_gpt.lora import LoraConfig, add_adapters
from lit_gpt.model import GPT, GPTConfig

VOCABULARY, CONTEXT = 4096, 256
Logits = Callable[[Tensor], Tensor]


@dataclass
class Row:
    """What one way of training takes.

    Args:
        trained: weights.
        milliseconds: of a step, the median.
        peak_mb: the most memory during the steps, beyond what the process had before the model.
        state_mb: of gradients and the optimizer's moments.
        loss: of the last step, in nats/token.
    """

    name: str
    trained: int
    milliseconds: float
    peak_mb: float
    state_mb: float
    loss: float


def resident(peak: bool) -> float:
    """Bytes of this process, or the most since `forget_peak`; the latter on Linux alone."""
    with suppress(OSError):
        lines = Path("/proc/self/status").read_text().splitlines()
        name = "VmHWM:" if peak else "VmRSS:"
        return next(1024 * float(line.split()[1]) for line in lines if line.startswith(name))
    return float(psutil.Process().memory_info().rss)


def forget_peak() -> None:
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def make(
    side: str, style: Any, d_model: int, num_blocks: int, rank: int
) -> tuple[nn.Module, Logits]:
    """A model of this side, and what computes its logits."""
    torch.manual_seed(0)
    sizes = {"d_model": d_model, "num_blocks": num_blocks, "num_heads": d_model // 64}
    gpt = GPT(GPTConfig(VOCABULARY, CONTEXT, **sizes, style=style, dropout=0.0))
    if side == "full":
        return gpt, gpt
    if side == "lora":
        add_adapters(gpt, LoraConfig(rank))
        return gpt, gpt
    import peft
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    from lit_gpt.huggingface.architectures import hf_weights
    from lit_gpt.huggingface.config import hf_config

    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(hf_config(gpt.config)))
        save_file(hf_weights(gpt), Path(folder, "model.safetensors"), metadata={"format": "pt"})
        theirs = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa")
    del gpt
    config = peft.LoraConfig(r=rank, lora_alpha=16, target_modules="all-linear")
    model = peft.get_peft_model(theirs, config)
    return model, lambda ids: model(input_ids=ids, use_cache=False).logits


def measure(side: str, steps: int, batch_size: int, *of_model: Any) -> dict[str, float]:
    """Trains in a process of its own."""
    if side == "peft":
        import peft  # noqa: F401 - before memory is read
        import transformers  # noqa: F401
    before = resident(peak=False)
    model, logits = make(side, *of_model)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-3, fused=True)
    generator = torch.Generator().manual_seed(0)
    times = []
    for step in range(steps + 3):
        if step == 3:  # warm
            forget_peak()
        ids = torch.randint(VOCABULARY, (batch_size, CONTEXT + 1), generator=generator)
        start = time.perf_counter()
        loss = F.cross_entropy(logits(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        times.append(time.perf_counter() - start)
    trained = sum(weight.numel() for weight in weights)
    return {
        "trained": trained,
        "milliseconds": 1e3 * statistics.median(times[3:]),
        "peak_mb": (resident(peak=True) - before) / 1e6,
        "state_mb": 3 * 4 * trained / 1e6,
        "loss": loss.item(),
    }


def lora(
    options: Options,
    style: Literal["classic", "modern"] = "modern",
    d_model: int = 256,
    num_blocks: int = 6,
    rank: int = 8,
    batch_size: int = 8,
    steps: int = 20,
) -> None:
    """All weights, adapters, and peft's adapters: time of a step, memory, what is trained.

    Args:
        options: shared by all benchmarks; the path is not used: ids are random.
        style: of the model: classic is a GPT-2 to transformers, modern a Qwen3.
        d_model: its width, a multiple of 64.
        num_blocks: its depth.
        rank: of the adapters, which all linear layers of the blocks have.
        batch_size: windows of 256 tokens in a step.
        steps: that are measured.
    """
    at_least_one(steps=steps, rank=rank, batch_size=batch_size)
    names = {"full": "all weights", "lora": f"LoRA, rank {rank}", "peft": f"peft, rank {rank}"}

    def run(side: str) -> dict[str, float]:
        args = (side, steps, batch_size, style, d_model, num_blocks, rank)
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            return pool.submit(measure, *args).result()

    results = in_turn({side: lambda side=side: run(side) for side in names}, options.repeats)
    rows = []
    for side, found in results.items():
        medians = {key: statistics.median(one[key] for one in found) for key in found[0]}
        rows.append(Row(names[side], **medians))
    table = Table(
        "lora", "trained weights", "ms/step", "peak, MB", "gradients, moments, MB", "loss"
    )
    for row in rows:
        cells = (f"{row.milliseconds:.0f}", f"{row.peak_mb:.0f}", f"{row.state_mb:.1f}")
        table.add_row(row.name, f"{int(row.trained):,}", *cells, f"{row.loss:.3f}")
    show(table)
    save("lora", [asdict(row) for row in rows], options.out)
