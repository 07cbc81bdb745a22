"""nanoGPT's recipe for a small character model, in plain PyTorch: charlm is measured against it.

Its published settings for a CPU: 4 blocks, 4 heads, d_model 128, context 64, batch 12, 2,000
steps, no dropout; GPT-2's layout (learned positions, LayerNorm, GELU, tied embeddings, no biases);
random windows; AdamW, unfused, with betas (0.9, 0.99) and weight decay 0.1 for matrices; learning
rate 1e-3 after 100 steps of warm-up, half a cosine down to 1e-4; gradients clipped at 1; both
splits evaluated on 20 random batches every 250 steps. The model is ours with those choices.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from any folder

from lit_gpt.data import read_windows
from lit_gpt.evaluation.whole_text import WholeText
from lit_gpt.model import GPT, GPTConfig
from lit_gpt.optim import build_optimizer, learning_rate_factor

LAYOUT = {"position": "learned", "activation": "gelu", "bias": False, "tie_embeddings": True}


def train(path: str, steps: int) -> None:
    torch.manual_seed(1337)
    rng = np.random.default_rng(1337)
    ids = np.frombuffer(Path(path).read_bytes(), np.uint8)
    cut = int(len(ids) * 0.9)
    context_length = 64
    batch_size = 12
    splits = {"train": ids[:cut], "val": ids[cut:]}
    model = GPT(GPTConfig(256, context_length, 128, 4, 4, dropout=0.0, **LAYOUT))
    optimizer = build_optimizer(model, 1e-3, 0.1, (0.9, 0.99), fused=False)

    def loss_of(x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(model(x).flatten(0, 1), y.flatten())

    def random_batch(split: str) -> tuple[Tensor, Tensor]:
        tokens = splits[split]
        starts = rng.integers(0, len(tokens) - context_length, batch_size)
        return read_windows(tokens, starts, context_length)

    @torch.no_grad()
    def evaluate(step: int) -> None:
        losses = [
            sum(loss_of(*random_batch(split)).item() for _ in range(20)) / 20 for split in splits
        ]
        print("Step: {}, Training Loss: {:.3f}, Validation Loss: {:.3f}".format(step, *losses))

    for step in range(steps):
        if step % 250 == 0:
            evaluate(step)
        factor = learning_rate_factor(step, steps, 100, "cosine", 0.1)
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * factor
        loss = loss_of(*random_batch("train"))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    evaluate(steps)
    with torch.no_grad():
        batches = WholeText(ids[cut:], 64, context_length)
        nats = sum(loss_of(x, y).item() * y.numel() for x, y in batches)
    loss = nats / (len(ids) - cut - 1)
    print(f"Final validation loss: {loss:.4f} nats/token")
    print(json.dumps({"loss": loss}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--path", required=True)
    parser.add_argument("--steps", type=int, default=2000)
    train(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
