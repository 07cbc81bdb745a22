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
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from any folder

from lit_gpt.model import GPT, GPTConfig
from lit_gpt.optim import build_optimizer, learning_rate_factor

CONTEXT = 64
WARMUP = 100  # steps
LAYOUT = {"position": "learned", "activation": "gelu", "bias": False, "tie_embeddings": True}


Batch = tuple[Tensor, Tensor]


def build(vocab_size: int) -> GPT:
    return GPT(GPTConfig(vocab_size, CONTEXT, 128, 4, 4, dropout=0.0, **LAYOUT))


def loss_of(model: GPT, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x).flatten(0, 1), y.flatten())


def train(
    model: GPT,
    splits: dict[str, np.ndarray],
    steps: Iterable[int],
    factor: Callable[[int], float],
) -> None:
    """Trains and evaluates as the recipe does.

    Args:
        splits: ids of the texts `train` and `val`.
        steps: the numbers of the steps, from 0; their end is the end of training.
        factor: the learning rate of a step, as a share of its peak.
    """
    rng = np.random.default_rng(1337)
    device = model.embedding.weight.device
    optimizer = build_optimizer(model, 1e-3, 0.1, (0.9, 0.99), fused=False)

    def random_batch(split: str) -> Batch:
        tokens = splits[split]
        starts = rng.integers(0, len(tokens) - CONTEXT, 12)
        windows = tokens[starts[:, None] + np.arange(CONTEXT + 1)].astype(np.int64)
        ids = torch.from_numpy(windows).to(device)
        return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

    @torch.no_grad()
    def evaluate(step: int) -> None:
        losses = [
            sum(loss_of(model, *random_batch(split)).item() for _ in range(20)) / 20
            for split in splits
        ]
        print("Step: {}, Training Loss: {:.3f}, Validation Loss: {:.3f}".format(step, *losses))

    for step in steps:
        if step % 250 == 0:
            evaluate(step)
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * factor(step)
        loss = loss_of(model, *random_batch("train"))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def main() -> None:
    from lit_gpt.evaluation.whole_text import WholeText  # loads Lightning, which nanoGPT has not

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--path", required=True)
    parser.add_argument("--steps", type=int, default=2000)
    options = parser.parse_args()
    torch.manual_seed(1337)
    ids = np.frombuffer(Path(options.path).read_bytes(), np.uint8)
    cut = int(len(ids) * 0.9)
    model = build(256)
    splits = {"train": ids[:cut], "val": ids[cut:]}

    def factor(step: int) -> float:
        return learning_rate_factor(step, options.steps, WARMUP, "cosine", 0.1)

    train(model, splits, range(options.steps), factor)
    with torch.no_grad():
        batches = WholeText(ids[cut:], 64, CONTEXT)
        nats = sum(loss_of(model, x, y).item() * y.numel() for x, y in batches)
    loss = nats / (len(ids) - cut - 1)
    print(f"Final validation loss: {loss:.4f} nats/token")
    print(json.dumps({"loss": loss}))


if __name__ == "__main__":
    main()
