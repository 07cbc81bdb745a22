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
from typing import get_type_hints

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from any folder

from benchmarks.measure import read_text
from lit_gpt.budget import recipe
from lit_gpt.budget.candidates import Candidate, num_heads
from lit_gpt.budget.law import FITTED, Law, expected
from lit_gpt.budget.text_facts import TokenizerFacts, exact_facts, measure_text
from lit_gpt.command import call, run
from lit_gpt.data import TextDataModule, TrainBatches, read_windows
from lit_gpt.errors import UserError
from lit_gpt.model import GPT, GPTConfig
from lit_gpt.module import LossTotals, next_token_loss
from lit_gpt.optim import build_optimizer, learning_rate_factor
from lit_gpt.text.files import TextFiles
from lit_gpt.windows import ShuffledOrder

ROWS = Path(__file__).with_suffix(".csv")
EVAL_BATCH = 16  # windows
MOST_EVALUATED = 60_000  # tokens
CONTEXT = 128
FITTED_TEXTS = (
    *("names", "tang", "shakespeare", "prose", "python", "jsonl", "small_en", "big_en"),
    *("c_lua", "md_rust", "zh_dream", "small_lua", "small_rust", "small_dream"),
    # With a vocabulary that also had the tokens of the validation split.
    *(
        "shakespeare_both",
        "prose_both",
        "python_both",
        "jsonl_both",
        "small_en_both",
        "big_en_both",
    ),
)
TEXT = 0.3  # weight of a text's mean error
PRIOR = 0.03
ITERATIONS = 60


@dataclass(frozen=True)
class Row:
    """A run: its text, its settings and what it reached."""

    text: str
    train_bytes: int
    text_bits: float
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
    spelling_rows: int
    output_spelling_rows: int
    softmax_cutoff: float
    bits_per_byte: float


