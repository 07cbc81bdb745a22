"""The Transformer: GPTConfig and GPT, which turns ids into logits and does nothing else.

Shapes: B batch, T time (tokens), C d_model, H heads, K key/value heads, D head size, F hidden size
of the feed-forward layer, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lit_gpt.embeddings import Pairs, Parts, Spelling, make_embedding
from lit_gpt.errors import UserError, check_choice, check_least
from lit_gpt.output_layer import OutputLayer

CHOICES = {  # possible values
    "position": ("sinusoidal", "learned", "rotary"),
    "norm": ("layer", "rms"),
    "activation": ("relu", "gelu", "gelu_tanh", "swiglu"),
    "bias": (True, False),
    "tie_embeddings": (False, True),
    "qk_norm": (False, True),
    "smear": (False, True),
    "qkv_bias": (True, False),
    "mlp_bias": (True, False),
    "parallel_residual": (False, True),
    "rope_scaling": (None, "linear", "llama3"),
}
CLASSIC = {
    "position": "sinusoidal",
    "norm": "layer",
    "activation": "relu",
    "bias": True,
    "tie_embeddings": False,
    "qk_norm": False,
    "smear": False,
    "bigram_rows": 0,
}
MODERN = CLASSIC | {"position": "rotary", "norm": "rms", "activation": "swiglu", "bias": False}
MODERN |= {"tie_embeddings": True, "qk_norm": True}
FAST = MODERN | {"tie_embeddings": False, "smear": True}
STYLES = {"classic": CLASSIC, "modern": MODERN, "fast": FAST}


@dataclass
class GPTConfig:
    """Size and choices of a GPT. A choice left at None becomes that of the style.

    Args:
        vocab_size: number of tokens, V.
        context_length: how many tokens the model can see, the current one included.
        d_model: embedding size, C; divisible by num_heads unless head_size is given.
        num_blocks: number of Transformer blocks.
        num_heads: attention heads in each block, H.
        dropout: in [0, 1), applied in training to the embedding and to each sublayer's output.
        style: classic (sinusoidal positions, LayerNorm, ReLU), modern (rotary positions, RMSNorm,
            QK norm, SwiGLU: Qwen3's layout) or fast (modern with smear and an output layer of its
            own: learns more from each token, but no other program runs it).
        position: encoding of positions: sinusoidal (Vaswani et al. 2017), learned (GPT-2) or
            rotary (Su et al. 2021).
        norm: layer (Ba et al. 2016) or rms (Zhang and Sennrich 2019).
        activation: of the feed-forward layer: relu, gelu, gelu_tanh (its approximation, in GPT-2),
            or swiglu (Shazeer 2020).
        bias: whether linear layers (never the output layer) and LayerNorms have biases.
        tie_embeddings: whether the output layer is the embedding table (Press and Wolf 2017).
        num_kv_heads: key/value heads, K; fewer than num_heads for grouped queries
            (Ainslie et al. 2023); None: as many.
        qk_norm: whether queries and keys are RMS-normalized in each head (Henry et al. 2020).
        smear: whether each embedding gets a learned share of the one before it (modded-nanogpt).
        bigram_rows: of a table added to the embedding, in which each pair of neighbouring tokens
            has a row, shared by chance with others (modded-nanogpt); 0: no table.
        spelling_rows: of a table added to the embedding, in which each part of a token's spelling
            has a row (Bojanowski et al. 2017), shared by chance with others; 0: no table.
        output_spelling_rows: of another such table, which is added to the output layer.
        softmax_cutoff: the leading share of the vocabulary that the first of two softmaxes covers,
            with one entry for all other tokens (adaptive softmax, Grave et al. 2017); 0: one
            softmax over all tokens.
        head_size: of each head, D; None: d_model / num_heads.
        hidden_size: of the feed-forward layer, F; None: 4 d_model, or 8/3 d_model for swiglu.
        rotary_base: base of the rotary frequencies; larger means slower rotation.
        norm_eps: added to the variance in every normalization; None: 1e-5 for layer, 1e-6 for rms.
        qkv_bias: whether queries, keys and values have biases; None: as `bias` says.
        mlp_bias: whether the feed-forward layers have biases; None: as `bias` says.
        rotary_fraction: share of each head that rotates, its first channels (GPT-NeoX).
        rope_scaling: how the rotary frequencies were slowed down for a longer context: linear, all
            alike (Chen et al. 2023), or llama3, the slow ones alone (Llama 3.1).
        rope_factor: by which rope_scaling divides frequencies.
        rope_low_freq_factor: llama3 divides those that turn less often in the original context.
        rope_high_freq_factor: llama3 keeps those that turn more often in the original context.
        rope_original_context: context length before llama3's scaling.
        parallel_residual: whether attention and feed-forward layer read the same x (GPT-NeoX).
        sliding_window: how many tokens attention sees, the current one included (Mistral); None:
            all before it.

    Raises:
        UserError: values out of range, or that do not fit together.
    """

    vocab_size: int
    context_length: int = 128
    d_model: int = 80
    num_blocks: int = 6
    num_heads: int = 4
    dropout: float = 0.1
    style: Literal["classic", "modern", "fast"] = "classic"
    position: Literal["sinusoidal", "learned", "rotary"] | None = None
    norm: Literal["layer", "rms"] | None = None
    activation: Literal["relu", "gelu", "gelu_tanh", "swiglu"] | None = None
    bias: bool | None = None
    tie_embeddings: bool | None = None
    num_kv_heads: int | None = None
    qk_norm: bool | None = None
    smear: bool | None = None
    bigram_rows: int | None = None
    spelling_rows: int = 0
    output_spelling_rows: int = 0
    softmax_cutoff: float = 0.0
    head_size: int | None = None
    hidden_size: int | None = None
    rotary_base: float = 10_000
    norm_eps: float | None = None
    qkv_bias: bool | None = None
    mlp_bias: bool | None = None
    rotary_fraction: float = 1.0
    rope_scaling: Literal["linear", "llama3"] | None = None
    rope_factor: float = 1.0
    rope_low_freq_factor: float = 1.0
    rope_high_freq_factor: float = 4.0
    rope_original_context: int | None = None
    parallel_residual: bool = False
    sliding_window: int | None = None

    def __post_init__(self) -> None:
        check_choice(STYLES, style=self.style)
        for choice, value in STYLES[self.style].items():
            if getattr(self, choice) is None:
                setattr(self, choice, value)
        if self.num_kv_heads is None:
            self.num_kv_heads = self.num_heads
        if self.qkv_bias is None:
            self.qkv_bias = self.bias
        if self.mlp_bias is None:
            self.mlp_bias = self.bias
        if self.norm_eps is None:
            self.norm_eps = 1e-6 if self.norm == "rms" else 1e-5
        self._check()
        if self.head_size is None:
            self.head_size = self.d_model // self.num_heads
        if self.hidden_size is None:
            is_gated = self.activation == "swiglu"
            self.hidden_size = 8 * math.ceil(self.d_model / 3) if is_gated else 4 * self.d_model
        if self.position == "rotary" and self.head_size % 2:
            problem = "must be even for rotary positions"
            hint = f"change it, or `d_model` ({self.d_model}) / `num_heads` ({self.num_heads})"
            raise UserError(problem, field="head_size", value=self.head_size, hint=hint)
        if self.position == "rotary" and (self.rotary_size < 2 or self.rotary_size % 2):
            problem = f"rotates {self.rotary_size} of {self.head_size} channels, not an even number"
            raise UserError(problem, field="rotary_fraction", value=self.rotary_fraction)

    @property
    def rotary_size(self) -> int:
        """How many channels of a head rotate."""
        assert self.head_size is not None
        return int(self.head_size * self.rotary_fraction)

    def _check(self) -> None:
        for name, values in CHOICES.items():
            check_choice(values, **{name: getattr(self, name)})
        sizes = ("vocab_size", "context_length", "d_model", "num_blocks", "num_heads")
        others = ("num_kv_heads", "head_size", "hidden_size", "sliding_window")
        names = (*sizes, *others, "rope_original_context")
        check_least(1, **{name: getattr(self, name) for name in names})
        tables = ("bigram_rows", "spelling_rows", "output_spelling_rows")
        check_least(0, **{name: getattr(self, name) for name in tables})
        for name in ("dropout", "softmax_cutoff"):
            if not 0 <= (value := getattr(self, name)) < 1:
                raise UserError("must be in [0, 1)", field=name, value=value)
        if not 1 < self.rotary_base < math.inf:
            raise UserError("must be above 1", field="rotary_base", value=self.rotary_base)
        if not isinstance(self.sliding_window, int | None):
            problem = "must be a whole number"
            raise UserError(problem, field="sliding_window", value=self.sliding_window)
        if not 0 < self.norm_eps < 1:
            raise UserError("must be in (0, 1)", field="norm_eps", value=self.norm_eps)
        if not 0 < self.rotary_fraction <= 1:
            problem = "must be in (0, 1]"
            raise UserError(problem, field="rotary_fraction", value=self.rotary_fraction)
        self._check_scaling()
        heads = self.num_heads
        if self.head_size is None and self.d_model % heads:
            problem = f"must be divisible by `num_heads` ({heads})"
            above = -(-self.d_model // heads) * heads
            hint = f"use {above}, for example"
            raise UserError(problem, field="d_model", value=self.d_model, hint=hint)
        if heads % self.num_kv_heads:
            problem = f"must divide `num_heads` ({heads})"
            raise UserError(problem, field="num_kv_heads", value=self.num_kv_heads)

    def _check_scaling(self) -> None:
        check_least(1, rope_factor=self.rope_factor)
        low, high = self.rope_low_freq_factor, self.rope_high_freq_factor
        if not 0 < low < high < math.inf:
            problem = f"must be above `rope_low_freq_factor` ({low}), and that above 0"
            raise UserError(problem, field="rope_high_freq_factor", value=high)
        if self.rope_scaling == "llama3" and self.rope_original_context is None:
            problem = "needs the context length before it"
            hint = "give `rope_original_context`"
            raise UserError(problem, field="rope_scaling", value=self.rope_scaling, hint=hint)

    @property
    def cutoff(self) -> int:
        """How many tokens the output layer decides between first; 0: all."""
        return int(self.softmax_cutoff * self.vocab_size)

    def least_weights(self) -> int:
        """The number of weights in the matrices, without the output layer: a lower bound."""
        heads = 2 * (self.num_heads + self.num_kv_heads)  # of qkv and out together
        feed_forward = (3 if self.activation == "swiglu" else 2) * self.hidden_size
        block = (heads * self.head_size + feed_forward) * self.d_model
        rows = self.vocab_size + self.bigram_rows + self.spelling_rows + self.output_spelling_rows
        return rows * self.d_model + self.num_blocks * block


class KVCache:
    """Keys and values of the tokens so far in all blocks; `length` tokens are filled.

    Both are (num_blocks, B, K, context_length, D), on the device and of the type of `like`. `last`
    are the newest tokens, (B, 1), once there are any. `mask`, (B, 1, T, L), says which of L tokens
    each new one sees; None: those before it.
    """

    mask: Tensor | None = None

    def __init__(self, config: GPTConfig, batch_size: int, like: Tensor) -> None:
        c = config
        shape = (c.num_blocks, batch_size, c.num_kv_heads, c.context_length, c.head_size)
        self.keys = like.new_zeros(shape)
        self.values = like.new_zeros(shape)
        self.length = 0
        self.last: Tensor | None = None

    def places(self, num_new: int) -> slice | Tensor:
        """The positions of new tokens: the same for all rows, or (B, T)."""
        end = self.length + num_new
        assert end <= self.keys.size(3), f"{end} tokens > {self.keys.size(3)}"
        assert self.length == 0 or num_new == 1
        return slice(self.length, end)

    def extend(self, block: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Adds k and v (B, K, T, D) to a block's; returns all of them, (B, K, length + T, D)."""
        end = self.length + k.size(2)
        self.keys[block, :, :, self.length : end] = k
        self.values[block, :, :, self.length : end] = v
        return self.keys[block, :, :, :end], self.values[block, :, :, :end]

    def advance(self, ids: Tensor) -> None:
        """Ends a call: `ids` (B, T) are in all blocks."""
        self.length += ids.size(1)
        self.last = ids[:, -1:]


