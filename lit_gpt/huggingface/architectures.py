"""Owns how our GPT corresponds to transformers' GPT-2 and Qwen3, and its weights to theirs.

What decides is what a config says, not what its style is called. Written against the source of
transformers 5.23 (models/gpt2 and models/qwen3).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lit_gpt.errors import UserError
from lit_gpt.model import GPT, GPTConfig


@dataclass(frozen=True)
class Layout:
    """One architecture of transformers.

    Args:
        label: how people call it.
        architecture: its class.
        prefix: of all names but the output layer's.
        choices: the fields of GPTConfig that it has, and what each may be.
        outer: our modules outside of the blocks, and what they are called there.
        blocks: what the list of blocks is called.
        block: our modules in a block, and the ones there that are ours, one after the other.
        fixed: fields that change what it computes, and what they must be: their defaults.
        sizes: our sizes, and the fields that hold them.
    """

    label: str
    architecture: str
    prefix: str
    choices: dict[str, tuple]
    outer: dict[str, str]
    blocks: str
    block: dict[str, tuple[str, ...]]
    fixed: dict[str, Any]
    sizes: dict[str, str]

    def modules(self, num_blocks: int) -> Iterator[tuple[str, list[str]]]:
        """Our modules and, without the prefix, those that are together the same."""
        for ours, theirs in self.outer.items():
            yield ours, [theirs]
        for i in range(num_blocks):
            for ours, parts in self.block.items():
                yield f"blocks.{i}.{ours}", [f"{self.blocks}.{i}.{part}" for part in parts]


GPT2 = Layout(
    label="GPT-2",
    architecture="GPT2LMHeadModel",
    prefix="transformer.",
    choices={
        "position": ("sinusoidal", "learned"),
        "norm": ("layer",),
        "activation": ("relu", "gelu", "gelu_tanh"),
        "qk_norm": (False,),
    },
    outer={"embedding": "wte", "norm": "ln_f"},
    blocks="h",
    block={
        "attention_norm": ("ln_1",),
        "attention.qkv": ("attn.c_attn",),
        "attention.out": ("attn.c_proj",),
        "feed_forward_norm": ("ln_2",),
        "feed_forward.up": ("mlp.c_fc",),
        "feed_forward.out": ("mlp.c_proj",),
    },
    fixed={
        "layer_norm_epsilon": 1e-5,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
        "pruned_heads": {},
        "quantization_config": None,
    },
    sizes={
        "vocab_size": "vocab_size",
        "context_length": "n_positions",
        "d_model": "n_embd",
        "num_blocks": "n_layer",
        "num_heads": "n_head",
    },
)
QWEN3 = Layout(
    label="Qwen3",
    architecture="Qwen3ForCausalLM",
    prefix="model.",
    choices={
        "position": ("rotary",),
        "norm": ("rms",),
        "activation": ("swiglu",),
        "bias": (False,),
        "qk_norm": (True,),
    },
    outer={"embedding": "embed_tokens", "norm": "norm"},
    blocks="layers",
    block={
        "attention_norm": ("input_layernorm",),
        "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "attention.out": ("self_attn.o_proj",),
        "attention.q_norm": ("self_attn.q_norm",),
        "attention.k_norm": ("self_attn.k_norm",),
        "feed_forward_norm": ("post_attention_layernorm",),
        "feed_forward.up": ("mlp.gate_proj", "mlp.up_proj"),
        "feed_forward.out": ("mlp.down_proj",),
    },
    fixed={
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "attention_bias": False,
        "pruned_heads": {},
        "quantization_config": None,
    },
    sizes={
        "vocab_size": "vocab_size",
        "context_length": "max_position_embeddings",
        "d_model": "hidden_size",
        "num_blocks": "num_hidden_layers",
        "num_heads": "num_attention_heads",
        "hidden_size": "intermediate_size",
    },
)
LAYOUTS = {"gpt2": GPT2, "qwen3": QWEN3}  # by their model_type
TOLERANCE = 1e-4  # of a logit; where they are beyond 1, of the largest


def layout_of(config: GPTConfig) -> Layout:
    """The architecture that computes what this model does.

    Raises:
        UserError: there is none.
    """
    misfits = {}
    for layout in LAYOUTS.values():
        needs = [
            f"{name} {' or '.join(map(str, values))}, not {getattr(config, name)}"
            for name, values in layout.choices.items()
            if getattr(config, name) not in values
        ]
        if layout is GPT2:
            if config.num_kv_heads != config.num_heads:
                needs.append(f"num_kv_heads {config.num_heads}, not {config.num_kv_heads}")
            if config.head_size * config.num_heads != config.d_model:
                whole = f"d_model / num_heads = {config.d_model / config.num_heads:g}"
                needs.append(f"head_size {whole}, not {config.head_size}")
        if not needs:
            return layout
        misfits[layout.label] = f"{layout.label} would need {' and '.join(needs)}"
    raise UserError(
        f"this model fits neither architecture that is exported: {'; '.join(misfits.values())}. "
        "Train one with --model.style=modern or --model.style=classic as they are"
    )


def hf_weights(model: GPT) -> dict[str, Tensor]:
    """The weights under their names there, each in memory of its own.

    Sinusoids become the table of positions that GPT-2 learns, missing biases zeros. A tied output
    layer has no weight of its own.

    Raises:
        UserError: it is neither GPT-2 nor Qwen3.
    """
    config, ours, theirs = model.config, model.state_dict(), {}
    layout = layout_of(config)

    def put(name: str, weight: Tensor) -> None:
        theirs[layout.prefix + name] = weight.clone(memory_format=torch.contiguous_format)

    for module, names in layout.modules(config.num_blocks):
        weight = ours[f"{module}.weight"]
        parts = weight.split(part_sizes(config, len(weight), len(names)))
        for name, part in zip(names, parts, strict=True):
            put(f"{name}.weight", part.t() if is_turned(layout, module, part) else part)
        if layout is GPT2 and module != "embedding":
            bias = ours.get(f"{module}.bias", weight.new_zeros(len(weight)))
            put(f"{names[0]}.bias", bias)
    if layout is GPT2:
        put("wpe.weight", model.position.detach())
    if not config.tie_embeddings:
        theirs["lm_head.weight"] = ours["head.weight"].clone()
    return theirs


def part_sizes(config: GPTConfig, rows: int, num_parts: int) -> list[int]:
    """Rows of each of 1 part, 2 (gate and up) or 3 (query, key and value)."""
    shares = [config.num_heads] + [config.num_kv_heads] * 2 if num_parts == 3 else [1] * num_parts
    return [rows * share // sum(shares) for share in shares]


def is_turned(layout: Layout, module: str, weight: Tensor) -> bool:
    """Whether it is a Conv1D of GPT-2, which holds its matrix the other way round."""
    return layout is GPT2 and module.startswith("blocks.") and weight.ndim == 2


def gpt_weights(theirs: Mapping[str, Tensor], config: GPTConfig) -> dict[str, Tensor]:
    """The state of a GPT of that config, as float32, from all weights of a GPT-2 or Qwen3.

    Raises:
        UserError: the output layer should be tied and isn't.
    """
    layout = layout_of(config)
    theirs = {name.removeprefix(layout.prefix): weight for name, weight in theirs.items()}
    ours = {}
    for module, names in layout.modules(config.num_blocks):
        parts = [theirs[f"{name}.weight"].float() for name in names]
        parts = [part.t() if is_turned(layout, module, part) else part for part in parts]
        ours[f"{module}.weight"] = torch.cat(parts)
        if layout is GPT2 and module != "embedding":
            ours[f"{module}.bias"] = theirs[f"{names[0]}.bias"].float()
    if layout is GPT2:
        ours["position"] = theirs["wpe.weight"].float()
    head, table = theirs.get("lm_head.weight"), ours["embedding.weight"]
    if config.tie_embeddings and head is not None and not torch.equal(head.float(), table):
        raise UserError(
            "config.json ties lm_head.weight to the embedding (tie_word_embeddings), and they "
            "differ: take another model"
        )
    ours["head.weight"] = table if config.tie_embeddings else head.float()
    return ours


def check_logits(ours: Tensor, theirs: Tensor) -> tuple[float, float]:
    """The largest difference of logits, and what it is below.

    Rounding in float32, of the rotary angles of far positions too, makes more of large logits.

    Raises:
        UserError: it is larger.
    """
    difference = (ours - theirs).abs().max().item()
    allowed = TOLERANCE * max(1.0, theirs.abs().max().item())
    if not difference < allowed:  # NaN neither
        raise UserError(
            f"our logits and transformers' differ by up to {difference:.1e}, and {allowed:.1e} is "
            "allowed"
        )
    return difference, TOLERANCE if difference < TOLERANCE else allowed
