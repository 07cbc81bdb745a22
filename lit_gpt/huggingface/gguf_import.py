"""A GGUF file as the folder that transformers would write, from which a run may start.

The file may come from a stranger. The package gguf reads it, as plain numbers and texts; what is
made of it is then checked like any other folder.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lit_gpt.command import resource_error
from lit_gpt.errors import UserError
from lit_gpt.huggingface.architectures import layout_of
from lit_gpt.huggingface.config import hf_config
from lit_gpt.huggingface.gguf_file import (
    ARCHITECTURES,
    NO_MERGE,
    PRE_TOKENIZERS,
    import_gguf,
)
from lit_gpt.huggingface.layouts import LAYOUTS, Layout
from lit_gpt.huggingface.split_pattern import in_one_line, onig_pattern
from lit_gpt.model import GPTConfig, rotary_rates
from lit_gpt.storage import cache_folder, remove_abandoned, temporary_folder
from lit_gpt.text import patterns

SUFFIX = ".gguf"
VERSION = 2  # of what is made of a file
PATTERNS = {name: pattern for pattern, name in PRE_TOKENIZERS.items()}
PATTERNS |= {"llama-bpe": patterns.LLAMA3, "gpt-2": patterns.GPT2}  # of several, the usual one
STARTS = ("llama-bpe",)  # those with which a text starts with BOS unless the file says otherwise
SIZES = {  # our sizes, and GGUF's names, after that of the architecture
    "context_length": "context_length",
    "d_model": "embedding_length",
    "num_blocks": "block_count",
    "num_heads": "attention.head_count",
    "hidden_size": "feed_forward_length",
}
STYLES: dict[str, dict[str, Any]] = {
    "gpt2": {"style": "classic", "position": "learned", "activation": "gelu_tanh"},
    "llama": {"style": "modern", "qk_norm": False},
    "qwen2": {"style": "modern", "qk_norm": False, "qkv_bias": True},
    "qwen3": {"style": "modern"},
}
LLAMA3_FACTORS = (8.0, 32.0)  # of Llama 3.1, and of the small ones of 3.2
LLAMA3_CONTEXT = 8192  # before the scaling


class Unsupported(Exception):
    """Says why a file can't become one of our models."""


def is_gguf(source: str | Path) -> bool:
    path = Path(os.path.expanduser(source))
    return path.suffix == SUFFIX and path.is_file()


def as_folder(source: str | Path) -> Path:
    """The folder itself, or for a GGUF file one in the cache, made when it is first asked for.

    Raises:
        UserError: the file can't be read, or its model can't be imported; or there is no room
            for it.
    """
    path = Path(os.path.expanduser(source))
    if not is_gguf(path):
        return path
    import_gguf()
    stat = path.stat()
    key = json.dumps([VERSION, str(path.resolve()), stat.st_size, stat.st_mtime_ns])
    root = cache_folder(None) / "gguf"
    folder = root / hashlib.sha256(key.encode()).hexdigest()[:16]
    if folder.is_dir():
        return folder
    try:
        root.mkdir(parents=True, exist_ok=True)
        remove_abandoned(root)
        with temporary_folder(root) as work:
            made = work / folder.name
            made.mkdir()
            write_folder(made, open_gguf(path))
            try:
                made.rename(folder)
            except OSError:
                if not folder.is_dir():  # else another process was faster
                    raise
    except Unsupported as error:
        raise unusable(path, str(error)) from error
    except Exception as error:  # a stranger's file can raise anything
        problem = f"can't be read ({in_one_line(error)})"
        raise resource_error(error) or unusable(path, problem) from error
    return folder


def open_gguf(path: Path) -> Any:
    """A GGUFReader that reads nothing beyond the end, however long the file says that a list is."""

    class Reader(import_gguf().GGUFReader):  # type: ignore[misc]
        def _get(self, offset: int, dtype: Any, count: int = 1, **options: Any) -> np.ndarray:
            if int(offset) + int(count) * np.dtype(dtype).itemsize > len(self.data):
                raise ValueError("it is truncated")
            return super()._get(offset, dtype, count, **options)

    return Reader(path)


def unusable(path: Path, problem: str) -> UserError:
    return UserError(problem, field="init_from", value=str(path), hint="use another model")


