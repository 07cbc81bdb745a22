"""Each architecture of transformers that our GPT can be, as data.

Written against the source of transformers 5.23 and 5.24 (models/gpt2, qwen3, qwen2, llama, mistral
and gpt_neox).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any


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
        eps: the field of config.json that holds norm_eps.
        head: name of the output layer in a file.
    """

    label: str
    model_type: str
    architecture: str
    prefix: str
    choices: dict[str, tuple[Any, ...]]
    names: dict[str, tuple[str, ...]]
    required: dict[str, Any]
    sizes: dict[str, str]
    eps: str
    head: str = "lm_head"

    def modules(self, num_blocks: int) -> Iterator[tuple[str, list[str]]]:
        """Yields `names`, spelled out for each block."""
        for ours, theirs in self.names.items():
            for i in map(str, range(num_blocks if "*" in ours else 1)):
                yield ours.replace("*", i), [name.replace("*", i) for name in theirs]


PLAIN = {  # what no architecture of transformers that is here does
    "smear": (False,),
    "bigram_rows": (0,),
    "spelling_rows": (0,),
    "output_spelling_rows": (0,),
    "softmax_cutoff": (0.0,),
}
GPT2 = Layout(
    label="GPT-2",
    model_type="gpt2",
    architecture="GPT2LMHeadModel",
    prefix="transformer.",
    choices=PLAIN
    | {
        "position": ("sinusoidal", "learned"),
        "norm": ("layer",),
        "activation": ("relu", "gelu", "gelu_tanh"),
        "qk_norm": (False,),
        "parallel_residual": (False,),
        "sliding_window": (None,),
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
    eps="layer_norm_epsilon",
)
LLAMA = Layout(
    label="Llama",
    model_type="llama",
    architecture="LlamaForCausalLM",
    prefix="model.",
    choices=PLAIN
    | {
        "position": ("rotary",),
        "norm": ("rms",),
        "activation": ("swiglu",),
        "qk_norm": (False,),
        "rotary_fraction": (1.0,),
        "parallel_residual": (False,),
        "sliding_window": (None,),
    },
    names={
        "embedding": ("embed_tokens",),
        "norm": ("norm",),
        "blocks.*.attention_norm": ("layers.*.input_layernorm",),
        "blocks.*.attention.qkv": tuple(f"layers.*.self_attn.{part}_proj" for part in "qkv"),
        "blocks.*.attention.out": ("layers.*.self_attn.o_proj",),
        "blocks.*.feed_forward_norm": ("layers.*.post_attention_layernorm",),
        "blocks.*.feed_forward.up": ("layers.*.mlp.gate_proj", "layers.*.mlp.up_proj"),
        "blocks.*.feed_forward.out": ("layers.*.mlp.down_proj",),
    },
    required={"hidden_act": "silu", "pruned_heads": {}, "quantization_config": None},
    sizes={
        "vocab_size": "vocab_size",
        "context_length": "max_position_embeddings",
        "d_model": "hidden_size",
        "num_blocks": "num_hidden_layers",
        "num_heads": "num_attention_heads",
        "num_kv_heads": "num_key_value_heads",
        "head_size": "head_dim",
        "hidden_size": "intermediate_size",
    },
    eps="rms_norm_eps",
)
NO_BIAS = {"bias": (False,), "qkv_bias": (False,), "mlp_bias": (False,)}
QWEN3 = replace(
    LLAMA,
    label="Qwen3",
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    choices=LLAMA.choices | NO_BIAS | {"qk_norm": (True,)},
    names=LLAMA.names
    | {f"blocks.*.attention.{x}_norm": (f"layers.*.self_attn.{x}_norm",) for x in "qk"},
    required=LLAMA.required | {"attention_bias": False},
)
QWEN2 = replace(
    LLAMA,
    label="Qwen2",
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    choices=LLAMA.choices | NO_BIAS | {"qkv_bias": (True,)},
    sizes={ours: theirs for ours, theirs in LLAMA.sizes.items() if ours != "head_size"},
)
MISTRAL = replace(  # without a window it is a Llama, unless that refuses its size
    LLAMA,
    label="Mistral",
    model_type="mistral",
    architecture="MistralForCausalLM",
    choices={n: v for n, v in (LLAMA.choices | NO_BIAS).items() if n != "sliding_window"},
)
GPT_NEOX = Layout(
    label="GPT-NeoX",
    model_type="gpt_neox",
    architecture="GPTNeoXForCausalLM",
    prefix="gpt_neox.",
    choices=PLAIN
    | {
        "position": ("rotary",),
        "norm": ("layer",),
        "activation": ("relu", "gelu", "gelu_tanh"),
        "qk_norm": (False,),
        "sliding_window": (None,),
    },
    names={
        "embedding": ("embed_in",),
        "norm": ("final_layer_norm",),
        "blocks.*.attention_norm": ("layers.*.input_layernorm",),
        "blocks.*.attention.qkv": ("layers.*.attention.query_key_value",),
        "blocks.*.attention.out": ("layers.*.attention.dense",),
        "blocks.*.feed_forward_norm": ("layers.*.post_attention_layernorm",),
        "blocks.*.feed_forward.up": ("layers.*.mlp.dense_h_to_4h",),
        "blocks.*.feed_forward.out": ("layers.*.mlp.dense_4h_to_h",),
    },
    required={"attention_bias": True, "pruned_heads": {}, "quantization_config": None},
    sizes={
        ours: theirs
        for ours, theirs in LLAMA.sizes.items()
        if ours not in ("num_kv_heads", "head_size")
    },
    eps="layer_norm_eps",
    head="embed_out",  # in transformers 5 it is lm_head, but not yet in its files
)
# Where several fit, the first is taken.
LAYOUTS = {layout.model_type: layout for layout in (GPT2, QWEN3, QWEN2, LLAMA, MISTRAL, GPT_NEOX)}
