"""How our GPT corresponds to architectures of transformers, and our weights to theirs.

The values of a config decide which of them it is, not the name of its style.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lit_gpt.errors import UserError
from lit_gpt.huggingface.layouts import GPT2, GPT_NEOX, LAYOUTS, LLAMA, QWEN2, Layout
from lit_gpt.model import GPT, GPTConfig

TOLERANCE = 1e-4  # between logits; where they exceed 1, times the largest


def layout_of(config: GPTConfig) -> Layout:
    """The architecture that computes what this model does.

    Raises:
        UserError: none does.
    """
    misfits = []
    for layout in LAYOUTS.values():
        choices = dict(layout.choices)
        if "num_kv_heads" not in layout.sizes:
            choices["num_kv_heads"] = (config.num_heads,)
        if "head_size" not in layout.sizes:
            choices["head_size"] = (config.d_model / config.num_heads,)
        if layout is LLAMA and config.d_model % config.num_heads:  # Mistral takes any
            choices["d_model"] = (f"divisible by {config.num_heads}",)
        needs = [
            f"{name} {' or '.join(map(str, allowed))} instead of {getattr(config, name)}"
            for name, allowed in choices.items()
            if getattr(config, name) not in allowed
        ]
        if not needs:
            return layout
        misfits.append((len(needs), f"{layout.label} needs {' and '.join(needs)}"))
    if config.smear or config.bigram_rows:
        raise UserError(
            "no architecture of transformers adds to a token's embedding what the one before it "
            f"says (smear {config.smear}, bigram_rows {config.bigram_rows})",
            hint="train a model that is to be exported with `style`=modern",
        )
    _, closest = min(misfits, key=lambda misfit: misfit[0])
    labels = ", ".join(layout.label for layout in LAYOUTS.values())
    raise UserError(
        f"the model is none of {labels}: {closest}",
        hint="only such models can be exported, for example those of the unchanged classic and "
        "modern styles",
    )


def is_biased(layout: Layout, config: GPTConfig, module: str) -> bool:
    """Whether this module of ours has a bias in the architecture."""
    if layout in (GPT2, GPT_NEOX):
        return module != "embedding"
    if module.endswith("attention.qkv") or module.endswith("attention.out"):
        return module.endswith("qkv") if layout is QWEN2 else has_attention_bias(config)
    return ".feed_forward." in module and bool(config.mlp_bias)


def has_attention_bias(config: GPTConfig) -> bool:
    """Whether all linear layers of attention are to have biases, as those of Llama alike."""
    return bool(config.bias or config.qkv_bias)


def as_conv1d(layout: Layout, module: str, weight: Tensor) -> Tensor:
    """Transposed if it belongs to one of GPT-2's Conv1D layers, whose weight is (in, out)."""
    is_conv1d = layout is GPT2 and module.startswith("blocks.") and weight.ndim == 2
    return weight.t() if is_conv1d else weight


def by_head(tensor: Tensor, outer: int, inner: int) -> Tensor:
    """Rows of the first dimension, (outer, inner, D), reordered to (inner, outer, D).

    GPT-NeoX has query, key and value of a head side by side, we have all heads of each.
    """
    parts = tensor.view(outer, inner, len(tensor) // (outer * inner), -1)
    return parts.transpose(0, 1).reshape(tensor.shape)


def hf_weights(model: GPT) -> dict[str, Tensor]:
    """A model's weights as they are called in transformers' files, each in memory of its own.

    Sinusoids become GPT-2's table of learned positions, missing biases zeros. A tied output layer
    has no weight of its own.

    Raises:
        UserError: no architecture of transformers fits the model.
    """
    config = model.config
    layout = layout_of(config)
    ours = model.state_dict()
    theirs: dict[str, Tensor] = {}
    kv_heads = config.num_kv_heads or config.num_heads
    for module, names in layout.modules(config.num_blocks):
        tensors = {"weight": ours[f"{module}.weight"]}
        if is_biased(layout, config, module):
            zeros = tensors["weight"].new_zeros(len(tensors["weight"]))
            tensors["bias"] = ours.get(f"{module}.bias", zeros)
        # Query, key and value, or gate and up, or the whole.
        shares = [config.num_heads, kv_heads, kv_heads] if len(names) == 3 else [1] * len(names)
        for kind, tensor in tensors.items():
            if layout is GPT_NEOX and module.endswith("qkv"):
                tensor = by_head(tensor, 3, config.num_heads)
            parts = tensor.split([len(tensor) * share // sum(shares) for share in shares])
            for name, part in zip(names, parts, strict=True):
                theirs[f"{layout.prefix}{name}.{kind}"] = as_conv1d(layout, module, part)
    if model.position is not None:  # always so in GPT-2, never in the others
        theirs[f"{layout.prefix}wpe.weight"] = model.position.detach()
    if not config.tie_embeddings:
        theirs[f"{layout.head}.weight"] = ours["head.weight"]
    contiguous = torch.contiguous_format
    return {name: weight.clone(memory_format=contiguous) for name, weight in theirs.items()}


def gpt_weights(theirs: Mapping[str, Tensor], config: GPTConfig) -> dict[str, Tensor]:
    """The float32 state of a GPT of that config, from all the weights of one in transformers."""
    layout = layout_of(config)
    theirs = {name.removeprefix(layout.prefix): w.float() for name, w in theirs.items()}
    ours = {}
    for module, names in layout.modules(config.num_blocks):
        kinds = ("weight", "bias") if is_biased(layout, config, module) else ("weight",)
        for kind in kinds:
            parts = [as_conv1d(layout, module, theirs[f"{name}.{kind}"]) for name in names]
            whole = torch.cat(parts)
            if layout is GPT_NEOX and module.endswith("qkv"):
                whole = by_head(whole, config.num_heads, 3)
            ours[f"{module}.{kind}"] = whole
    if layout is GPT2:
        ours["position"] = theirs["wpe.weight"]
    head = theirs.get("lm_head.weight", ours["embedding.weight"])
    ours["head.weight"] = theirs.get(f"{layout.head}.weight", head)
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
