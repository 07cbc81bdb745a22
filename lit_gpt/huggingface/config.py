"""config.json: the one written for our model, and the GPTConfig that a given one means.

Configs of transformers (`theirs`) are plain dicts, as in the file.
"""

from __future__ import annotations

from typing import Any

from lit_gpt.errors import UserError
from lit_gpt.huggingface.architectures import has_attention_bias, layout_of
from lit_gpt.huggingface.layouts import GPT2, GPT_NEOX, LAYOUTS, LLAMA, MISTRAL, QWEN2, Layout
from lit_gpt.model import GPTConfig

# Names for ours in transformers; those that it takes and does not write follow.
ACTIVATIONS = {"relu": "relu", "gelu": "gelu", "gelu_tanh": "gelu_new"}
OURS = {theirs: ours for ours, theirs in ACTIVATIONS.items()}
OURS |= {"gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh"}
SCALING = {  # our fields, and those of rope_parameters
    "linear": {"rope_factor": "factor"},
    "llama3": {
        "rope_factor": "factor",
        "rope_low_freq_factor": "low_freq_factor",
        "rope_high_freq_factor": "high_freq_factor",
        "rope_original_context": "original_max_position_embeddings",
    },
}
CHOSEN = (  # the last value
    *("position", "norm", "qk_norm", "smear", "bigram_rows", "spelling_rows"),
    *("output_spelling_rows", "softmax_cutoff"),
)


def hf_config(config: GPTConfig) -> dict[str, Any]:
    """The content of config.json, without the ids of special tokens.

    Raises:
        UserError: no architecture of transformers fits the model.
    """
    layout = layout_of(config)
    theirs = {
        "architectures": [layout.architecture],
        "model_type": layout.model_type,
        "tie_word_embeddings": config.tie_embeddings,
        "dtype": "float32",
        layout.eps: config.norm_eps,
        **{name: getattr(config, ours) for ours, name in layout.sizes.items()},
        **{name: value for name, value in layout.required.items() if value not in (None, {})},
    }
    if layout is GPT2:
        return theirs | {
            "n_ctx": config.context_length,  # as older programs call it
            "n_inner": config.hidden_size,
            "activation_function": ACTIVATIONS[str(config.activation)],
            "resid_pdrop": config.dropout,
            "embd_pdrop": config.dropout,
            "attn_pdrop": 0.0,
        }
    theirs |= {"attention_dropout": 0.0} | rope_fields(layout, config)
    if layout is GPT_NEOX:
        return theirs | {
            "hidden_act": ACTIVATIONS[str(config.activation)],
            "use_parallel_residual": config.parallel_residual,
            "hidden_dropout": config.dropout,
        }
    if layout is LLAMA:
        biases = {"attention_bias": has_attention_bias(config), "mlp_bias": config.mlp_bias}
        return theirs | biases
    return theirs | ({"sliding_window": config.sliding_window} if layout is MISTRAL else {})


def rope_fields(layout: Layout, config: GPTConfig) -> dict[str, Any]:
    """The rotary positions, as transformers 5 has them, and where 4 looks for them."""
    base = float(config.rotary_base)
    kind = config.rope_scaling or "default"
    scaling: dict[str, Any] = {"rope_type": kind}
    scaling |= {name: getattr(config, ours) for ours, name in SCALING.get(kind, {}).items()}
    old = {"rope_theta": base}
    rope = scaling | old
    if layout is GPT_NEOX:
        rope["partial_rotary_factor"] = config.rotary_fraction
        old = {"rotary_emb_base": base, "rotary_pct": config.rotary_fraction}
    # Where it is there, transformers 5 reads nothing else.
    scaled = {} if config.rope_scaling is None else {"rope_scaling": scaling}
    return {"rope_parameters": rope} | old | scaled


def gpt_config(theirs: dict[str, Any]) -> dict[str, Any]:
    """The fields of GPTConfig, all but dropout, for the config of a model of transformers.

    Args:
        theirs: complete, as `to_dict` of transformers returns it; of another architecture,
            anything.

    Raises:
        UserError: another architecture, or something that our GPT can't do.
    """
    kind = theirs.get("model_type")
    if kind not in list(LAYOUTS):  # as a list, because it may be unhashable
        raise unsupported("model_type", kind, ", ".join(LAYOUTS))
    layout = LAYOUTS[kind]
    theirs = theirs | (theirs.get("rope_parameters") or {})
    for name, value in layout.required.items():
        if (given := theirs.get(name, value)) != value:
            raise unsupported(name, given, value)
    ours: dict[str, Any] = {
        field: positive_int(theirs, name) for field, name in layout.sizes.items()
    }
    ours |= {name: layout.choices[name][-1] for name in CHOSEN if name in layout.choices}
    ours["tie_embeddings"] = theirs["tie_word_embeddings"]
    ours["norm_eps"] = float(theirs[layout.eps])
    if layout is GPT2:
        inner = theirs["n_inner"]
        return ours | {
            "style": "classic",
            "bias": True,
            "activation": activation(theirs, "activation_function"),
            "hidden_size": None if inner is None else positive_int(theirs, "n_inner"),
        }
    ours |= {"rotary_base": float(theirs["rope_theta"])} | scaling_fields(theirs)
    fraction = float(theirs.get("partial_rotary_factor", 1.0))
    if layout is GPT_NEOX:
        return ours | {
            "style": "classic",
            "bias": True,
            "activation": activation(theirs, "hidden_act"),
            "parallel_residual": theirs["use_parallel_residual"],
            "rotary_fraction": fraction,
        }
    if fraction != 1:
        raise unsupported("partial_rotary_factor", fraction, 1)
    kinds = theirs.get("layer_types") or ["full_attention"]
    if layout is not MISTRAL and set(kinds) != {"full_attention"}:
        raise unsupported("layer_types", kinds, "full_attention")
    if layout is MISTRAL and theirs["sliding_window"] is not None:
        ours["sliding_window"] = positive_int(theirs, "sliding_window")
    bias = layout is LLAMA and theirs["attention_bias"]
    mlp_bias = layout is LLAMA and theirs["mlp_bias"]
    return ours | {
        "style": "modern",
        "activation": "swiglu",
        "bias": bias,
        "qkv_bias": bias or layout is QWEN2,
        "mlp_bias": mlp_bias,
    }


def scaling_fields(theirs: dict[str, Any]) -> dict[str, Any]:
    """Our fields of the scaled rotary frequencies.

    Raises:
        UserError: another kind than those that depend on nothing but the config.
    """
    kind = theirs.get("rope_type", "default")
    if kind == "default":
        return {}
    if kind not in list(SCALING):
        raise unsupported("rope_type", kind, ", ".join(("default", *SCALING)))
    numbers = {ours: float(theirs[name]) for ours, name in SCALING[kind].items()}
    if kind == "llama3":
        name = SCALING[kind]["rope_original_context"]
        numbers["rope_original_context"] = positive_int(theirs, name)
    return {"rope_scaling": kind} | numbers


def activation(theirs: dict[str, Any], name: str) -> str:
    if theirs[name] not in list(OURS):
        raise unsupported(name, theirs[name], ", ".join(OURS))
    return OURS[theirs[name]]


def unsupported(name: str, given: Any, supported: Any) -> UserError:
    return UserError(f"{name} {given!r} is not supported, only {supported}")


def positive_int(theirs: dict[str, Any], name: str) -> int:
    value = theirs[name]
    if type(value) is not int or value < 1:  # a bool is an int, too
        raise UserError(f"{name} must be a whole number above 0, not {value!r}")
    return value
