"""Owns the Transformer: GPTConfig and GPT, ids in and logits out, nothing else.

Shapes: B batch, T time (tokens), C d_model, H heads, K key/value heads, D head size, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lit_gpt.errors import UserError

CHOICES = {  # what each may be: the classic style's first, the modern style's last
    "position": ("sinusoidal", "learned", "rotary"),
    "norm": ("layer", "rms"),
    "activation": ("relu", "gelu", "gelu_tanh", "swiglu"),
    "bias": (True, False),
    "tie_embeddings": (False, True),
    "qk_norm": (False, True),
}
STYLES = {"classic": 0, "modern": -1}


@dataclass
class GPTConfig:
    """Size and choices of a GPT. A choice left at None takes what its style says.

    Args:
        vocab_size: number of tokens, V.
        context_length: the most tokens the model looks at, itself included.
        d_model: embedding size, C; divisible by num_heads where head_size is None.
        num_blocks: number of Transformer blocks.
        num_heads: attention heads in each block.
        dropout: share dropped in training, in [0, 1), of the embedding and of what each layer adds.
        style: classic (sinusoidal positions, LayerNorm, ReLU) or modern (rotary positions,
            RMSNorm, QK norm, SwiGLU: Qwen3's layout).
        position: how a token knows its place: sinusoidal (Vaswani et al. 2017), learned (GPT-2)
            or rotary (Su et al. 2021).
        norm: layer (Ba et al. 2016) or rms (Zhang and Sennrich 2019).
        activation: of the feed-forward layer: relu, gelu, gelu_tanh (its approximation, in GPT-2),
            or swiglu (Shazeer 2020).
        bias: whether linear layers (the output one never does) and LayerNorms have biases.
        tie_embeddings: whether the output layer is the embedding table (Press and Wolf 2017).
        num_kv_heads: key/value heads, fewer than num_heads for grouped queries
            (Ainslie et al. 2023); None: as many.
        qk_norm: whether queries and keys are RMS-normalized in each head (Henry et al. 2020).
        head_size: of each head, D; None: d_model / num_heads.
        hidden_size: inside the feed-forward layer; None: 4 d_model, or 8/3 d_model for swiglu.
        rotary_base: of the rotary angles: the larger, the slower they turn.

    Raises:
        UserError: values that don't fit.
    """

    vocab_size: int
    context_length: int = 128
    d_model: int = 80
    num_blocks: int = 6
    num_heads: int = 4
    dropout: float = 0.1
    style: Literal["classic", "modern"] = "classic"
    position: Literal["sinusoidal", "learned", "rotary"] | None = None
    norm: Literal["layer", "rms"] | None = None
    activation: Literal["relu", "gelu", "gelu_tanh", "swiglu"] | None = None
    bias: bool | None = None
    tie_embeddings: bool | None = None
    num_kv_heads: int | None = None
    qk_norm: bool | None = None
    head_size: int | None = None
    hidden_size: int | None = None
    rotary_base: float = 10_000

    def __post_init__(self) -> None:
        if self.style not in STYLES:
            raise UserError(f"--model.style must be one of {list(STYLES)}, not {self.style!r}")
        for choice, values in CHOICES.items():
            if getattr(self, choice) is None:
                setattr(self, choice, values[STYLES[self.style]])
        if self.num_kv_heads is None:
            self.num_kv_heads = self.num_heads
        self._check()
        self.head_size = self.head_size or self.d_model // self.num_heads
        wide = 8 * math.ceil(self.d_model / 3) if self.activation == "swiglu" else 4 * self.d_model
        self.hidden_size = self.hidden_size or wide
        if self.position == "rotary" and self.head_size % 2:
            raise UserError(
                f"rotary positions need an even head size, and it is {self.head_size}: change "
                f"--model.head_size, or d_model {self.d_model} / num_heads {self.num_heads}"
            )

    def _check(self) -> None:
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise UserError(
                    f"--model.{name} must be one of {list(known)}, not {getattr(self, name)!r}"
                )
        sizes = ["vocab_size", "context_length", "d_model", "num_blocks", "num_heads"]
        for name in [*sizes, "num_kv_heads", "head_size", "hidden_size"]:
            value, owner = getattr(self, name), "data" if name == "context_length" else "model"
            if value is not None and value < 1:
                raise UserError(f"--{owner}.{name} must be at least 1, not {value}")
        if not 0 <= self.dropout < 1:
            raise UserError(f"--model.dropout must be in [0, 1), not {self.dropout}")
        if not 1 < self.rotary_base < math.inf:
            raise UserError(f"--model.rotary_base must be above 1, not {self.rotary_base}")
        if self.head_size is None and self.d_model % self.num_heads:
            below, above = (self.d_model // self.num_heads + i for i in (0, 1))
            near = " or ".join(str(n * self.num_heads) for n in (below, above) if n)
            raise UserError(
                f"--model.d_model {self.d_model} is not divisible by --model.num_heads "
                f"{self.num_heads}: give d_model {near}, for example"
            )
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                f"--model.num_kv_heads {self.num_kv_heads} must divide --model.num_heads "
                f"{self.num_heads}"
            )


class KVCache:
    """Keys and values of the tokens seen so far, of all blocks; `length` tokens are filled."""

    def __init__(self, config: GPTConfig, batch_size: int, like: Tensor) -> None:
        c = config
        shape = (c.num_blocks, batch_size, c.num_kv_heads, c.context_length, c.head_size)
        self.keys, self.values = like.new_zeros(shape), like.new_zeros(shape)
        self.length = 0

    def extend(self, block: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Adds a block's k and v (B, K, T, D); returns all of its, each (B, K, length + T, D)."""
        end = self.length + k.size(2)
        self.keys[block, :, :, self.length : end] = k
        self.values[block, :, :, self.length : end] = v
        return self.keys[block, :, :, :end], self.values[block, :, :, :end]


def make_norm(config: GPTConfig, size: int) -> nn.Module:
    if config.norm == "rms":
        return nn.RMSNorm(size, eps=1e-6)
    return nn.LayerNorm(size, bias=config.bias)


def sinusoids(length: int, size: int) -> Tensor:
    """Table (length, size) of sines and cosines, section 3.5 of "Attention is all you need"."""
    rates = torch.exp(torch.arange(0, size, 2) * (-math.log(10_000) / size))
    angles = torch.arange(length)[:, None] * rates  # (length, ceil(size / 2))
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)[:, :size]


