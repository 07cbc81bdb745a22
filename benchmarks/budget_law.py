"""The runs that the law of `--budget` is fitted to, and the fit.

    python benchmarks/budget_law.py train --path TEXT --tokenizer bpe:4096 --steps 1000
    python benchmarks/budget_law.py fit

`train` adds a row to benchmarks/budget_law.csv, `fit` reads it.
"""

from __future__ import annotations

import csv
import math
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from any folder

from lit_gpt.budget import recipe
from lit_gpt.budget.candidates import Candidate, num_heads
from lit_gpt.budget.text_facts import SAMPLE, exact_facts
from lit_gpt.command import call, run
from lit_gpt.data import TextDataModule, TrainBatches, read_windows
from lit_gpt.errors import UserError
from lit_gpt.model import GPT, GPTConfig
from lit_gpt.module import LossTotals, next_token_loss
from lit_gpt.optim import build_optimizer, learning_rate_factor
from lit_gpt.text.ngrams import frequency_baselines

ROWS = Path(__file__).with_suffix(".csv")
EVAL_BATCH = 16  # windows
MOST_EVALUATED = 60_000  # tokens


@dataclass(frozen=True)
class Row:
    """A run: its text, its settings and what it reached."""

    text: str
    train_bytes: int
    compressed: float
    unigram: float
    bigram: float
    tokenizer: str
    vocab_size: int
    bytes_per_token: float
    train_tokens: int
    d_model: int
    num_blocks: int
    weights: int
    context_length: int
    batch_size: int
    steps: int
    learning_rate: float
    dropout: float
    weight_decay: float
    bits_per_byte: float


def evaluate(model: GPT, tokens: np.ndarray, lengths: torch.Tensor) -> float:
    """Bits per byte over windows without overlap."""
    model.eval()
    context = model.config.context_length
    starts = np.arange(0, len(tokens) - context, context)
    starts = starts[:: max(1, len(starts) * context // MOST_EVALUATED)]
    totals = LossTotals()
    with torch.inference_mode():
        for i in range(0, len(starts), EVAL_BATCH):
            x, y = read_windows(tokens, starts[i : i + EVAL_BATCH], context)
            totals.update(next_token_loss(model, x, y), y, lengths)
    return float(totals.compute()[1])


def train(
    path: str,
    tokenizer: str = "cl100k_base",
    d_model: int = 80,
    num_blocks: int = 3,
    context_length: int = 128,
    batch_size: int = 4,
    steps: int = 1000,
    learning_rate: float = 0.0,
    dropout: float = 0.0,
    weight_decay: float = 0.1,
    out: str = str(ROWS),
    cache: str | None = None,
) -> None:
    """Trains a model of the fast style for a number of steps and adds a row to the data.

    Args:
        path: a text file.
        tokenizer: as `--data.tokenizer`.
        d_model: embedding size.
        num_blocks: number of blocks.
        context_length: tokens per window.
        batch_size: windows per step.
        steps: optimizer steps.
        learning_rate: at its peak; 0: the recipe's.
        dropout: see GPTConfig.
        weight_decay: of matrices and tables.
        out: the CSV file.
        cache: folder for encoded texts.
    """
    data = TextDataModule(path, tokenizer, context_length=context_length, cache=cache)
    facts = exact_facts(data.splits, tokenizer)
    (known,) = facts.tokenizers
    lengths = data.tokenizer.token_lengths()
    sample = data.train_tokens[: int(SAMPLE / known.bytes_per_token)]
    unigram, bigram = frequency_baselines(sample, data.val_tokens, lengths)
    torch.manual_seed(0)
    sizes = (data.vocab_size, context_length, d_model, num_blocks, num_heads(d_model))
    model = GPT(GPTConfig(*sizes, dropout=dropout, style="fast"))
    rate = learning_rate or recipe.learning_rate(d_model, "muon")
    optimizer = build_optimizer(
        model,
        rate,
        weight_decay,
        (0.9, 0.999),
        kind="muon",
        table_rate=recipe.TABLE_RATE,
        table_eps=recipe.TABLE_EPS,
    )
    peaks = [group["lr"] for group in optimizer.param_groups]
    batches = TrainBatches(data.train_tokens, batch_size, context_length, "shuffled")
    model.train()
    for step in range(steps):
        factor = learning_rate_factor(step, steps, recipe.warmup_steps(steps), "linear", 0.0)
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = factor * peak
        loss = next_token_loss(model, *batches[step])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    row = Row(
        text=Path(path).stem,
        train_bytes=facts.train_bytes,
        compressed=facts.compressed,
        unigram=unigram,
        bigram=bigram,
        tokenizer=tokenizer,
        vocab_size=known.vocab_size,
        bytes_per_token=known.bytes_per_token,
        train_tokens=known.train_tokens,
        d_model=d_model,
        num_blocks=num_blocks,
        weights=Candidate(known, model.config, batch_size).weights,
        context_length=context_length,
        batch_size=batch_size,
        steps=steps,
        learning_rate=rate,
        dropout=dropout,
        weight_decay=weight_decay,
        bits_per_byte=evaluate(model, data.val_tokens, torch.from_numpy(lengths)),
    )
    with Path(out).open("a", newline="", encoding="utf-8") as file:
        values = [f"{v:.5g}" if isinstance(v, float) else v for v in asdict(row).values()]
        csv.writer(file).writerow(values)
    print(*values)


def main(argv: list[str]) -> None:
    """Trains or fits."""
    kind, *options = argv or ["--help"]
    commands = {"train": train}
    if kind not in commands:
        raise UserError(f"no command {kind!r}", hint=f"use one of {', '.join(commands)}")
    call(commands[kind], options, prog=f"budget_law.py {kind}")


if __name__ == "__main__":
    sys.exit(run(lambda: main(sys.argv[1:])))