def make_norm(config: GPTConfig, size: int) -> nn.Module:
    if config.norm == "rms":
        return nn.RMSNorm(size, eps=config.norm_eps)
    return nn.LayerNorm(size, eps=config.norm_eps, bias=config.bias)


def sinusoids(length: int, size: int) -> Tensor:
    """Sines and cosines (length, size), section 3.5 of "Attention is all you need"."""
    rates = torch.exp(torch.arange(0, size, 2) * (-math.log(10_000) / size))  # (ceil(size / 2),)
    angles = torch.arange(length)[:, None] * rates  # (length, ceil(size / 2))
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)[:, :size]  # (length, size)


def rotary_rates(config: GPTConfig) -> Tensor:
    """The rotary angles from one token to the next, (D / 2,), after rope_scaling."""
    c = config
    rates = c.rotary_base ** (-torch.arange(0, c.rotary_size, 2) / c.rotary_size)  # (D / 2,)
    if c.rope_scaling is None:
        return rates
    slowed = rates / c.rope_factor
    if c.rope_scaling == "linear":
        return slowed
    turns = c.rope_original_context * rates / (2 * math.pi)  # within the original context
    low, high = c.rope_low_freq_factor, c.rope_high_freq_factor
    kept = ((turns - low) / (high - low)).clamp(0, 1)  # smooth in between
    return kept * rates + (1 - kept) * slowed


