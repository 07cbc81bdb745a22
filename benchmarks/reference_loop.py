"""The classic training loop in plain PyTorch: the default job is measured against it.

It does what tutorials do: three linear layers for each head, the sinusoidal table rebuilt at each
call, all of cl100k_base's tokens, an untied output layer with a bias, unfused AdamW, dropout on
attention weights too, and 2 x 10 random evaluation batches every 50 steps. Only the vocabulary is
read offline, as ours is.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from any folder

from lit_gpt.text.vocabularies import load_tokenizer

CONTEXT = 128
BATCH_SIZE = 2
SAMPLE = Path(__file__).resolve().parents[1] / "data" / "订单商品名称.csv"


class Head(nn.Module):
    def __init__(self, d_model: int, head_size: int, context_length: int, dropout: float) -> None:
        super().__init__()
        self.query = nn.Linear(d_model, head_size)
        self.key = nn.Linear(d_model, head_size)
        self.value = nn.Linear(d_model, head_size)
        self.register_buffer("mask", torch.tril(torch.ones(context_length, context_length)))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        T = x.size(1)
        q, k, v = self.query(x), self.key(x), self.value(x)  # each (B, T, D)
        scores = q @ k.transpose(-2, -1) / math.sqrt(k.size(-1))  # (B, T, T)
        scores = scores.masked_fill(self.mask[:T, :T] == 0, float("-inf"))
        return self.dropout(scores.softmax(dim=-1)) @ v


class Block(nn.Module):
    def __init__(self, d_model: int, num_heads: int, context_length: int, dropout: float) -> None:
        super().__init__()
        size = d_model // num_heads
        heads = (Head(d_model, size, context_length, dropout) for _ in range(num_heads))
        self.heads = nn.ModuleList(heads)
        self.projection = nn.Linear(d_model, d_model)
        self.feed_forward = nn.Sequential(
            nn.Linear(d_model, 4 * d_model),
            nn.ReLU(),
            nn.Linear(4 * d_model, d_model),
            nn.Dropout(dropout),
        )
        self.norm_1 = nn.LayerNorm(d_model)
        self.norm_2 = nn.LayerNorm(d_model)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm_1(x)
        heads = torch.cat([head(normed) for head in self.heads], dim=-1)
        x = x + self.dropout(self.projection(heads))
        return x + self.feed_forward(self.norm_2(x))


class ReferenceGPT(nn.Module):
    def __init__(
        self,
        vocab_size: int,
        d_model: int = 80,
        num_blocks: int = 6,
        num_heads: int = 4,
        context_length: int = 128,
        dropout: float = 0.1,
        output_bias: bool = True,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, d_model)
        blocks = (Block(d_model, num_heads, context_length, dropout) for _ in range(num_blocks))
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.LayerNorm(d_model)
        self.output = nn.Linear(d_model, vocab_size, bias=output_bias)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)  # (B, T, C)
        table = torch.zeros(x.shape[1:], device=x.device)
        position = torch.arange(x.size(1), device=x.device).unsqueeze(1)
        numbers = torch.arange(0, x.size(2), 2, device=x.device)
        rates = torch.exp(numbers * (-math.log(10_000) / x.size(2)))
        table[:, 0::2] = torch.sin(position * rates)
        table[:, 1::2] = torch.cos(position * rates)
        return self.output(self.norm(self.blocks(x + table)))


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x).flatten(0, 1), y.flatten())


def train(model: nn.Module, splits: dict[str, Tensor], steps: Iterable[int]) -> None:
    """Trains and evaluates as the loop does.

    Args:
        splits: ids of the texts `train` and `val`.
        steps: the numbers of the steps, from 0; their end is the end of training.
    """
    device = next(model.parameters()).device

    def random_batch(split: str) -> tuple[Tensor, Tensor]:
        tokens = splits[split]
        starts = torch.randint(len(tokens) - CONTEXT, (BATCH_SIZE,)).tolist()
        x = torch.stack([tokens[i : i + CONTEXT] for i in starts])
        y = torch.stack([tokens[i + 1 : i + CONTEXT + 1] for i in starts])
        return x.to(device), y.to(device)

    @torch.no_grad()
    def evaluate(step: int) -> None:
        model.eval()
        train, val = (
            sum(loss_of(model, *random_batch(split)).item() for _ in range(10)) / 10
            for split in splits
        )
        model.train()
        print(f"Step: {step}, Training Loss: {train:.3f}, Validation Loss: {val:.3f}", flush=True)

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=False)
    for step in steps:
        if step % 50 == 0:
            evaluate(step)
        loss = loss_of(model, *random_batch("train"))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()


def main() -> None:
    from lit_gpt.evaluation.whole_text import WholeText  # loads Lightning, which the loop has not

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--path", default=str(SAMPLE))
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seed", type=int, default=1337)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    tokenizer = load_tokenizer("cl100k_base")
    ids = tokenizer.encode(Path(options.path).read_bytes().decode()).astype("int64")
    cut = int(len(ids) * 0.9)
    splits = {"train": torch.from_numpy(ids[:cut]), "val": torch.from_numpy(ids[cut:])}
    model = ReferenceGPT(tokenizer.vocab_size, context_length=CONTEXT)
    train(model, splits, range(options.steps))
    with torch.no_grad():
        batches = list(WholeText(ids[cut:], 8, CONTEXT))
        nats = sum(loss_of(model, x, y).item() * y.numel() for x, y in batches)
    loss = nats / (len(ids) - cut - 1)
    print(f"Final validation loss: {loss:.4f} nats/token")
    print(json.dumps({"loss": loss}))


if __name__ == "__main__":
    main()
