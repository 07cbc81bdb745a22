"""What this processor does faster: on how many threads, and in which precision."""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable
from dataclasses import replace
from statistics import median
from typing import Any

import torch

from lit_gpt.errors import UserError
from lit_gpt.model import GPT, GPTConfig
from lit_gpt.optim import shortest_times


def set_threads(number: int | None) -> None:
    """Has PyTorch compute on this many threads; None leaves its own choice.

    Raises:
        UserError: below 1, or above the number of cores, where it could only become slower.
    """
    if number is None:
        return
    cores = os.cpu_count() or 1
    if not 1 <= number <= cores:
        problem = f"must be between 1 and {cores}, the number of this machine's cores"
        raise UserError(problem, field="threads", value=number)
    torch.set_num_threads(number)
    os.environ["OMP_NUM_THREADS"] = str(number)  # or Lightning divides the cores by the processes


def thread_times(step: Callable[[], Any], limit: float = 1.0) -> dict[int, float]:
    """The median seconds of a step on one thread, and on as many as PyTorch uses now.

    Args:
        step: one step of the model.
        limit: seconds to measure for; each number of threads has at least three steps.
    """
    usual = torch.get_num_threads()
    times: dict[int, list[float]] = {number: [] for number in (usual, 1)}
    end = time.perf_counter() + limit
    try:
        while min(map(len, times.values())) < 4 or time.perf_counter() < end:
            for number, found in times.items():  # in turn, since the speed of machines drifts
                torch.set_num_threads(number)
                start = time.perf_counter()
                step()
                found.append(time.perf_counter() - start)
    finally:
        torch.set_num_threads(usual)
    return {number: median(found[1:]) for number, found in times.items()}


def bfloat16_slowdown(config: GPTConfig, precision: str, batch_size: int) -> float:
    """How many times as long as in float32 a block takes in a precision, forward and backward.

    Products alone don't tell: autocast converts weights and activations at each step.

    Args:
        config: of the model; all but a block and a small vocabulary is left out.
        precision: bf16-mixed or bf16-true.
        batch_size: windows of a batch, of which 128 tokens' worth are used at most.
    """
    length = min(config.context_length, 128)
    small = replace(
        config,
        num_blocks=1,
        vocab_size=64,
        spelling_rows=0,
        output_spelling_rows=0,
        context_length=length,
    )
    ids = torch.zeros(min(batch_size, 128 // length), length, dtype=torch.long)  # (B, T)
    with torch.random.fork_rng(devices=[]):
        single_model = GPT(small)
        half_model = single_model
        if precision == "bf16-true":
            half_model = copy.deepcopy(single_model).to(torch.bfloat16)

        def step(model: GPT, is_mixed: bool) -> None:
            with torch.autocast("cpu", torch.bfloat16, enabled=is_mixed):
                loss = model(ids).float().sum()
            torch.autograd.grad(loss, list(model.parameters()))

        half, single = shortest_times(
            lambda: step(half_model, precision == "bf16-mixed"), lambda: step(single_model, False)
        )
    return half / single