def rotary_table(length: int, head_size: int, base: float) -> Tensor:
    """Cosines and sines (2, length, D) of the rotary angles, each half of D alike (as in Qwen3)."""
    rates = base ** (-torch.arange(0, head_size, 2) / head_size)
    angles = torch.arange(length)[:, None] * rates  # (length, D / 2)
    angles = torch.cat([angles, angles], dim=-1)
    return torch.stack([angles.cos(), angles.sin()])


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Turns each pair (i, i + D/2) of x (B, H, T, D) by its position's angles, table (2, T, D)."""
    cos, sin = table
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


class Attention(nn.Module):
    """Causal self-attention; query, key and value are one projection."""

    def __init__(self, config: GPTConfig, index: int) -> None:
        super().__init__()
        c = self.config = config
        self.index = index
        self.widths = [n * c.head_size for n in (c.num_heads, c.num_kv_heads, c.num_kv_heads)]
        self.qkv = nn.Linear(c.d_model, sum(self.widths), bias=c.bias)
        self.out = nn.Linear(self.widths[0], c.d_model, bias=c.bias)
        self.q_norm = nn.RMSNorm(c.head_size, eps=1e-6) if c.qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(c.head_size, eps=1e-6) if c.qk_norm else nn.Identity()

    def forward(self, x: Tensor, rotary: Tensor | None, cache: KVCache | None) -> Tensor:
        B, T = x.shape[:2]
        q, k, v = (  # each (B, H or K, T, D)
            part.view(B, T, -1, self.config.head_size).transpose(1, 2)
            for part in self.qkv(x).split(self.widths, dim=-1)
        )
        q, k = self.q_norm(q), self.k_norm(k)
        if rotary is not None:
            q, k = rotate(q, rotary), rotate(k, rotary)
        if cache is not None:
            k, v = cache.extend(self.index, k, v)
        # No dropout inside: its mask is most of a CPU step, and rules out the fused kernels.
        y = F.scaled_dot_product_attention(
            q,
            k,
            v,
            is_causal=T > 1,  # a single new token may look at everything before it
            enable_gqa=self.config.num_kv_heads < self.config.num_heads,
        )
        return self.out(y.transpose(1, 2).reshape(B, T, -1))


