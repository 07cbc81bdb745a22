"""The evaluate command: how well a checkpoint predicts a text, beside counting alone."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from json import dumps
from pathlib import Path
from typing import Any, Literal

import torch
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

from lit_gpt.checkpoint import Checkpoint
from lit_gpt.command import call, option
from lit_gpt.errors import UserError, check_least
from lit_gpt.evaluation.whole_text import WholeText, whole_loss
from lit_gpt.generation.language_model import find_checkpoint
from lit_gpt.model import GPT
from lit_gpt.reports.history import FinalResult
from lit_gpt.text.corpus import Corpus, load_corpus
from lit_gpt.text.files import TextFiles
from lit_gpt.text.ngrams import MAX_TARGETS, adaptive_baselines
from lit_gpt.text.packing import Packs
from lit_gpt.text.tokenizer import Tokenizer
from lit_gpt.text.vocabularies import Vocabulary

Accelerator = Literal["auto", "cpu", "gpu", "cuda", "mps"]
Precision = Literal["32-true", "bf16-mixed"]


@dataclass(frozen=True)
class Evaluation:
    """What the command finds out; each of `results` by its name, the model first."""

    checkpoint: Path
    step: int | None
    corpus: Corpus
    context_length: int
    device: str
    precision: str
    results: dict[str, FinalResult]
    conversations: str | None = None  # what windows of them hold

    def as_dict(self) -> dict[str, Any]:
        info = self.corpus.info
        more = {"conversations": self.conversations} if self.conversations else {}
        return {
            "checkpoint": str(self.checkpoint),
            "step": self.step,
            "text": asdict(info),
            "context_length": self.context_length,
            "device": self.device,
            "precision": self.precision,
            "results": {
                name.replace(" ", "_"): asdict(result) | {"perplexity": result.perplexity}
                for name, result in self.results.items()
            },
            **more,
        }

    def print(self) -> None:
        info = self.corpus.info
        step = "" if self.step is None else f" (step {self.step:,})"
        print(f"Checkpoint: {self.checkpoint}{step}")
        print(
            f"Text: {info.num_characters:,} characters, {info.num_bytes:,} bytes, "
            f"{info.num_tokens:,} tokens"
        )
        for name, number in info.changes:
            print(f"{name}: {number:,}")
        for pattern, number in self.corpus.reader.excluded.items():
            print(f"Files and folders excluded by {pattern}: {number:,}")
        print(f"Device: {self.device}, precision {self.precision}")
        if self.conversations:
            print(f"Conversations: {self.conversations}")
        each = "token to learn" if self.conversations else "token"
        print(f"Windows of {self.context_length:,} tokens, each {each} predicted once")
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        table.add_column("", no_wrap=True)
        for name in ("nats/token", "perplexity", "bits/byte", "predicted"):
            table.add_column(name, justify="right", no_wrap=True)
        for name, result in self.results.items():
            numbers = (f"{result.loss:.4f}", f"{result.perplexity:,.2f}")
            table.add_row(name, *numbers, f"{result.bits_per_byte:.4f}", result.extent)
        Console(width=None if sys.stdout.isatty() else 120).print(table)


def evaluate(
    *,
    ckpt_path: str | None = None,
    logs: str = "logs",
    data: TextFiles,
    batch_size: int = 16,
    max_tokens: int | None = None,
    accelerator: Accelerator = "auto",
    precision: Precision = "32-true",
    json: bool = False,
) -> None:
    """Evaluate a checkpoint on any text.

    Args:
        ckpt_path: checkpoint to use, or `last` for the newest run's; default: its best.
        logs: where to look for the newest run.
        data: the text.
        batch_size: windows computed side by side.
        max_tokens: predict this many tokens, spread evenly over the text; default: all.
        accelerator: auto, cpu, gpu, cuda or mps.
        precision: 32-true or bf16-mixed.
        json: print JSON instead of a table.

    Raises:
        UserError: a checkpoint, text or device that can't be used, or a value out of range.
    """
    check_least(1, batch_size=batch_size, max_tokens=max_tokens)
    device = find_device(accelerator)
    path = find_checkpoint(ckpt_path, logs)
    checkpoint = Checkpoint.read(path)
    model, tokenizer = checkpoint.build()
    vocabulary = Vocabulary(tokenizer, ends_files=tokenizer.learnt_end is not None)
    corpus = load_corpus(data, vocabulary, needs_end=False)
    if corpus.info.num_bytes <= tokenizer.token_lengths()[corpus.tokens[0]]:
        problem = "too short: a token is predicted from those before it"
        raise UserError(problem, field="path", value=data.path, hint="use more text")
    context_length = model.config.context_length
    tokens = windows_of(corpus, context_length, data)
    whole = WholeText(tokens, batch_size, context_length, max_tokens)
    results = {"model": model_loss(model.to(device), tokenizer, whole, precision)}
    conversations = tokens.describe() if isinstance(tokens, Packs) else None
    if conversations is None:  # of which only some tokens are predicted
        results |= baselines(corpus, tokenizer)
    if not math.isfinite(results["model"].loss):
        raise UserError(f"the loss of {path} on this text is not finite", hint="use another one")
    step = checkpoint.global_step
    facts = (path, step, corpus, context_length, device.type, precision, results)
    found = Evaluation(*facts, conversations)
    if json:
        print(dumps(found.as_dict(), indent=2))
    else:
        found.print()


def windows_of(corpus: Corpus, context_length: int, data: TextFiles) -> Any:
    """What windows are read from: ids, or whole conversations."""
    if corpus.flags is None:
        return corpus.tokens
    end = corpus.tokenizer.end_of_text or 0
    packs = Packs(corpus.tokens, corpus.flags, context_length + 1, end)
    if not len(packs):
        problem = f"no conversation has an answer within {context_length + 1:,} tokens"
        raise UserError(problem, field="path", value=data.path, hint="use shorter ones")
    return packs


def find_device(accelerator: Accelerator) -> torch.device:
    """Raises a UserError if this machine lacks the device."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    wanted = {"auto": (found or torch.device("cpu")).type, "gpu": found.type if found else "gpu"}
    kind = wanted.get(accelerator, accelerator)
    if kind != "cpu" and (found is None or found.type != kind):
        problem = "this machine has no such device that PyTorch can use"
        raise UserError(problem, field="accelerator", value=accelerator, hint="use auto or cpu")
    return torch.device(kind)


