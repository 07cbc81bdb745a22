"""How our GPT corresponds to GPT-2 and Qwen3 in transformers, and our weights to theirs.

The values of a config decide which of the two it is, not the name of its style. Written against
the source of transformers 5.23 (models/gpt2 and models/qwen3).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lit_gpt.errors import UserError
from lit_gpt.model import GPT, GPTConfig

TOLERANCE = 1e-4  # of a logit; where logits exceed 1, of the largest one


@dataclass(frozen=True)
class Layout:
    """One architecture of transformers.

    Args:
        label: its usual name.
        architecture: its class.
        prefix: of all weight names but the output layer's.
        choices: the fields of GPTConfig that it restricts, and the values that it allows.
        top_level: our modules outside the blocks, and their names there.
        blocks: the name of the list of blocks.
        block: our modules in a block, and the modules there that make up each, in order.
        required: fields of config.json that would change the computation, and their defaults,
            which are all that we can do.
        sizes: our sizes, and the fields of config.json that hold them.
    """

    label: str
    architecture: str
    prefix: str
    choices: dict[str, tuple[Any, ...]]
    top_level: dict[str, str]
    blocks: str
    block: dict[str, tuple[str, ...]]
    required: dict[str, Any]
    sizes: dict[str, str]

    def modules(self, num_blocks: int) -> Iterator[tuple[str, list[str]]]:
        """Each of our modules with weights, and the modules that make it up there."""
        for ours, theirs in self.top_level.items():
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
    top_level={"embedding": "wte", "norm": "ln_f"},
    blocks="h",
    block={
        "attention_norm": ("ln_1",),
        "attention.qkv": ("attn.c_attn",),
        "attention.out": ("attn.c_proj",),
        "feed_forward_norm": ("ln_2",),
        "feed_forward.up": ("mlp.c_fc",),
        "feed_forward.out": ("mlp.c_proj",),
    },
    required={
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
    top_level={"embedding": "embed_tokens", "norm": "norm"},
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
    required={
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


def layout_of(config: GPTConfig) -> Layout:
    """The architecture that computes what this model does.

    Raises:
        UserError: neither does.
    """
    misfits = []
    for layout in LAYOUTS.values():
        choices = dict(layout.choices)
        if layout is GPT2:
            choices["num_kv_heads"] = (config.num_heads,)
            choices["head_size"] = (config.d_model / config.num_heads,)
        needs = [
            f"{name} {' or '.join(map(str, allowed))} instead of {getattr(config, name)}"
            for name, allowed in choices.items()
            if getattr(config, name) not in allowed
        ]
        if not needs:
            return layout
        misfits.append(f"{layout.label} needs {' and '.join(needs)}")
    raise UserError(
        f"the model is neither a GPT-2 nor a Qwen3: {'; '.join(misfits)}",
        hint="only such models can be exported, for example those of the unchanged classic and "
        "modern styles",
    )


def hf_weights(model: GPT) -> dict[str, Tensor]:
    """The weights under their names there, each in memory of its own.

    Sinusoids become GPT-2's table of learned positions, missing biases zeros. A tied output layer
    has no weight of its own.

    Raises:
        UserError: the model is neither a GPT-2 nor a Qwen3.
    """
    config = model.config
    layout = layout_of(config)
    ours = model.state_dict()
    theirs: dict[str, Tensor] = {}

    def put(name: str, weight: Tensor) -> None:
        theirs[layout.prefix + name] = weight.clone(memory_format=torch.contiguous_format)

    for module, names in layout.modules(config.num_blocks):
        weight = ours[f"{module}.weight"]
        parts = weight.split(part_sizes(config, len(weight), len(names)))
        for name, part in zip(names, parts, strict=True):
            put(f"{name}.weight", part.t() if is_transposed(layout, module, part) else part)
        if layout is GPT2 and module != "embedding":
            put(f"{names[0]}.bias", ours.get(f"{module}.bias", weight.new_zeros(len(weight))))
    if model.position is not None:  # always so in GPT-2, never in Qwen3
        put("wpe.weight", model.position.detach())
    if not config.tie_embeddings:
        theirs["lm_head.weight"] = ours["head.weight"].clone()
    return theirs


def part_sizes(config: GPTConfig, num_rows: int, num_parts: int) -> list[int]:
    """Rows of each of 1 part, 2 parts (gate and up) or 3 parts (query, key and value)."""
    kv_heads = config.num_kv_heads or config.num_heads
    shares = [config.num_heads, kv_heads, kv_heads] if num_parts == 3 else [1] * num_parts
    return [num_rows * share // sum(shares) for share in shares]


def is_transposed(layout: Layout, module: str, weight: Tensor) -> bool:
    """Whether it belongs to one of GPT-2's Conv1D layers, whose weight is (in, out)."""
    return layout is GPT2 and module.startswith("blocks.") and weight.ndim == 2


def gpt_weights(theirs: Mapping[str, Tensor], config: GPTConfig) -> dict[str, Tensor]:
    """The float32 state of a GPT of that config, from all the weights of a GPT-2 or Qwen3.

    Raises:
        ValueError: the output layer should be tied and is not.
    """
    layout = layout_of(config)
    theirs = {name.removeprefix(layout.prefix): weight for name, weight in theirs.items()}
    ours = {}
    for module, names in layout.modules(config.num_blocks):
        parts = [theirs[f"{name}.weight"].float() for name in names]
        parts = [part.t() if is_transposed(layout, module, part) else part for part in parts]
        ours[f"{module}.weight"] = torch.cat(parts)
        if layout is GPT2 and module != "embedding":
            ours[f"{module}.bias"] = theirs[f"{names[0]}.bias"].float()
    if layout is GPT2:
        ours["position"] = theirs["wpe.weight"].float()
    embedding = ours["embedding.weight"]
    head = theirs.get("lm_head.weight", embedding).float()
    if config.tie_embeddings and not torch.equal(head, embedding):
        raise ValueError(
            "config.json ties lm_head.weight to the embedding (tie_word_embeddings), but they "
            "differ"
        )
    ours["head.weight"] = embedding if config.tie_embeddings else head
    return ours


def logit_difference(ours: Tensor, theirs: Tensor) -> tuple[float, float]:
    """The largest difference between logits of the same shape, and the limit it must stay below.

    The limit is TOLERANCE; large logits may differ by that share of the largest one, as float32
    rounds them (and the rotary angles of distant positions) more coarsely.
    """
    difference = (ours - theirs).abs().max().item()
    if difference < TOLERANCE:
        return difference, TOLERANCE
    return difference, TOLERANCE * max(1.0, theirs.abs().max().item())
