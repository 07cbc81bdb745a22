"""LoRA: thin matrices trained beside frozen ones (Hu et al. 2021, arXiv:2106.09685).

Ours, not peft's: its layers rename the frozen weights, and it needs transformers. What it computes
is the same, so huggingface/adapter.py writes its format.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lit_gpt.errors import UserError, check_choice, check_least
from lit_gpt.model import GPT

LoraLayers = Literal["attention", "feed_forward", "all"]


@dataclass(frozen=True)
class LoraConfig:
    """Which adapters a model has; the fields are options of LitGPT that begin with `lora_`.

    Raises:
        UserError: values out of range.
    """

    rank: int
    alpha: float = 16.0
    dropout: float = 0.0
    layers: LoraLayers = "all"

    def __post_init__(self) -> None:
        check_least(1, lora_rank=self.rank)
        if not 0 < self.alpha < math.inf:
            raise UserError("must be above 0", field="lora_alpha", value=self.alpha)
        if not 0 <= self.dropout < 1:
            raise UserError("must be in [0, 1)", field="lora_dropout", value=self.dropout)
        check_choice(get_args(LoraLayers), lora_layers=self.layers)

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> LoraConfig | None:
        """What these options of LitGPT ask for; None: no adapters."""
        if not options["lora_rank"]:
            return None
        return cls(**{field.name: options[f"lora_{field.name}"] for field in fields(cls)})


class LoraLinear(nn.Linear):
    """A frozen layer that was trained before, plus thin trained matrices: x W^T + s x A^T B^T.

    Query, key and value are one layer in this model, but have an A and a B each, as have gate and
    up: that is what other programs have where these are layers of their own.

    Args:
        linear: the layer, of (out, in) weights; its own tensors are used, under the same names.
        widths: of its parts, which add up to `out`.
    """

    def __init__(self, linear: nn.Linear, widths: list[int], config: LoraConfig) -> None:
        nn.Module.__init__(self)
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.weight = linear.weight
        self.bias = linear.bias
        self.scale = config.alpha / config.rank
        self.dropout = nn.Dropout(config.dropout)
        sizes = [(config.rank, self.in_features)] * len(widths)
        self.lora_a = nn.ParameterList(torch.empty(size) for size in sizes)
        self.lora_b = nn.ParameterList(torch.zeros(width, config.rank) for width in widths)
        for a in self.lora_a:  # as in the paper's own code, and peft
            nn.init.kaiming_uniform_(a, a=math.sqrt(5))

    def factors(self) -> tuple[Tensor, Tensor]:
        """A (P * rank, in) and B (out, P * rank) of the whole layer, which has P parts."""
        return torch.cat([*self.lora_a]), torch.block_diag(*self.lora_b)

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)  # (B, T, out)
        a, b = self.factors()
        low = F.linear(self.dropout(x), a)  # (B, T, P * rank)
        return torch.addmm(y.flatten(0, 1), low.flatten(0, 1), b.t(), alpha=self.scale).view_as(y)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """One ordinary layer that computes the same, in the memory of the frozen one."""
        a, b = self.factors()
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, "meta")
        self.weight.addmm_(b, a, alpha=self.scale)
        linear.weight = self.weight
        linear.bias = self.bias
        return linear.requires_grad_()


def adapted_layers(gpt: GPT, layers: LoraLayers) -> Iterator[tuple[nn.Module, str, list[int]]]:
    """Yields the layers that get adapters: whose attribute each is, its name, its parts' widths."""
    for block in gpt.blocks:
        attention: Any = block.attention
        feed_forward: Any = block.feed_forward
        if layers != "feed_forward":
            yield attention, "qkv", attention.widths
            yield attention, "out", [attention.out.out_features]
        if layers != "attention":
            num_parts = 2 if feed_forward.gated else 1
            yield feed_forward, "up", [feed_forward.up.out_features // num_parts] * num_parts
            yield feed_forward, "out", [feed_forward.out.out_features]


def add_adapters(gpt: GPT, config: LoraConfig) -> None:
    """Freezes a model, and gives layers of its blocks adapters that at first change nothing.

    Raises:
        UserError: adapters larger than the layers.
    """
    if config.rank > gpt.config.d_model:
        problem = f"must be at most `d_model` ({gpt.config.d_model})"
        raise UserError(problem, field="lora_rank", value=config.rank)
    gpt.requires_grad_(False)
    for owner, name, widths in adapted_layers(gpt, config.layers):
        setattr(owner, name, LoraLinear(getattr(owner, name), widths, config))


def merge_adapters(gpt: GPT) -> None:
    """Adds the adapters to the weights: the model is then an ordinary one."""
    for owner, name, _ in adapted_layers(gpt, "all"):
        layer = getattr(owner, name)
        if isinstance(layer, LoraLinear):
            setattr(owner, name, layer.merged())
    gpt.requires_grad_()


def is_adapter(name: str) -> bool:
    """Whether a weight of this name belongs to an adapter."""
    return ".lora_" in name


def load_base(gpt: GPT, weights: Mapping[str, Tensor]) -> None:
    """Gives a model all weights but its adapters' own."""
    adapters = {name: weight for name, weight in gpt.state_dict().items() if is_adapter(name)}
    gpt.load_state_dict({**weights, **adapters})


def fingerprint(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 of weights on the CPU: their names, types, shapes and values."""
    digest = hashlib.sha256()
    for name, weight in sorted(weights.items()):
        digest.update(f"{name} {weight.dtype} {[*weight.shape]}\n".encode())
        digest.update(weight.detach().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