def write_folder(folder: Path, reader: Any) -> None:
    """Writes model.safetensors and the JSON files that go with it."""
    from safetensors.torch import save_file

    fields = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    config = config_of(fields, tensors)
    layout = layout_of(config)
    if layout is not LAYOUTS[fields["general.architecture"]]:
        raise Unsupported("its biases are not those of its architecture")
    ends = [fields.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    contents = {
        "config": hf_config(config),
        "generation_config": {"eos_token_id": [i for i in ends if i is not None]},
        "tokenizer": tokenizer_of(fields),
        "tokenizer_config": tokenizer_config_of(fields),
    }
    for name, content in contents.items():
        text = json.dumps(content, ensure_ascii=False)
        (folder / f"{name}.json").write_text(text, encoding="utf-8")
    save_file(weights_of(layout, config, tensors), folder / "model.safetensors")


def config_of(fields: Mapping[str, Any], tensors: Mapping[str, Any]) -> GPTConfig:
    """The model's sizes and choices."""
    kind = fields["general.architecture"]
    if kind not in STYLES:
        raise Unsupported(f"its architecture is {kind!r}, not one of {', '.join(STYLES)}")
    given = {name.removeprefix(f"{kind}."): rounded(value) for name, value in fields.items()}
    for name in ("rope.scaling.type", "attention.sliding_window", "expert_count"):
        if given.get(name) not in (None, 0, "none"):
            raise Unsupported(f"its {name} is {given[name]!r}, which is not supported")
    ours: dict[str, Any] = {name: int(given[theirs]) for name, theirs in SIZES.items()}
    heads = ours["num_heads"]
    ours |= STYLES[kind]
    ours["vocab_size"] = int(tensors["token_embd.weight"].shape[-1])
    ours["tie_embeddings"] = "output.weight" not in tensors
    if kind == "gpt2":
        return GPTConfig(**ours, norm_eps=given["attention.layer_norm_epsilon"])
    ours["num_kv_heads"] = int(given.get("attention.head_count_kv", heads))
    ours["head_size"] = int(given.get("attention.key_length", ours["d_model"] // heads))
    ours["norm_eps"] = given["attention.layer_norm_rms_epsilon"]
    ours["rotary_base"] = given.get("rope.freq_base", 10_000.0)
    if kind == "llama":
        ours["bias"] = "blk.0.attn_output.bias" in tensors
        ours["qkv_bias"] = "blk.0.attn_q.bias" in tensors
        ours["mlp_bias"] = "blk.0.ffn_down.bias" in tensors
    return scaled(GPTConfig(**ours), tensors)


def rounded(value: Any) -> Any:
    """1e-6, for example, of which the file has the nearest float32, a longer number."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def scaled(config: GPTConfig, tensors: Mapping[str, Any]) -> GPTConfig:
    """With the scaling of Llama 3 that the file's frequencies have; they don't say how."""
    if "rope_freqs.weight" not in tensors:
        return config
    factors = torch.from_numpy(values_of(tensors["rope_freqs.weight"]))
    for factor in LLAMA3_FACTORS:
        choice = {"rope_scaling": "llama3", "rope_factor": factor}
        choice["rope_original_context"] = LLAMA3_CONTEXT
        changed = GPTConfig(**vars(config) | choice)
        expected = rotary_rates(config) / rotary_rates(changed)
        if factors.shape == expected.shape and torch.allclose(factors, expected, rtol=1e-4):
            return changed
    raise Unsupported("its rotary frequencies are scaled in an unknown way (rope_freqs.weight)")


def values_of(tensor: Any) -> np.ndarray:
    """A tensor of the file as float32, (out, in)."""
    values = import_gguf().quants.dequantize(tensor.data, tensor.tensor_type)
    return np.array(values, dtype=np.float32)


def weights_of(layout: Layout, config: GPTConfig, tensors: Mapping[str, Any]) -> dict[str, Tensor]:
    """All weights under the names of transformers' files."""
    gguf = import_gguf()
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    architecture = ARCHITECTURES[layout.model_type]
    names = gguf.get_tensor_name_map(kinds[architecture], config.num_blocks)
    modules = [n for _, theirs in layout.modules(config.num_blocks) for n in theirs]
    candidates = [f"{layout.prefix}{name}" for name in modules]
    candidates += [layout.head, f"{layout.prefix}wpe"]
    found: dict[str, Tensor] = {}
    used = {"rope_freqs.weight"}
    for theirs in candidates:
        for kind in ("weight", "bias"):
            name = f"{names.get_name(theirs)}.{kind}"
            if name in tensors:
                used.add(name)
                weight = torch.from_numpy(values_of(tensors[name]))
                found[f"{theirs}.{kind}"] = from_gguf(layout, config, name, weight).contiguous()
    if unknown := tensors.keys() - used:
        raise Unsupported(f"it has a tensor {min(unknown)}, which is not supported")
    return found


def from_gguf(layout: Layout, config: GPTConfig, name: str, weight: Tensor) -> Tensor:
    """A weight in transformers' order: the inverse of `gguf_file.as_gguf`."""
    if layout.model_type == "gpt2":  # Conv1D is (in, out)
        is_conv1d = name.startswith("blk.") and weight.ndim == 2
        return weight.t() if is_conv1d else weight
    part = name.split(".")[2] if name.startswith("blk.") else ""
    if ARCHITECTURES[layout.model_type] == "llama" and part in ("attn_q", "attn_k"):
        heads = config.num_heads if part == "attn_q" else config.num_kv_heads
        assert heads is not None
        pairs = weight.view(heads, len(weight) // heads // 2, 2, *weight.shape[1:])
        return pairs.transpose(1, 2).reshape(weight.shape)
    return weight


def tokenizer_of(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The content of tokenizer.json."""
    kind, pre = (fields.get(f"tokenizer.ggml.{name}") for name in ("model", "pre"))
    if kind != "gpt2" or pre not in PATTERNS:
        known = ", ".join(PATTERNS)
        raise Unsupported(f"its tokenizer is {kind!r}, {pre!r}, not 'gpt2' with one of {known}")
    tokens = fields["tokenizer.ggml.tokens"]
    types = import_gguf().TokenType
    special = {types.CONTROL, types.USER_DEFINED}
    kinds = fields.get("tokenizer.ggml.token_type") or [types.NORMAL] * len(tokens)
    pairs = list(zip(tokens, kinds, strict=True))
    added = [
        {"id": i, "content": t, "special": k == types.CONTROL}
        for i, (t, k) in enumerate(pairs)
        if k in special
    ]
    bos = fields.get("tokenizer.ggml.bos_token_id")
    has_start = fields.get("tokenizer.ggml.add_bos_token", pre in STARTS)
    split = {"type": "Split", "pattern": {"Regex": onig_pattern(PATTERNS[pre])}}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    return {
        "version": "1.0",
        "added_tokens": added,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                split | {"behavior": "Isolated", "invert": False},
                byte_level | {"use_regex": False},
            ],
        },
        "post_processor": starting_with(tokens[bos], bos)
        if has_start and bos is not None
        else None,
        "model": {
            "type": "BPE",
            "ignore_merges": pre == "llama-bpe",
            "vocab": {t: i for i, (t, k) in enumerate(pairs) if k not in special},
            "merges": [m for m in fields["tokenizer.ggml.merges"] if m != NO_MERGE],
        },
    }


def starting_with(name: str, token: int) -> dict[str, Any]:
    """What puts a special token before each text, in tokenizer.json."""
    start = {"SpecialToken": {"id": name, "type_id": 0}}
    first, second = ({"Sequence": {"id": which, "type_id": 0}} for which in "AB")
    return {
        "type": "TemplateProcessing",
        "single": [start, first],
        "pair": [start, first, second],
        "special_tokens": {name: {"id": name, "ids": [token], "tokens": [name]}},
    }


def tokenizer_config_of(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The content of tokenizer_config.json: what special tokens are for."""
    tokens = fields["tokenizer.ggml.tokens"]
    roles = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
    ids = {role: fields.get(f"tokenizer.ggml.{name}_token_id") for role, name in roles.items()}
    config = {f"{role}_token": tokens[i] for role, i in ids.items() if i is not None}
    template = fields.get("tokenizer.chat_template")
    return config if template is None else config | {"chat_template": template}
