"""Samples of what the model writes, at each evaluation."""

from __future__ import annotations

from collections import defaultdict
from contextlib import nullcontext
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger

from lit_gpt.data import TextDataModule
from lit_gpt.generation.sampling import generate
from lit_gpt.model import GPT
from lit_gpt.module import LitGPT
from lit_gpt.text.packing import Packs
from lit_gpt.text.utf8 import stream_text


class Samples(Callback):
    """Continues a few fixed prompts at each evaluation and logs the text.

    Args:
        prompts: texts to continue; None: the beginnings of three lines of the validation text.
        num_tokens: length of each continuation; 0: no samples.
    """

    def __init__(self, prompts: list[str] | None = None, num_tokens: int = 32) -> None:
        self.prompts = prompts
        self.num_tokens = num_tokens
        self.prompt_texts: list[str] = []
        self.texts: list[str] = []  # prompts and continuations of the newest evaluation
        self.new_ids: list[list[int]] = []  # of those continuations

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        data = getattr(trainer, "datamodule", None)
        # A sharded model computes in all processes together: distributed/fsdp2.py.
        gathered = getattr(trainer.strategy, "gathered", None)
        if self.num_tokens > 0 and data is not None and (trainer.is_global_zero or gathered):
            assert isinstance(pl_module, LitGPT)
            # Or each length would be compiled.
            with torch.compiler.set_stance("force_eager"), (gathered or nullcontext)():
                self.write(pl_module.gpt, data)
            if trainer.is_global_zero:
                for logger in trainer.loggers:
                    log_samples(logger, self.texts, trainer.global_step)

    def write(self, model: GPT, data: TextDataModule) -> None:
        """Fills the attributes."""
        tokenizer = data.tokenizer
        prompts = line_starts(data)
        if self.prompts:
            prompts = [tokenizer.encode(text or "\n") for text in self.prompts]
        self.prompt_texts = [tokenizer.decode(prompt).rstrip("\ufffd") for prompt in prompts]
        by_length = defaultdict(list)  # prompts of one length are a batch
        for i, prompt in enumerate(prompts):
            by_length[len(prompt)].append(i)
        self.new_ids = [[] for _ in prompts]
        for members in by_length.values():
            batch = np.stack([prompts[i] for i in members]).astype(np.int64)
            ids = torch.from_numpy(batch).to(model.embedding.weight.device)  # (B, T)
            new = torch.stack(list(generate(model, ids, self.num_tokens, tokenizer=tokenizer)), 1)
            for i, row in zip(members, new.tolist(), strict=True):
                self.new_ids[i] = row
        rows = ([*prompt, *new] for prompt, new in zip(prompts, self.new_ids, strict=True))
        self.texts = ["".join(stream_text(tokenizer, row)) for row in rows]


def line_starts(data: TextDataModule, count: int = 3, length: int = 4) -> list[np.ndarray]:
    """The first `length` tokens of lines spread over the validation split.

    Of conversations, all that precedes an answer.
    """
    packs = data.windows["val"]
    if isinstance(packs, Packs):
        return packs.prompts(count)
    tokens = data.val_tokens
    starts = []
    ends_line = np.array([token.endswith(b"\n") for token in data.tokenizer.tokens])
    for i in range(count):
        start = i * len(tokens) // count
        ends = np.flatnonzero(ends_line[tokens[start : start + 500]])  # within reach, if any
        if len(ends) and start + ends[0] + 1 + length <= len(tokens):
            start += int(ends[0]) + 1
        starts.append(tokens[start : start + length])
    return starts


def log_samples(logger: Any, texts: list[str], step: int) -> None:
    """Gives text to a logger that shows it: TensorBoard or, by `log_text`, Weights & Biases."""
    if isinstance(logger, TensorBoardLogger):
        fenced = "\n\n".join(f"```\n{text}\n```" for text in texts)  # as it is, not as Markdown
        logger.experiment.add_text("samples", fenced, step)
    elif hasattr(logger, "log_text"):
        logger.log_text("samples", columns=["text"], data=[[text] for text in texts], step=step)
