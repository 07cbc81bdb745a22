"""How much memory training takes on each GPU: derived, not measured.

Shapes as in model.py: C d_model, H heads, K key/value heads, D head size, F hidden size.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from functools import cache
from typing import Any

import torch

from lit_gpt.errors import UserError
from lit_gpt.lora import LoraConfig, adapted_layers, add_adapters
from lit_gpt.model import GPT, GPTConfig
from lit_gpt.output_layer import MAX_LOGITS

# The CUDA context takes about 0.4 GB (PyTorch issue 107667). In torchtitan's runs, the allocator
# reserved 6 to 15 % more than the tensors' sum (docs/scaling.md#planning).
CONTEXT = 0.4e9
FRAGMENTS = 0.1


@dataclass(frozen=True)
class Precision:
    """Bytes of a weight, of what a matrix product takes, and of x between the blocks."""

    weight: int
    product: int
    residual: int

    @property
    def is_mixed(self) -> bool:
        return self.product < self.weight


PRECISIONS = {  # as Lightning keeps them: mixed means weights and moments in float32
    "32-true": Precision(4, 4, 4),
    "bf16-mixed": Precision(4, 2, 4),
    "16-mixed": Precision(4, 2, 4),
    "bf16-true": Precision(2, 2, 2),
}


def find_precision(name: str | int) -> str:
    """The full name: `bf16` is bf16-mixed, 32 is 32-true."""
    short = {"32": "32-true", "bf16": "bf16-mixed", "16": "16-mixed"}
    full = short.get(str(name), str(name))
    if full not in PRECISIONS:
        hint = f"use one of {', '.join(PRECISIONS)}"
        raise UserError("can't be planned for", field="precision", value=name, hint=hint)
    return full


@dataclass(frozen=True)
class Weights:
    """Numbers of a model's weights.

    Attributes:
        total: all, tied ones once.
        blocks: in the blocks.
        matrices: in the blocks' matrices.
        products: in all matrix products: without tables that are only looked up.
        trained: those that have gradients and moments: all, or adapters alone.
        trained_matrices: in the blocks' matrices.
    """

    total: int
    blocks: int
    matrices: int
    products: int
    trained: int
    trained_matrices: int


def count_weights(config: GPTConfig, lora: LoraConfig | None = None) -> Weights:
    return _count_weights(tuple(asdict(config).items()), lora)


@cache
def _count_weights(config_fields: tuple[tuple[str, Any], ...], lora: LoraConfig | None) -> Weights:
    config = GPTConfig(**dict(config_fields))
    with torch.device("meta"):  # without memory for them
        gpt = GPT(config)
        if lora:
            add_adapters(gpt, lora)
    in_matrices = [p for p in gpt.blocks.parameters() if p.ndim > 1]
    matrices = sum(p.numel() for p in in_matrices)
    return Weights(
        total=sum(p.numel() for p in gpt.parameters()),
        blocks=sum(p.numel() for p in gpt.blocks.parameters()),
        matrices=matrices,
        products=matrices + gpt.head.weight.numel(),
        trained=sum(p.numel() for p in gpt.parameters() if p.requires_grad),
        trained_matrices=sum(p.numel() for p in in_matrices if p.requires_grad),
    )


@cache
def _adapter_bytes(
    config_fields: tuple[tuple[str, Any], ...], lora: LoraConfig, product: int
) -> int:
    """Bytes per token that the adapters of a block keep: products with A; of dropout its masks.

    What dropout leaves takes the place of its input, unless another operation keeps that too.
    """
    c: Any = GPTConfig(**dict(config_fields) | {"num_blocks": 1})
    with torch.device("meta"):
        layers = [*adapted_layers(GPT(c), lora.layers)]
    ranks = sum(lora.rank * len(widths) for _, _, widths in layers)
    if not lora.dropout:
        return product * ranks
    masks = sum(getattr(owner, name).in_features for owner, name, _ in layers)
    twice = c.num_heads * c.head_size if lora.layers != "feed_forward" else 0  # by attention
    twice += c.hidden_size if lora.layers != "attention" and c.activation == "relu" else 0
    return product * (ranks + twice) + masks


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU, at the start of a backward pass."""

    weights: float
    gradients: float
    moments: float
    copies: float  # of the weights in half precision, which autocast makes
    gathered: float  # weights that FSDP2 has whole, for the blocks it computes
    activations: float
    logits: float  # and their gradient

    @property
    def overhead(self) -> float:
        """The CUDA context, and what the allocator reserves but can't use."""
        return CONTEXT + FRAGMENTS * sum(getattr(self, part.name) for part in fields(self))

    @property
    def total(self) -> float:
        return sum(asdict(self).values()) + self.overhead


