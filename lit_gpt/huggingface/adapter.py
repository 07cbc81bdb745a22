"""Reads a LoRA adapter of peft, which may come from a stranger.

Nothing but tensors, whose shapes are compared with the model's, and numbers: no path or pattern in
its config is used. Written against peft 0.21.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_gpt.huggingface.folder import FLOATS, MAX_CONFIG, read_json

if TYPE_CHECKING:
    from torch import Tensor

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."  # of all names in peft's files
NAME = re.compile(r"base_model\.model\.([\w.]+)\.lora_([AB])\.weight")
READ = {"peft_type", "bias", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora"}
HARMLESS = {  # in an adapter that is trained
    *("task_type", "peft_version", "auto_mapping", "base_model_name_or_path", "revision"),
    *("inference_mode", "target_modules", "exclude_modules", "layers_to_transform"),
    *("layers_pattern", "lora_dropout", "fan_in_fan_out", "megatron_core", "qalora_group_size"),
    *("loftq_config", "ensure_weight_tying"),
}
INITIAL = (None, True, False, "gaussian", "orthogonal")  # others change the frozen weights too


def merge_adapter(
    folder: Path, weights: dict[str, Tensor], prefix: str, is_transposed: bool
) -> dict[str, Tensor]:
    """The weights of a folder's model in transformers, with its adapter's products added.

    Args:
        prefix: of names, which some files lack.
        is_transposed: whether adapted weights are (in, out), as those of GPT-2.

    Raises:
        ValueError, OSError, SafetensorError: the adapter is damaged, does not belong to these
            weights or is of another kind.
    """
    fields = read_json(folder / CONFIG, MAX_CONFIG)
    check_fields(fields)
    merged = dict(weights)
    for module, pair in read_pairs(folder).items():
        if pair.keys() != {"A", "B"}:
            raise ValueError(f"{module} has half an adapter")
        a, b = pair["A"].float(), pair["B"].float()
        name = f"{module}.weight"
        name = name if name in merged else name.removeprefix(prefix)
        weight = merged.get(name)
        shape = (len(b), *a.shape[1:])
        if weight is None or tuple(weight.shape) != (shape[::-1] if is_transposed else shape):
            raise ValueError(f"the adapter of {module} does not fit the model")
        if a.ndim != 2 or b.ndim != 2 or len(a) != b.size(1):
            raise ValueError(f"the two matrices of {module}'s adapter do not fit each other")
        product = scale_of(module, len(a), fields) * b @ a  # (out, in)
        merged[name] = weight.float() + (product.t() if is_transposed else product)
    return merged


def check_fields(fields: Mapping[str, Any]) -> None:
    """Refuses adapters that compute more than LoRA does."""
    needed = {"peft_type": "LORA", "bias": "none"}
    for name, value in needed.items():
        if fields.get(name, value) != value:
            raise ValueError(f"{name} is {fields[name]!r}, not {value!r}")
    initial = fields.get("init_lora_weights")
    if initial not in list(INITIAL):
        raise ValueError(f"init_lora_weights is {initial!r}, which changes the model itself")
    others = fields.keys() - READ - HARMLESS - {"init_lora_weights"}
    if used := sorted(name for name in others if fields[name]):
        raise ValueError(f"it uses {', '.join(used)}, which lit_gpt does not implement")


def read_pairs(folder: Path) -> dict[str, dict[str, Tensor]]:
    """A and B of each module, by its name."""
    from safetensors import safe_open

    if not (folder / WEIGHTS).is_file():
        raise ValueError(f"no such file: {WEIGHTS}")
    pairs: dict[str, dict[str, Tensor]] = {}
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - not a dict
            match = NAME.fullmatch(name)
            if match is None or file.get_slice(name).get_dtype() not in FLOATS:
                raise ValueError(f"{name} is not a matrix of LoRA")
            pairs.setdefault(match[1], {})[match[2]] = file.get_tensor(name)
    return pairs


def scale_of(module: str, rank: int, fields: Mapping[str, Any]) -> float:
    """By how much the product of a module's matrices is multiplied."""
    alpha = fields.get("lora_alpha", 8)
    for pattern, value in (fields.get("alpha_pattern") or {}).items():
        if not re.fullmatch(r"[\w.]+", pattern):
            raise ValueError(f"alpha_pattern has {pattern!r}, not the name of a module")
        if module == pattern or module.endswith(f".{pattern}"):
            alpha = value
            break
    return float(alpha / (math.sqrt(rank) if fields.get("use_rslora") else rank))