def evaluate(model: GPT, tokens: np.ndarray, lengths: torch.Tensor) -> float:
    """Bits per byte over windows without overlap."""
    model.eval()
    context = model.config.context_length
    starts = np.arange(0, len(tokens) - context, context)
    starts = starts[:: max(1, -(-len(starts) * context // MOST_EVALUATED))]
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
    spelling_rows: int = recipe.SPELLING_ROWS,
    output_spelling_rows: int = recipe.SPELLING_ROWS,
    softmax_cutoff: float = 0.0,
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
        spelling_rows: see GPTConfig.
        output_spelling_rows: see GPTConfig.
        softmax_cutoff: see GPTConfig.
        out: the CSV file.
        cache: folder for encoded texts.
    """
    data = TextDataModule(path, tokenizer, context_length=context_length, cache=cache)
    measured, *_ = measure_text(TextFiles(path, cache=cache)).tokenizers
    facts = exact_facts(data.splits, tokenizer, measured.text_bits)
    (known,) = facts.tokenizers
    lengths = data.tokenizer.token_lengths()
    torch.manual_seed(0)
    sizes = (data.vocab_size, context_length, d_model, num_blocks, num_heads(d_model))
    config = GPTConfig(
        *sizes,
        dropout=dropout,
        style="fast",
        spelling_rows=spelling_rows,
        output_spelling_rows=output_spelling_rows,
        softmax_cutoff=softmax_cutoff,
    )
    model = GPT(config)
    model.spell(data.tokenizer)
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
    order = ShuffledOrder(len(data.train_tokens), context_length, seed=0)
    batches = TrainBatches(data.train_tokens, order, batch_size, context_length)
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
        text_bits=known.text_bits,
        bigram=known.bigram,
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
        spelling_rows=spelling_rows,
        output_spelling_rows=output_spelling_rows,
        softmax_cutoff=softmax_cutoff,
        bits_per_byte=evaluate(model, data.val_tokens, torch.from_numpy(lengths)),
    )
    is_new = not Path(out).exists()
    with Path(out).open("a", newline="", encoding="utf-8") as file:
        if is_new:
            csv.writer(file).writerow(asdict(row))
        values = [f"{v:.5g}" if isinstance(v, float) else v for v in asdict(row).values()]
        csv.writer(file).writerow(values)
    print(*values)


def read_rows(path: str) -> list[Row]:
    """The runs that were made with the recipe's settings, without those of bytes.

    Nor those whose output layer is spelled or has two steps: the law has constants for these.

    Raises:
        UserError: no such file, or one of other columns.
    """
    read_text(path)
    kinds = get_type_hints(Row)
    with Path(path).open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if reader.fieldnames != list(kinds):
            hint = f"name one with the columns of {ROWS.name}"
            raise UserError("has other columns", field="path", value=path, hint=hint)
        rows = [Row(**{k: kinds[k](v) for k, v in row.items()}) for row in reader]
    return [row for row in rows if row.context_length == CONTEXT and is_usual(row)]


def is_usual(row: Row) -> bool:
    if row.tokenizer == "bytes" or row.output_spelling_rows or row.softmax_cutoff:
        return False
    candidate = candidate_of(row)
    epochs, weights = candidate.epochs(row.steps), candidate.weights_per_token
    repeated = recipe.repetition(epochs, weights)
    is_long = epochs > recipe.MOST_EPOCHS
    # The recipe of the time.
    if row.spelling_rows:
        decay = 1.0 if repeated > 120 else 0.3 if repeated > 15 else 0.1
        regular = (0.1 if is_long and repeated > 120 else 0.0, decay)
    else:
        regular = (0.1 if is_long and repeated > 50 else 0.0, 1.0 if repeated > 50 else 0.1)
    rate = recipe.learning_rate(row.d_model, "muon")
    return (row.dropout, row.weight_decay) == regular and row.learning_rate == rate


def candidate_of(row: Row) -> Candidate:
    known = TokenizerFacts(
        row.tokenizer,
        row.vocab_size,
        row.bytes_per_token,
        row.train_tokens,
        row.train_tokens // 9,
        row.bigram,
        row.text_bits,
    )
    sizes = (row.vocab_size, row.context_length, row.d_model, row.num_blocks)
    config = GPTConfig(
        *sizes,
        num_heads(row.d_model),
        style="fast",
        spelling_rows=row.spelling_rows,
        output_spelling_rows=row.output_spelling_rows,
    )
    return Candidate(known, config, row.batch_size)


def predicted(row: Row, law: Law) -> float:
    """Bits per byte by the law."""
    return expected(candidate_of(row), row.steps, law)


def fit_law(rows: list[Row]) -> Law:
    """The numbers with the smallest squared errors of the logarithm (Levenberg and Marquardt).

    A choice compares runs on one text, so what a text's runs have in common counts less (TEXT).
    Numbers are positive, so their logarithms are fitted, and held to where they start as if by one
    run with an error of PRIOR times the distance.
    """
    texts = {name: np.array([row.text == name for row in rows]) for name in {r.text for r in rows}}
    start = np.log(list(asdict(FITTED).values()))

    def errors(numbers: np.ndarray) -> np.ndarray:
        law = Law(*np.exp(numbers).tolist())
        found = np.array([math.log(predicted(row, law) / row.bits_per_byte) for row in rows])
        means = np.array([found[of_text].mean() for of_text in texts.values()])
        for of_text, mean in zip(texts.values(), means, strict=True):
            found[of_text] -= mean
        return np.concatenate([found, TEXT * means, PRIOR * (numbers - start)])

    numbers = start
    damping = 1e-3
    now = errors(numbers)
    for _ in range(ITERATIONS):
        slopes = np.stack([(errors(numbers + d) - now) / 1e-5 for d in 1e-5 * np.eye(len(numbers))])
        square = slopes @ slopes.T
        step = np.linalg.solve(square + damping * np.diag(np.diag(square)), slopes @ now)
        new = errors(numbers - step)
        if new @ new < now @ now:
            numbers, now, damping = numbers - step, new, damping / 3
        else:
            damping *= 4
    return Law(*np.exp(numbers).tolist())


def fit(path: str = str(ROWS)) -> None:
    """Fits the law to the runs on the texts in FITTED_TEXTS and prints it, and how well it does.

    Args:
        path: the CSV file.
    """
    rows = read_rows(path)
    fitted = [row for row in rows if row.text in FITTED_TEXTS]
    law = fit_law(fitted)
    print(law)
    print("\n| text | runs | error | spread | its choice, above the best |")
    print("|---|---|---|---|---|")
    for name in dict.fromkeys(row.text for row in rows):
        ours = [row for row in rows if row.text == name]
        others = [row for row in fitted if row.text.removesuffix("_both") != name]
        without = fit_law(others) if name in FITTED_TEXTS else law
        found = np.array([predicted(row, without) for row in ours])
        reached = np.array([row.bits_per_byte for row in ours])
        error = found / reached - 1
        above = reached[found.argmin()] - reached.min()
        kind = "left out of the fit" if name in FITTED_TEXTS else "never fitted"
        numbers = f"{len(ours)} | {error.mean():+.1%} | {error.std():.1%} | {above:.3f}"
        print(f"| {name}, {kind} | {numbers} |")
    print("\n| text, its best run | weights | tokens | expected | reached |\n|---|---|---|---|---|")
    held_out = [row for row in rows if row.text not in FITTED_TEXTS]
    for name in dict.fromkeys(row.text for row in held_out):
        ours = [row for row in held_out if row.text == name]
        row = min(ours, key=lambda row: row.bits_per_byte)
        tokens = row.steps * row.batch_size * row.context_length
        what = f"{name}, {row.tokenizer} | {row.weights:,} | {tokens:,}"
        print(f"| {what} | {predicted(row, law):.3f} | {row.bits_per_byte:.3f} |")


def main(argv: list[str]) -> None:
    """Trains or fits."""
    kind, *options = argv or ["--help"]
    commands = {"train": train, "fit": fit}
    if kind not in commands:
        raise UserError(f"no command {kind!r}", hint=f"use one of {', '.join(commands)}")
    call(commands[kind], options, prog=f"budget_law.py {kind}")


if __name__ == "__main__":
    sys.exit(run(lambda: main(sys.argv[1:])))