class FeedForward(nn.Module):
    """Position-wise layer; SwiGLU's is gated (Shazeer 2020)."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        size, hidden, bias = config.d_model, config.hidden_size, config.bias
        gelu_tanh = partial(F.gelu, approximate="tanh")
        functions = {"relu": F.relu, "gelu": F.gelu, "gelu_tanh": gelu_tanh, "swiglu": F.silu}
        self.activation = functions[config.activation]
        self.gated = config.activation == "swiglu"
        self.up = nn.Linear(size, hidden * (2 if self.gated else 1), bias=bias)
        self.out = nn.Linear(hidden, size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.gated:
            gate, up = self.up(x).chunk(2, dim=-1)  # each (B, T, hidden)
            return self.out(self.activation(gate) * up)
        return self.out(self.activation(self.up(x)))


class Block(nn.Module):
    """Attention, then feed-forward; each reads a normalized x and adds to it (pre-norm)."""

    def __init__(self, config: GPTConfig, index: int) -> None:
        super().__init__()
        self.attention_norm = make_norm(config, config.d_model)
        self.attention = Attention(config, index)
        self.feed_forward_norm = make_norm(config, config.d_model)
        self.feed_forward = FeedForward(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, rotary: Tensor | None, cache: KVCache | None) -> Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x), rotary, cache))
        return x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))


class GPT(nn.Module):
    """A decoder-only Transformer: ids (B, T) to the logits (B, T, V) of each next token."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        c = self.config = config
        self.embedding = nn.Embedding(c.vocab_size, c.d_model)
        # As large as sinusoids are, which would drown a smaller table. Where nothing is added, a
        # smaller one learns faster; one that is the output layer too starts with small logits.
        self.scale = 0.02 if c.tie_embeddings else 0.1 if c.position == "rotary" else 1.0
        self.register_buffer("rotary", None, persistent=False)
        if c.position == "sinusoidal":
            table = self.scale * sinusoids(c.context_length, c.d_model)
            self.register_buffer("position", table, persistent=False)
        elif c.position == "learned":
            self.position = nn.Parameter(torch.empty(c.context_length, c.d_model))
        else:
            self.register_buffer("position", None, persistent=False)
            self.rotary = rotary_table(c.context_length, c.head_size, c.rotary_base)
        self.dropout = nn.Dropout(c.dropout)
        self.blocks = nn.ModuleList(Block(c, i) for i in range(c.num_blocks))
        self.norm = make_norm(c, c.d_model)
        self.head = nn.Linear(c.d_model, c.vocab_size, bias=False)
        if c.tie_embeddings:
            self.head.weight = self.embedding.weight
        self._initialize()

    @torch.no_grad()
    def _initialize(self) -> None:
        """Normal(0, 0.02), and less where a block adds to x, so that its variance stays (GPT-2)."""
        for name, weight in self.named_parameters():
            if name in ("embedding.weight", "position"):
                nn.init.normal_(weight, 0, self.scale)
            elif weight.ndim > 1:
                adds = name.endswith("out.weight")
                nn.init.normal_(weight, 0, 0.02 / math.sqrt(2 * len(self.blocks)) if adds else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(weight)

    def forward(self, ids: Tensor, cache: KVCache | None = None) -> Tensor:
        """Logits (B, T, V). With a cache, `ids` are only the new tokens, which it then holds.

        New tokens are several only while the cache is empty; with it, T may not pass
        context_length.
        """
        return self.head(self.hidden_states(ids, cache))

    def hidden_states(self, ids: Tensor, cache: KVCache | None = None) -> Tensor:
        """What the output layer multiplies, (B, T, C)."""
        start = 0 if cache is None else cache.length
        end = start + ids.size(1)
        assert end <= self.config.context_length, f"{end} tokens > {self.config.context_length}"
        assert start == 0 or ids.size(1) == 1
        x = self.embedding(ids)  # (B, T, C)
        if self.position is not None:
            x = x + self.position[start:end]
        x = self.dropout(x)
        rotary = None if self.rotary is None else self.rotary[:, start:end]
        for block in self.blocks:
            x = block(x, rotary, cache)
        if cache is not None:
            cache.length = end
        return self.norm(x)

    def num_parameters(self) -> tuple[int, int]:
        """Weights of the token embedding and the output layer (once if tied), and of the rest."""
        total = sum(p.numel() for p in self.parameters())
        outer = self.embedding.weight.numel() * (1 if self.config.tie_embeddings else 2)
        return outer, total - outer