def rotary_table(length: int, rates: Tensor) -> Tensor:
    """Cosines and sines (2, length, D) of the rotary angles, the same in both halves of D."""
    angles = torch.arange(length)[:, None] * rates  # (length, D / 2)
    angles = torch.cat([angles, angles], dim=-1)  # (length, D)
    return torch.stack([angles.cos(), angles.sin()])  # (2, length, D)


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Turns each pair (i, i + D/2) of x (B, H, T, D) by its position's angles, table (2, T, D).

    Rows with positions of their own have a table (2, B, 1, T, D). One of fewer channels turns the
    first ones alone.
    """
    size = table.size(-1)
    if size < x.size(-1):
        parts = (rotate(x[..., :size], table), x[..., size:])
        # In memory as x, (B, T, H, D), so that attention's output needs no copy.
        return torch.cat([part.transpose(1, 2) for part in parts], dim=-1).transpose(1, 2)
    cos, sin = table
    first, second = x.chunk(2, dim=-1)  # each (B, H, T, D / 2)
    return x * cos + torch.cat([-second, first], dim=-1) * sin  # (B, H, T, D)


class Attention(nn.Module):
    """Causal self-attention; query, key and value are one projection."""

    def __init__(self, config: GPTConfig, index: int) -> None:
        super().__init__()
        self.config = c = config
        self.index = index
        self.widths = [n * c.head_size for n in (c.num_heads, c.num_kv_heads, c.num_kv_heads)]
        self.qkv = nn.Linear(c.d_model, sum(self.widths), bias=c.qkv_bias)
        self.out = nn.Linear(self.widths[0], c.d_model, bias=c.bias)
        eps = c.norm_eps if c.norm == "rms" else 1e-6
        self.q_norm = nn.RMSNorm(c.head_size, eps=eps) if c.qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(c.head_size, eps=eps) if c.qk_norm else nn.Identity()

    def forward(
        self,
        x: Tensor,
        rotary: Tensor | None,
        cache: KVCache | None,
        mask: Tensor | None = None,
    ) -> Tensor:
        B, T, _ = x.shape
        q, k, v = (  # (B, H, T, D), (B, K, T, D), (B, K, T, D)
            part.view(B, T, -1, self.config.head_size).transpose(1, 2)
            for part in self.qkv(x).split(self.widths, dim=-1)  # (B, T, H * D), ...
        )
        q = self.q_norm(q)
        k = self.k_norm(k)
        if rotary is not None:
            q = rotate(q, rotary)
            k = rotate(k, rotary)
        if cache is not None:
            k, v = cache.extend(self.index, k, v)  # (B, K, cache.length + T, D)
        # No dropout inside: its mask takes most of a CPU step, and rules out the fused kernels.
        # A single new token sees everything before it, or in the window.
        window = self.config.sliding_window
        if window is not None and T == 1 and mask is None:
            k = k[:, :, -window:]
            v = v[:, :, -window:]
        grouped = self.config.num_kv_heads < self.config.num_heads
        causal = T > 1 and mask is None
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=grouped)
        return self.out(y.transpose(1, 2).reshape(B, T, -1))  # from (B, H, T, D) to (B, T, C)


class FeedForward(nn.Module):
    """Position-wise layer; SwiGLU's is gated (Shazeer 2020)."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        c = config
        functions: dict[str, Callable[[Tensor], Tensor]] = {
            "relu": F.relu,
            "gelu": F.gelu,
            "gelu_tanh": partial(F.gelu, approximate="tanh"),
            "swiglu": F.silu,
        }
        self.activation = functions[c.activation]
        self.gated = c.activation == "swiglu"
        self.up = nn.Linear(c.d_model, c.hidden_size * (2 if self.gated else 1), bias=c.mlp_bias)
        self.out = nn.Linear(c.hidden_size, c.d_model, bias=c.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.up(x)  # (B, T, F), or twice as wide
        if self.gated:
            gate, hidden = hidden.chunk(2, dim=-1)  # each (B, T, F)
            return self.out(self.activation(gate) * hidden)  # (B, T, C)
        return self.out(self.activation(hidden))  # (B, T, C)


class Block(nn.Module):
    """Attention, then feed-forward, each on a normalized x, and added to x (pre-norm).

    Where they are parallel, both read the same x.
    """

    def __init__(self, config: GPTConfig, index: int) -> None:
        super().__init__()
        self.attention_norm = make_norm(config, config.d_model)
        self.attention = Attention(config, index)
        self.feed_forward_norm = make_norm(config, config.d_model)
        self.feed_forward = FeedForward(config)
        self.dropout = nn.Dropout(config.dropout)
        self.is_parallel = config.parallel_residual

    def forward(
        self,
        x: Tensor,
        rotary: Tensor | None,
        cache: KVCache | None,
        mask: Tensor | None = None,
    ) -> Tensor:
        added = x + self.dropout(self.attention(self.attention_norm(x), rotary, cache, mask))
        read = x if self.is_parallel else added
        return added + self.dropout(self.feed_forward(self.feed_forward_norm(read)))


class GPT(nn.Module):
    """A decoder-only Transformer: ids (B, T) in, the logits (B, T, V) of the next tokens out."""

    rotary: Tensor | None  # (2, context_length, D)
    position: Tensor | None  # (context_length, C)

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = c = config
        self.embedding = make_embedding(c.vocab_size, c.d_model, c.spelling_rows)
        # As large as sinusoids, which would drown a smaller table. Where nothing is added to it, a
        # smaller table learns faster; as the output layer too, it has to start with small logits.
        self.scale = 0.02 if c.tie_embeddings else 0.1 if c.position == "rotary" else 1.0
        self.register_buffer("rotary", None, persistent=False)
        if c.position == "sinusoidal":
            table = self.scale * sinusoids(c.context_length, c.d_model)
            self.register_buffer("position", table, persistent=False)
        elif c.position == "learned":
            self.position = nn.Parameter(torch.empty(c.context_length, c.d_model))
        else:
            self.register_buffer("position", None, persistent=False)
            self.rotary = rotary_table(c.context_length, rotary_rates(c))
        has_pairs = c.smear or c.bigram_rows
        self.pairs = Pairs(c.d_model, c.smear, c.bigram_rows) if has_pairs else None
        self.dropout = nn.Dropout(c.dropout)
        self.blocks = nn.ModuleList(Block(c, i) for i in range(c.num_blocks))
        self.norm = make_norm(c, c.d_model)
        self.head = OutputLayer(c.d_model, c.vocab_size, c.cutoff, c.output_spelling_rows)
        if c.tie_embeddings:
            self.head.weight = self.embedding.weight
        self._initialize()

    @torch.no_grad()
    def _initialize(self) -> None:
        """Normal(0, 0.02), and less where a block adds to x, to keep its variance (GPT-2)."""
        for name, weight in self.named_parameters():
            if name in ("embedding.weight", "position"):
                nn.init.normal_(weight, 0, self.scale)
            elif name == "embedding.parts.weight":
                nn.init.normal_(weight, 0, self.scale / 2)
            elif name == "pairs.share":
                nn.init.constant_(weight, 0.3)
            elif name in ("pairs.table.weight", "head.parts.weight"):
                nn.init.zeros_(weight)
            elif weight.ndim > 1:
                adds = name.endswith("out.weight")
                nn.init.normal_(weight, 0, 0.02 / math.sqrt(2 * len(self.blocks)) if adds else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(weight)

    def spell(self, tokenizer: Spelling) -> None:
        """Takes the parts of each token's spelling, if any count: before the first call."""
        rows_of = cache(tokenizer.spelling_rows)
        for module in self.modules():
            if isinstance(module, Parts):
                module.spell(torch.from_numpy(rows_of(module.num_rows)))

    def forward(self, ids: Tensor, cache: KVCache | None = None) -> Tensor:
        """Logits (B, T, V) of the token after each of `ids` (B, T).

        With a cache, `ids` are only the new tokens, which are added to it: a single one, unless the
        cache is empty. Together they must not exceed context_length.
        """
        return self.head(self.hidden_states(ids, cache))  # (B, T, V)

    def hidden_states(self, ids: Tensor, cache: KVCache | None = None) -> Tensor:
        """The input of the output layer, (B, T, C); arguments as for `forward`."""
        num_new = ids.size(1)
        context = self.config.context_length
        assert num_new <= context, f"{num_new} tokens > {context}"
        places = slice(num_new) if cache is None else cache.places(num_new)
        if self.pairs is None:
            x = self.embedding(ids)  # (B, T, C)
        else:
            # The first token of a window precedes itself.
            first = ids[:, :1] if cache is None or cache.last is None else cache.last
            x = self.pairs(ids, first, self.embedding)
        if self.position is not None:
            x = x + self.position[places]  # (T, C) is added to each row, or (B, T, C)
        x = self.dropout(x)
        rotary = None if self.rotary is None else self.rotary[:, places]  # (2, T, D)
        if rotary is not None and isinstance(places, Tensor):
            rotary = rotary[:, :, None]  # (2, B, 1, T, D): the same in all heads
        mask = self._window_mask(ids) if cache is None or cache.mask is None else cache.mask
        for block in self.blocks:
            x = block(x, rotary, cache, mask)
        if cache is not None:
            cache.advance(ids)
        return self.norm(x)

    def _window_mask(self, ids: Tensor) -> Tensor | None:
        """Which tokens of a text see which in the sliding window, (T, T); None: all before them."""
        window = self.config.sliding_window
        length = ids.size(1)
        if window is None or length <= window:
            return None
        return ids.new_ones(length, length, dtype=torch.bool).tril().triu(1 - window)

    def num_parameters(self) -> tuple[int, int]:
        """Number of weights in the tables (embedding, pairs, output layer), and in everything else.

        Tied weights count once.
        """
        in_tables = [*self.embedding.parameters(), *self.head.parameters()]
        if self.pairs is not None:
            in_tables += self.pairs.parameters()
        total = sum(p.numel() for p in self.parameters())
        vocabulary = sum(p.numel() for p in set(in_tables))
        return vocabulary, total - vocabulary
