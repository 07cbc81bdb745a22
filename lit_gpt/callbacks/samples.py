"""Owns the samples that a run writes at each evaluation."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger

from lit_gpt.data import TextDataModule
from lit_gpt.generation.sampling import generate, stream_text


class Samples(Callback):
    """Lets the model go on from a few fixed prompts at each evaluation and logs the text.

    Args:
        prompts: texts to go on from; None: the beginnings of three lines of the validation text.
        num_tokens: how many tokens each sample goes on for; 0: no samples.
    """

    def __init__(self, prompts: list[str] | None = None, num_tokens: int = 32) -> None:
        self.prompts, self.num_tokens = prompts, num_tokens
        self.beginnings: list[str] = []  # the prompts as text
        self.texts: list[str] = []  # of the newest evaluation
        self.written: list[list[int]] = []  # their ids after the prompts

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.num_tokens > 0 and trainer.is_global_zero and trainer.datamodule is not None:
            with torch.compiler.set_stance("force_eager"):  # each length would be compiled
                self.texts, self.written = self.write(pl_module.gpt, trainer.datamodule)
            for logger in trainer.loggers:
                log_samples(logger, self.texts, trainer.global_step)

    def write(
        self, model: torch.nn.Module, data: TextDataModule
    ) -> tuple[list[str], list[list[int]]]:
        tokenizer = data.tokenizer
        prompts = line_starts(data)
        if self.prompts:
            prompts = [tokenizer.encode(text or "\n") for text in self.prompts]
        self.beginnings = [tokenizer.decode(prompt).rstrip("\ufffd") for prompt in prompts]
        groups = defaultdict(list)  # prompts of one length are written together
        for i, prompt in enumerate(prompts):
            groups[len(prompt)].append(i)
        written: list[list[int]] = [[] for _ in prompts]
        for members in groups.values():
            ids = torch.from_numpy(np.array([prompts[i] for i in members]).astype(np.int64))
            on_device = ids.to(model.embedding.weight.device)
            new = list(generate(model, on_device, self.num_tokens, tokenizer=tokenizer))
            for i, row in zip(members, torch.stack(new, dim=1).tolist(), strict=True):
                written[i] = row
        rows = ([*prompt, *new] for prompt, new in zip(prompts, written, strict=True))
        return ["".join(stream_text(tokenizer, row)) for row in rows], written


def line_starts(data: TextDataModule, count: int = 3, length: int = 4) -> list[np.ndarray]:
    """The first `length` tokens of lines spread over the validation split."""
    tokens, starts = data.val_tokens, []
    ends_line = np.array([token.endswith(b"\n") for token in data.tokenizer.tokens])
    for i in range(count):
        start = i * len(tokens) // count
        ends = np.flatnonzero(ends_line[tokens[start : start + 500]])  # within reach, if any
        if len(ends) and start + ends[0] + 1 + length <= len(tokens):
            start += ends[0] + 1
        starts.append(tokens[start : start + length])
    return starts


def log_samples(logger: Any, texts: list[str], step: int) -> None:
    """Text to a logger that can show it: TensorBoard or, by `log_text`, Weights & Biases."""
    if isinstance(logger, TensorBoardLogger):
        fenced = "\n\n".join(f"```\n{text}\n```" for text in texts)  # shown as it is, not Markdown
        logger.experiment.add_text("samples", fenced, step)
    elif hasattr(logger, "log_text"):
        logger.log_text("samples", columns=["text"], data=[[text] for text in texts], step=step)
