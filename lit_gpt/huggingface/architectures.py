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

TOLERANCE = 1e-4  # between logits; where they exceed 1, times the largest


@dataclass(frozen=True)
class Layout:
    """One architecture of transformers.

    Args:
        label: its usual name.
        model_type: its name in config.json.
        architecture: its class.
        prefix: of all weight names but the output layer's.
        choices: the fields of GPTConfig that it restricts, and the values that it allows.
        names: our modules with weights, and the modules of transformers that make up each, in
            order; `*` is the number of the block.
        required: fields of config.json that change the computation, and the only values that we
            support, which are the defaults.
        sizes: our sizes, and the fields of config.json that hold them.
    """

    label: str
    model_type: str
    architecture: str
    prefix: str
    choices: dict[str, tuple[Any, ...]]
    names: dict[str, tuple[str, ...]]
    required: dict[str, Any]
    sizes: dict[str, str]

    def modules(self, num_blocks: int) -> Iterator[tuple[str, list[str]]]:
        """Yields `names`, spelled out for each block."""
        for ours, theirs in self.names.items():
            for i in map(str, range(num_blocks if "*" in ours else 1)):
                yield ours.replace("*", i), [name.replace("*", i) for name in theirs]


GPT2 = Layout(
    label="GPT-2",
    model_type="gpt2",
    architecture="GPT2LMHeadModel",
    prefix="transformer.",
    choices={
        "position": ("sinusoidal", "learned"),
        "norm": ("layer",),
        "activation": ("relu", "gelu", "gelu_tanh"),
        "qk_norm": (False,),
        "smear": (False,),
        "bigram_rows": (0,),
    },
    names={
        "embedding": ("wte",),
        "norm": ("ln_f",),
        "blocks.*.attention_norm": ("h.*.ln_1",),
        "blocks.*.attention.qkv": ("h.*.attn.c_attn",),
        "blocks.*.attention.out": ("h.*.attn.c_proj",),
        "blocks.*.feed_forward_norm": ("h.*.ln_2",),
        "blocks.*.feed_forward.up": ("h.*.mlp.c_fc",),
        "blocks.*.feed_forward.out": ("h.*.mlp.c_proj",),
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
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    prefix="model.",
    choices={
        "position": ("rotary",),
        "norm": ("rms",),
        "activation": ("swiglu",),
        "bias": (False,),
        "qk_norm": (True,),
        "smear": (False,),
        "bigram_rows": (0,),
    },
    names={
        "embedding": ("embed_tokens",),
        "norm": ("norm",),
        "blocks.*.attention_norm": ("layers.*.input_layernorm",),
        "blocks.*.attention.qkv": tuple(f"layers.*.self_attn.{part}_proj" for part in "qkv"),
        "blocks.*.attention.out": ("layers.*.self_attn.o_proj",),
        "blocks.*.attention.q_norm": ("layers.*.self_attn.q_norm",),
        "blocks.*.attention.k_norm": ("layers.*.self_attn.k_norm",),
        "blocks.*.feed_forward_norm": ("layers.*.post_attention_layernorm",),
        "blocks.*.feed_forward.up": ("layers.*.mlp.gate_proj", "layers.*.mlp.up_proj"),
        "blocks.*.feed_forward.out": ("layers.*.mlp.down_proj",),
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
LAYOUTS = {layout.model_type: layout for layout in (GPT2, QWEN3)}


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
    if config.smear or config.bigram_rows:
        raise UserError(
            "neither GPT-2 nor Qwen3 adds to a token's embedding what the one before it says "
            f"(smear {config.smear}, bigram_rows {config.bigram_rows})",
            hint="train a model that is to be exported with `style`=modern",
        )
    raise UserError(
        f"the model is neither a GPT-2 nor a Qwen3: {'; '.join(misfits)}",
        hint="only such models can be exported, for example those of the unchanged classic and "
        "modern styles",
    )


def as_conv1d(layout: Layout, module: str, weight: Tensor) -> Tensor:
    """Transposed if it belongs to one of GPT-2's Conv1D layers, whose weight is (in, out)."""
    is_conv1d = layout is GPT2 and module.startswith("blocks.") and weight.ndim == 2
    return weight.t() if is_conv1d else weight


def hf_weights(model: GPT) -> dict[str, Tensor]:
    """A model's weights under transformers' names, each in memory of its own.

    Sinusoids become GPT-2's table of learned positions, missing biases zeros. A tied output layer
    has no weight of its own.

    Raises:
        UserError: the model is neither a GPT-2 nor a Qwen3.
    """
    config = model.config
    layout = layout_of(config)
    ours = model.state_dict()
    theirs: dict[str, Tensor] = {}
    kv_heads = config.num_kv_heads or config.num_heads
    for module, names in layout.modules(config.num_blocks):
        weight = ours[f"{module}.weight"]
        # Query, key and value, or gate and up, or the whole.
        shares = [config.num_heads, kv_heads, kv_heads] if len(names) == 3 else [1] * len(names)
        parts = weight.split([len(weight) * share // sum(shares) for share in shares])
        for name, part in zip(names, parts, strict=True):
            theirs[f"{layout.prefix}{name}.weight"] = as_conv1d(layout, module, part)
        if layout is GPT2 and module != "embedding":
            bias = ours.get(f"{module}.bias", weight.new_zeros(len(weight)))
            theirs[f"{layout.prefix}{names[0]}.bias"] = bias
    if model.position is not None:  # always so in GPT-2, never in Qwen3
        theirs[f"{layout.prefix}wpe.weight"] = model.position.detach()
    if not config.tie_embeddings:
        theirs["lm_head.weight"] = ours["head.weight"]
    contiguous = torch.contiguous_format
    return {name: weight.clone(memory_format=contiguous) for name, weight in theirs.items()}


def gpt_weights(theirs: Mapping[str, Tensor], config: GPTConfig) -> dict[str, Tensor]:
    """The float32 state of a GPT of that config, from all the weights of a GPT-2 or Qwen3."""
    layout = layout_of(config)
    theirs = {name.removeprefix(layout.prefix): w.float() for name, w in theirs.items()}
    ours = {}
    for module, names in layout.modules(config.num_blocks):
        parts = [as_conv1d(layout, module, theirs[f"{name}.weight"]) for name in names]
        ours[f"{module}.weight"] = torch.cat(parts)
        if layout is GPT2 and module != "embedding":
            ours[f"{module}.bias"] = theirs[f"{names[0]}.bias"]
    if layout is GPT2:
        ours["position"] = theirs["wpe.weight"]
    ours["head.weight"] = theirs.get("lm_head.weight", ours["embedding.weight"])
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