def model_loss(
    model: GPT, tokenizer: Tokenizer, whole: WholeText, precision: Precision
) -> FinalResult:
    """The loss over the text, with a progress bar if there is a terminal."""
    device = model.embedding.weight.device.type
    context: Callable[[], AbstractContextManager[Any]] = nullcontext
    if precision == "bf16-mixed":
        warnings.filterwarnings("ignore", "Mismatch dtype between input and weight")  # RMSNorm's
        context = partial(torch.autocast, device, torch.bfloat16)
    console = Console(stderr=True)
    shown = track(
        whole, "Evaluating", console=console, transient=True, disable=not console.is_terminal
    )
    lengths = torch.from_numpy(tokenizer.token_lengths())
    return whole_loss(model, shown, lengths, whole.num_targets, context)


def baselines(corpus: Corpus, tokenizer: Tokenizer) -> dict[str, FinalResult]:
    """What counting alone reaches on the text; on its beginning, if it is long."""
    tokens = corpus.tokens[: MAX_TARGETS + 1]
    targets = tokens[1:]
    num_bytes = int(tokenizer.token_lengths()[targets].sum())
    found = {}
    losses = adaptive_baselines(tokens, tokenizer.vocab_size)
    for name, loss in zip(("adaptive unigram", "adaptive bigram"), losses, strict=True):
        bits_per_byte = loss * len(targets) / math.log(2) / num_bytes
        found[name] = FinalResult(loss, bits_per_byte, len(targets), len(corpus.tokens) - 1)
    return found


def option_name(field: str) -> str:
    """A field as the command line spells it; the text's fields are in the group `data`."""
    return option(f"data.{field}" if field in TextFiles.__dataclass_fields__ else field)


def main(argv: list[str]) -> int:
    call(evaluate, argv, groups=[TextFiles])
    return 0
