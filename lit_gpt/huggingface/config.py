"""Owns config.json: what it says of our model, and which GPTConfig another's config.json means.

`theirs` are plain dicts, as the file has them; what is absent has the default of transformers.
"""

from __future__ import annotations

from typing import Any

from lit_gpt.errors import UserError
from lit_gpt.huggingface.architectures import GPT2, LAYOUTS, layout_of
from lit_gpt.model import GPTConfig

ACTIVATIONS = {"relu": "relu", "gelu": "gelu", "gelu_tanh": "gelu_new"}  # as GPT-2 calls them
SAME = {"gelu_pytorch_tanh": "gelu_tanh"}  # another name of it there


def hf_config(config: GPTConfig, end_of_text: int | None = None) -> dict[str, Any]:
    """What config.json says of the model; `end_of_text` also begins a text without a prompt.

    Raises:
        UserError: it is neither GPT-2 nor Qwen3.
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
        **{name: value for name, value in layout.fixed.items() if value not in (None, {})},
    }
    if layout is GPT2:
        return theirs | {
            "n_inner": config.hidden_size,
            "activation_function": ACTIVATIONS[config.activation],
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
    """The fields of GPTConfig (all but dropout) for a config.json of GPT-2 or Qwen3.

    Raises:
        UserError: it is of another architecture, or has what our GPT hasn't.
    """
    kind = theirs.get("model_type")
    if not isinstance(kind, str) or kind not in LAYOUTS:
        raise UserError(f"config.json: model_type {kind!r} can't be imported, only gpt2 and qwen3")
    layout = LAYOUTS[kind]
    for name, value in layout.fixed.items():
        if (given := theirs.get(name, value)) != value:
            raise refused(name, given, value)
    ours = {field: whole(theirs, name) for field, name in layout.sizes.items()}
    ours |= {name: values[-1] for name, values in layout.choices.items()}
    ours["tie_embeddings"] = theirs.get("tie_word_embeddings", layout is GPT2)
    if not isinstance(ours["tie_embeddings"], bool):
        raise refused("tie_word_embeddings", ours["tie_embeddings"], "true or false")
    if layout is GPT2:
        name = theirs.get("activation_function", "gelu_new")
        known = {theirs: ours for ours, theirs in ACTIVATIONS.items()} | SAME
        if name not in known:
            raise refused("activation_function", name, " or ".join(known))
        inner = theirs.get("n_inner") is not None
        hidden_size = whole(theirs, "n_inner") if inner else 4 * ours["d_model"]
        own = {"style": "classic", "bias": True, "activation": known[name]}
        return ours | own | {"hidden_size": hidden_size}
    check_windows(theirs, ours["num_blocks"])
    grouped = theirs.get("num_key_value_heads") is not None
    return ours | {
        "style": "modern",
        "num_kv_heads": whole(theirs, "num_key_value_heads") if grouped else ours["num_heads"],
        "head_size": whole({"head_dim": 128} | theirs, "head_dim"),
        "rotary_base": rotary_base(theirs),
    }


def refused(name: str, given: Any, wanted: Any) -> UserError:
    return UserError(
        f"config.json: {name} {given!r} is nothing that lit_gpt can do, only {wanted}: take "
        "another model"
    )


def whole(theirs: dict[str, Any], name: str) -> int:
    value = theirs.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"config.json: {name} must be a whole number above 0, not {value!r}")
    return value


def check_windows(theirs: dict[str, Any], num_blocks: int) -> None:
    """Each layer must see all tokens before."""
    kinds = theirs.get("layer_types")
    if kinds is None and theirs.get("use_sliding_window"):
        if theirs.get("max_window_layers", 28) < num_blocks:
            raise refused("use_sliding_window", True, False)
    elif kinds is not None and set(map(str, kinds)) - {"full_attention"}:
        raise refused("layer_types", kinds, "full_attention")


def rotary_base(theirs: dict[str, Any]) -> float:
    """Of the rotary positions: transformers 5 has it in rope_parameters, 4 beside rope_scaling."""
    name = "rope_scaling" if theirs.get("rope_scaling") else "rope_parameters"
    rope = theirs.get(name) or {}
    kind = rope.get("rope_type", rope.get("type", "default")) if isinstance(rope, dict) else rope
    if kind != "default":
        raise refused(name, kind, "the default type")
    for where in (rope, theirs):
        if (share := where.get("partial_rotary_factor")) not in (None, 1):
            raise refused("partial_rotary_factor", share, 1)
    base = rope.get("rope_theta", theirs.get("rope_theta", 10_000))
    if not isinstance(base, int | float) or not 1 < base < float("inf"):
        raise refused("rope_theta", base, "numbers above 1")
    return float(base)
