"""config.json: the one written for our model, and the GPTConfig that a given one means.

Configs of transformers (`theirs`) are plain dicts, as in the file; a missing field has the default
of transformers.
"""

from __future__ import annotations

from typing import Any

from lit_gpt.huggingface.architectures import GPT2, LAYOUTS, layout_of
from lit_gpt.model import GPTConfig

ACTIVATIONS = {"relu": "relu", "gelu": "gelu", "gelu_tanh": "gelu_new"}  # GPT-2's names for ours
OURS = {theirs: ours for ours, theirs in ACTIVATIONS.items()} | {"gelu_pytorch_tanh": "gelu_tanh"}


def hf_config(config: GPTConfig, end_of_text: int | None = None) -> dict[str, Any]:
    """The content of config.json; `end_of_text` also begins a text without a prompt.

    Raises:
        UserError: the model is neither a GPT-2 nor a Qwen3.
    """
    layout = layout_of(config)
    theirs = {
        "architectures": [layout.architecture],
        "model_type": next(name for name, known in LAYOUTS.items() if known is layout),
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
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
    """The fields of GPTConfig, all but dropout, for the config.json of a GPT-2 or Qwen3.

    Raises:
        ValueError: another architecture, or something that our GPT can't do.
    """
    kind = theirs.get("model_type")
    if not isinstance(kind, str) or kind not in LAYOUTS:
        raise unsupported("model_type", kind, "gpt2 and qwen3")
    layout = LAYOUTS[kind]
    for name, value in layout.required.items():
        if (given := theirs.get(name, value)) != value:
            raise unsupported(name, given, value)
    ours = {field: positive_int(theirs, name) for field, name in layout.sizes.items()}
    ours |= {name: allowed[-1] for name, allowed in layout.choices.items()}
    ours["tie_embeddings"] = theirs.get("tie_word_embeddings", layout is GPT2)
    if not isinstance(ours["tie_embeddings"], bool):
        raise unsupported("tie_word_embeddings", ours["tie_embeddings"], "true and false")
    if layout is GPT2:
        activation = theirs.get("activation_function", "gelu_new")
        if activation not in OURS:
            raise unsupported("activation_function", activation, ", ".join(OURS))
        return ours | {
            "style": "classic",
            "bias": True,
            "activation": OURS[activation],
            "hidden_size": positive_int(theirs, "n_inner", default=4 * ours["d_model"]),
        }
    check_full_attention(theirs, ours["num_blocks"])
    return ours | {
        "style": "modern",
        "num_kv_heads": positive_int(theirs, "num_key_value_heads", default=ours["num_heads"]),
        "head_size": positive_int({"head_dim": 128} | theirs, "head_dim"),
        "rotary_base": rotary_base(theirs),
    }


def unsupported(name: str, given: Any, supported: Any) -> ValueError:
    return ValueError(f"{name} {given!r} is not supported, only {supported}")


def positive_int(theirs: dict[str, Any], name: str, default: int | None = None) -> int:
    """A field's value; the default where it is missing or null."""
    value = theirs.get(name)
    if value is None and default is not None:
        return default
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a whole number above 0, not {value!r}")
    return value


def check_full_attention(theirs: dict[str, Any], num_blocks: int) -> None:
    """Refuses layers that attend to a sliding window instead of all earlier tokens."""
    kinds = theirs.get("layer_types")
    if kinds is not None:
        if set(map(str, kinds)) - {"full_attention"}:
            raise unsupported("layer_types", kinds, "full_attention")
    elif theirs.get("use_sliding_window") and theirs.get("max_window_layers", 28) < num_blocks:
        raise unsupported("use_sliding_window", True, False)


def rotary_base(theirs: dict[str, Any]) -> float:
    """The base of the rotary angles.

    transformers 5 has it in rope_parameters, 4 beside rope_scaling.
    """
    name = "rope_scaling" if theirs.get("rope_scaling") else "rope_parameters"
    rope = theirs.get(name) or {}
    kind = rope.get("rope_type", rope.get("type", "default")) if isinstance(rope, dict) else rope
    if kind != "default":
        raise unsupported(name, kind, "the default type")
    for fields in (rope, theirs):
        if (factor := fields.get("partial_rotary_factor")) not in (None, 1):
            raise unsupported("partial_rotary_factor", factor, 1)
    base = rope.get("rope_theta", theirs.get("rope_theta", 10_000))
    if not isinstance(base, int | float) or not 1 < base < float("inf"):
        raise unsupported("rope_theta", base, "numbers above 1")
    return float(base)