def block_bytes(config: GPTConfig, precision: Precision) -> int:
    """Bytes per token that a block keeps for the backward pass.

    As in section 4.1 of "Reducing Activation Recomputation in Large Transformer Models"
    (Korthikanti et al. 2022), for our block, and without the T x T attention matrix, which
    FlashAttention never stores.
    """
    c: Any = config  # whose fields are no longer None
    p = precision.product
    attention = c.num_heads * c.head_size  # H * D
    keys = c.num_kv_heads * c.head_size  # K * D
    norms = 1 if c.parallel_residual else 2  # which then have the same input
    size = norms * precision.residual * c.d_model
    size += 2 * p * c.d_model  # inputs of qkv and up
    size += p * (attention + 2 * keys)  # output of qkv, which values are a view of
    if c.qk_norm and precision.is_mixed:  # autocast normalizes in float32
        size += 4 * (attention + keys)
    if c.qk_norm or c.position == "rotary":  # queries and keys as they are after it
        size += p * (attention + keys)
    size += p * attention + 4 * c.num_heads  # output of attention, and its log-sum-exps
    # ReLU keeps its output, which is the next layer's input; GELU its input too; SwiGLU both
    # halves, the gate after SiLU, and the product.
    parts = {"relu": 1, "swiglu": 4}.get(c.activation, 2)
    size += p * parts * c.hidden_size
    return size + (2 * c.d_model if c.dropout else 0)  # masks, one byte each


def activation_bytes(
    config: GPTConfig,
    num_tokens: int,
    precision: Precision,
    checkpointing: bool,
    lora: LoraConfig | None = None,
) -> int:
    """Bytes of activations that a forward pass of num_tokens tokens leaves for the backward pass.

    Args:
        checkpointing: whether a block keeps its input alone and computes the rest again; one block
            at a time then has all.
        lora: adapters; a frozen layer without one keeps less than is counted here.
    """
    c: Any = config
    size = precision.residual * c.d_model  # input of the last norm
    size += precision.product * c.d_model  # input of the output layer
    size += c.d_model if c.dropout else 0
    size += precision.residual * c.d_model if c.smear else 0
    made = c.cutoff + (c.vocab_size if c.output_spelling_rows else 0)  # rows of the output layer
    head = 0 if precision.is_mixed else precision.weight * made * c.d_model  # else they are copies
    block = num_tokens * block_bytes(c, precision)
    if lora:
        fields_of_config = tuple(asdict(config).items())
        block += num_tokens * _adapter_bytes(fields_of_config, lora, precision.product)
    if c.sliding_window and c.sliding_window < c.context_length:
        block += precision.product * c.context_length**2  # the mask, as added to the scores
    if checkpointing:
        return head + num_tokens * (size + c.num_blocks * precision.residual * c.d_model) + block
    return head + num_tokens * size + c.num_blocks * block


def logits_bytes(num_tokens: int, vocab_size: int) -> int:
    """Bytes of log-probabilities, their gradient and the logits', all in float32.

    Above MAX_LOGITS, the loss is computed in parts.
    """
    count = num_tokens * vocab_size
    return 12 * (count if count <= MAX_LOGITS else MAX_LOGITS // 4)


def estimate(
    config: GPTConfig,
    num_tokens: int,
    precision: str,
    strategy: str,
    num_devices: int = 1,
    checkpointing: bool = False,
    optimizer: str = "adamw",
    lora: LoraConfig | None = None,
) -> Memory:
    """The memory of one device.

    Args:
        num_tokens: of a batch on one device.
        strategy: single, ddp or fsdp2.
        checkpointing: see `activation_bytes`.
        optimizer: adamw or muon.
        lora: the adapters that are trained alone; None: all weights are.
    """
    size = PRECISIONS[precision]
    count = count_weights(config, lora)
    weights = size.weight * count.total
    trained = size.weight * count.trained
    # Muon has one moment for the blocks' matrices.
    moments = 2 * trained - (size.weight * count.trained_matrices if optimizer == "muon" else 0)
    share = num_devices if strategy == "fsdp2" else 1
    # The tables are gathered all the time, and two blocks: one computes, the next is on its way.
    two_blocks = 2 * count.blocks / config.num_blocks
    gathered = size.weight * (count.total - count.blocks + min(two_blocks, count.blocks))
    return Memory(
        weights=weights / share,
        gradients=trained / share * (2 if strategy == "ddp" else 1),  # DDP's buckets are copies
        moments=moments / share,
        copies=2 * count.products if size.is_mixed else 0,
        gathered=gathered if strategy == "fsdp2" else 0,
        activations=activation_bytes(config, num_tokens, size, checkpointing, lora),
        logits=logits_bytes(num_tokens, config.vocab_size),
    )
