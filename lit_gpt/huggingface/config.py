"""config.json: the one written for our model, and the GPTConfig that a given one means.

Configs of transformers (`theirs`) are plain dicts, as in the file.
"""

from __future__ import annotations

from typing import Any

from lit_gpt.errors import UserError
from lit_gpt.huggingface.architectures import GPT2, LAYOUTS, layout_of
from lit_gpt.model import GPTConfig

ACTIVATIONS = {"relu": "relu", "gelu": "gelu", "gelu_tanh": "gelu_new"}  # GPT-2's names for ours
OURS = {theirs: ours for ours, theirs in ACTIVATIONS.items()} | {"gelu_pytorch_tanh": "gelu_tanh"}
PLAIN_ROPE = {"rope_type": "default", "partial_rotary_factor": 1}


def hf_config(config: GPTConfig) -> dict[str, Any]:
    """The content of config.json, without the ids of special tokens.

    Raises:
        UserError: the model is neither a GPT-2 nor a Qwen3.
    """
    layout = layout_of(config)
    theirs = {
        "architectures": [layout.architecture],
        "model_type": layout.model_type,
        "tie_word_embeddings": config.tie_embeddings,
        "dtype": "float32",
        **{name: getattr(config, ours) for ours, name in layout.sizes.items()},
        **{name: value for name, value in layout.required.items() if value not in (None, {})},
    }
    if layout is GPT2:
        return theirs | {
            "n_inner": config.hidden_size,
            "activation_function": ACTIVATIONS[str(config.activation)],
            "resid_pdrop": config.dropout,
            "embd_pdrop": config.dropout,
            "attn_pdrop": 0.0,
        }
    base = float(config.rotary_base)
    return theirs | {
        "head_dim": config.head_size,
        "num_key_value_heads": config.num_kv_heads,
        "attention_dropout": 0.0,
        "rope_parameters": {"rope_type": "default", "rope_theta": base},
        "rope_theta": base,  # where transformers 4 looks for it
    }


def gpt_config(theirs: dict[str, Any]) -> dict[str, Any]:
    """The fields of GPTConfig, all but dropout, for the config of a GPT-2 or Qwen3.

    Args:
        theirs: complete, as `to_dict` of transformers returns it; of another architecture,
            anything.

    Raises:
        UserError: another architecture, or something that our GPT can't do.
    """
    kind = theirs.get("model_type")
    if kind not in list(LAYOUTS):  # as a list, because it may be unhashable
        raise unsupported("model_type", kind, "gpt2 and qwen3")
    layout = LAYOUTS[kind]
    theirs = theirs | (theirs.get("rope_parameters") or {})
    for name, value in (layout.required | PLAIN_ROPE).items():
        if (given := theirs.get(name, value)) != value:
            raise unsupported(name, given, value)
    ours = {field: positive_int(theirs, name) for field, name in layout.sizes.items()}
    ours |= {name: allowed[-1] for name, allowed in layout.choices.items()}
    ours["tie_embeddings"] = theirs["tie_word_embeddings"]
    if layout is GPT2:
        activation = theirs["activation_function"]
        if activation not in OURS:
            raise unsupported("activation_function", activation, ", ".join(OURS))
        return ours | {
            "style": "classic",
            "bias": True,
            "activation": OURS[activation],
            "hidden_size": None if theirs["n_inner"] is None else positive_int(theirs, "n_inner"),
        }
    kinds = theirs["layer_types"]
    if set(kinds) != {"full_attention"}:
        raise unsupported("layer_types", kinds, "full_attention")
    return ours | {
        "style": "modern",
        "num_kv_heads": positive_int(theirs, "num_key_value_heads"),
        "head_size": positive_int(theirs, "head_dim"),
        "rotary_base": float(theirs["rope_theta"]),
    }


def unsupported(name: str, given: Any, supported: Any) -> UserError:
    return UserError(f"{name} {given!r} is not supported, only {supported}")


def positive_int(theirs: dict[str, Any], name: str) -> int:
    value = theirs[name]
    if type(value) is not int or value < 1:  # a bool is an int, too
        raise UserError(f"{name} must be a whole number above 0, not {value!r}")
    return value
