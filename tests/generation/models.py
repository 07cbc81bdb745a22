"""Small untrained models whose logits differ so much that no text hangs on rounding."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import torch

from lit_gpt.callbacks.checkpoints import save_atomically
from lit_gpt.model import GPT, GPTConfig
from lit_gpt.text.tokenizer import Tokenizer


def small_model(vocab_size: int = 256, context_length: int = 16, style: str = "modern") -> GPT:
    torch.manual_seed(3)
    model = GPT(GPTConfig(vocab_size, context_length, 16, 2, 2, style=style)).eval()
    for weight in model.parameters():
        weight.data *= 4
    return model


def save_model(model: GPT, tokenizer: Tokenizer, path: Path) -> Path:
    weights = {f"gpt.{name}": value for name, value in model.state_dict().items()}
    content = {"gpt": asdict(model.config), "tokenizer": tokenizer.to_dict()}
    save_atomically({**content, "state_dict": weights}, path)
    return path
