"""The trial: how long steps take on this machine, measured in a few seconds."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import numpy as np
import torch

from lit_gpt.budget.candidates import Candidate, num_heads
from lit_gpt.budget.processor import thread_times
from lit_gpt.budget.text_facts import TokenizerFacts
from lit_gpt.command import resource_error
from lit_gpt.embeddings import Parts
from lit_gpt.model import GPT, STYLES, GPTConfig
from lit_gpt.module import next_token_loss
from lit_gpt.optim import OptimizerKind, build_optimizer

PROBES = (  # vocabulary, width, blocks, context, windows: from the start-up of kernels to products
    *((256, 32, 2, 64, 4), (256, 64, 8, 64, 4), (8192, 64, 2, 128, 4), (256, 128, 4, 128, 8)),
    *((4096, 256, 6, 128, 8), (8192, 512, 8, 256, 16), (32768, 768, 12, 512, 16)),
)
ENOUGH = (0.25, 1 / 600)  # seconds of steps for each: at most, and of the budget
LONGEST = 0.8  # seconds of a step: larger models are not tried
STEPS = 3  # that a probe takes at least, with what else it does
WHOLE = (0.05, 2.0, 5.0)  # of the budget for all of them, but seconds at least and at most
LEAST_FEATURES = 4
LARGER = 3.0  # times the operations: a step for which threads are measured again
WORTH = 1.2  # all threads are used if they make steps at least this many times as fast as one


@dataclass(frozen=True)
class Times:
    """Seconds that a candidate takes here.

    Args:
        step: of an optimizer step.
        eval_batch: of a batch without gradients.
        token: of one more token of a sample.
    """

    step: float
    eval_batch: float
    token: float


@dataclass(frozen=True)
class Rates:
    """Seconds of a step as a sum of what it does: see `features`.

    Args:
        seconds: of one of each feature.
    """

    seconds: tuple[float, ...]

    def __call__(self, candidate: Candidate) -> Times:
        counts = features(candidate)
        step = float(np.dot(self.seconds, counts))
        overhead = float(np.dot(self.seconds[:2], counts[:2])) / candidate.accumulate
        batch = (step / candidate.accumulate - overhead) / 3 + overhead / 4
        return Times(step, batch, overhead / 4)


def features(candidate: Candidate) -> tuple[float, ...]:
    """What the time of a step depends on: kernels to start, products, memory."""
    parts = candidate.accumulate
    return (parts, parts * candidate.config.num_blocks, candidate.flops, candidate.bytes_moved)


def fit_rates(measured: list[tuple[Candidate, float]]) -> Rates:
    """The rates that fit measured seconds best, none of them negative, all relative errors alike.

    Lawson and Hanson 1974 for the problem; with four rates, all subsets can be tried.
    """
    rows = np.array([np.array(features(c)) / seconds for c, seconds in measured])
    best = (math.inf, np.zeros(rows.shape[1]))
    columns = range(rows.shape[1])
    for number in range(1, len(columns) + 1):
        for chosen in combinations(columns, number):
            part = rows[:, chosen]
            scale = np.abs(part).max(axis=0)
            found = np.linalg.lstsq(part / scale, np.ones(len(rows)), rcond=None)[0] / scale
            if (found < 0).any():
                continue
            error = float(np.square(part @ found - 1).sum())
            if error < best[0]:
                rates = np.zeros(len(columns))
                rates[list(chosen)] = found
                best = (error, rates)
    return Rates(tuple(best[1].tolist()))


@dataclass
class Trial:
    """Steps of plain PyTorch, with the model, loss and optimizer of a run.

    Args:
        device: to compute on.
        precision: as the Trainer names it.
        optimizer: adamw or muon.
        fixed: arguments of GPTConfig besides the sizes.
        are_threads_given: whether to keep PyTorch's number of threads.
        budget: seconds of the whole run.

    Attributes:
        threads: 1 where more are hardly faster; None: PyTorch's number.
    """

    device: torch.device
    precision: str = "32-true"
    optimizer: OptimizerKind = "muon"
    fixed: dict[str, Any] = field(default_factory=dict)
    are_threads_given: bool = False
    budget: float = math.inf
    threads: int | None = field(default=None, init=False)
    usual_threads: int = field(default_factory=torch.get_num_threads, init=False)
    _flops: float = field(default=0.0, init=False)  # of the step that chose the threads

    @property
    def enough(self) -> float:
        """Seconds of steps for each candidate."""
        most, share = ENOUGH
        return min(most, share * self.budget)

    def rates(self) -> Rates:
        """Times models, from tiny ones to those whose step takes LONGEST, while its time lasts."""
        share, least, most = WHOLE
        whole = min(most, max(least, share * self.budget))
        start = time.perf_counter()
        self.set_threads(self.probe(*PROBES[2]))  # about as large as what a minute allows
        found: list[tuple[Candidate, float]] = []
        for probe in PROBES:
            candidate = self.probe(*probe)
            if len(found) >= LEAST_FEATURES:
                before, seconds = found[-1]
                step = seconds * candidate.flops / before.flops  # at most, as a larger one
                if step > LONGEST or time.perf_counter() - start + STEPS * step > whole:
                    break
            seconds = self.time(candidate).step
            if math.isinf(seconds):
                break
            found.append((candidate, seconds))
        return fit_rates(found)

    def probe(self, vocab_size: int, width: int, depth: int, context: int, batch: int) -> Candidate:
        tokenizer = TokenizerFacts("bytes", vocab_size, 1.0, 1, 1, 8.0, 8.0)
        sizes = {"d_model": width, "num_blocks": depth, "num_heads": num_heads(width)}
        tables = ("spelling_rows", "output_spelling_rows", "softmax_cutoff")
        names = ("style", "dropout", *tables, *STYLES["classic"])
        choices = {name: self.fixed[name] for name in names if name in self.fixed}
        config = GPTConfig(**{**choices, **sizes}, vocab_size=vocab_size, context_length=context)
        return Candidate(tokenizer, config, batch, self.optimizer)

    def time(self, candidate: Candidate) -> Times:
        """Measures a candidate; its times are infinite where the memory is too small for it."""
        try:
            return self._time(candidate)
        except Exception as error:
            if resource_error(error) is None:
                raise
            return Times(math.inf, math.inf, math.inf)

    def _time(self, candidate: Candidate) -> Times:
        step, evaluate = self.build(candidate)
        seconds = self.repeat(step, self.enough)
        width = candidate.config.context_length
        batch = self.repeat(lambda: evaluate(candidate.batch_size, width), self.enough / 8)
        token = self.repeat(lambda: evaluate(1, 1), self.enough / 16)
        return Times(seconds, batch, token)

    def build(self, candidate: Candidate) -> tuple[Callable[[], None], Callable[[int, int], None]]:
        """An optimizer step, and an evaluation of B windows of T tokens."""
        config = candidate.config
        model = GPT(config).to(self.device, weight_type(self.precision))
        for module in model.modules():
            if isinstance(module, Parts):
                module.spell(torch.randint_like(module.rows, module.num_rows))
        fused = self.precision != "16-mixed"
        optimizer = build_optimizer(model, 1e-4, 0.1, (0.9, 0.95), fused, self.optimizer)
        shape = (candidate.batch_size, config.context_length)
        ids = torch.randint(config.vocab_size, shape, device=self.device)  # (B, T)
        if first := config.cutoff:  # as many of these as in a text
            is_frequent = torch.rand(shape, device=self.device) < candidate.frequent
            ids = torch.where(is_frequent, ids % first, first + ids % (config.vocab_size - first))

        def step() -> None:
            model.train()
            for _ in range(candidate.accumulate):
                with self.context():
                    loss = next_token_loss(model, ids, ids)
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        @torch.no_grad()
        def evaluate(windows: int, length: int) -> None:
            model.eval()
            x = ids[:windows, :length]
            with self.context():
                next_token_loss(model, x, x)

        return step, evaluate

    def set_threads(self, candidate: Candidate, limit: float = 0.3) -> None:
        """Has PyTorch compute on one thread from here on, unless all are clearly faster.

        Threads wait for each other at each operation. So where other programs run, as they may
        later, a small model's steps take many times as long on all threads as on one. For a
        candidate of about the size that was measured last, nothing is measured again.

        Args:
            limit: seconds to measure for.
        """
        if self.device.type != "cpu" or self.usual_threads == 1 or self.are_threads_given:
            return
        if candidate.flops < LARGER * self._flops:
            return
        self._flops = candidate.flops
        torch.set_num_threads(self.usual_threads)
        seconds = thread_times(self.build(candidate)[0], limit)
        is_slower = WORTH * seconds[self.usual_threads] > seconds[1]
        self.threads = 1 if is_slower else None
        torch.set_num_threads(self.threads or self.usual_threads)

    def context(self) -> AbstractContextManager[Any]:
        """The autocast of the Trainer's precision."""
        dtypes = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
        dtype = dtypes.get(self.precision)
        return torch.autocast(self.device.type, dtype) if dtype else nullcontext()

    def repeat(self, call: Callable[[], None], enough: float) -> float:
        """The median of some calls after a first one; at least one is timed."""
        call()
        self.wait()
        times: list[float] = []
        while not times or sum(times) < enough:
            start = time.perf_counter()
            call()
            self.wait()
            times.append(time.perf_counter() - start)
        return float(np.median(times))

    def wait(self) -> None:
        """Until the device has done what it was given."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize()


def weight_type(precision: str) -> torch.dtype:
    return {"bf16-true": torch.bfloat16, "64-true": torch.float64}.get(precision, torch.float32)
