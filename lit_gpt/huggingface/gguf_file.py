"""A GGUF file of our model: what llama.cpp, Ollama and LM Studio run.

Weights and sizes are those of the export to transformers; the package gguf says what GGUF calls
them. Written against llama.cpp b11413 (src/llama-vocab.cpp, src/models) and gguf 0.19. The package
gguf is imported only where it is used.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import Tensor

from lit_gpt.errors import UserError
from lit_gpt.generation.sampling import Sampling
from lit_gpt.huggingface.architectures import hf_weights, layout_of
from lit_gpt.huggingface.layouts import Layout
from lit_gpt.huggingface.tokenizer import special_ids, to_hf
from lit_gpt.model import GPT, GPTConfig, rotary_rates
from lit_gpt.text import patterns
from lit_gpt.text.tokenizer import Tokenizer

GGUFType = Literal["f32", "f16", "q8_0"]
ARCHITECTURES = {  # of transformers' model_type: GGUF's
    "gpt2": "gpt2",
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
}
PRE_TOKENIZERS = {  # what llama.cpp calls each way to split text
    patterns.CL100K: "llama-bpe",  # differs only in white space at the end
    patterns.LLAMA3: "llama-bpe",
    patterns.O200K: "gpt-4o",
    patterns.GPT2: "gpt-2",
    patterns.R50K: "gpt-2",
    patterns.QWEN2: "qwen2",
    patterns.SMOLLM: "smollm",
    patterns.CHARACTERS: "llama-bpe",  # finds merges in words, and these stay inside a character
}
WHOLE_PIECES = ("llama-bpe",)  # those that find a piece which no merges lead to
NEVER = b"\xff"  # a byte that no text has: ends generation where the vocabulary has no end of text
NO_MERGE = "\u2581 \u2581"  # llama.cpp wants at least one; no text has this, as bytes are spelled


def import_gguf() -> Any:
    """The package gguf.

    Raises:
        UserError: it is not installed.
    """
    try:
        import gguf
    except ImportError as error:
        raise UserError(
            "GGUF files need the package gguf", hint='install it with pip install -e ".[hf]"'
        ) from error
    return gguf


def check_can_be_gguf(config: GPTConfig, tokenizer: Tokenizer) -> None:
    """Refuses a model that llama.cpp would run differently.

    Raises:
        UserError: the reason.
    """
    layout = layout_of(config)
    if layout.model_type == "gpt2" and config.activation != "gelu_tanh":
        raise UserError(
            f"llama.cpp's GPT-2 computes gelu_tanh whatever the file says, not {config.activation}"
            ", so it would silently write other text",
            hint="train with `style`=modern for GGUF, or export for transformers",
        )
    if layout.model_type not in ARCHITECTURES:
        raise UserError(
            f"a {layout.label} can't be written as GGUF, only {', '.join(ARCHITECTURES)}",
            hint="export for transformers",
        )
    if config.sliding_window is not None and config.sliding_window < config.context_length:
        raise UserError(
            f"llama.cpp's {layout.label} has no sliding window (here of {config.sliding_window} "
            "tokens)",
            hint="export for transformers",
        )
    pre_tokenizer(tokenizer)


def pre_tokenizer(tokenizer: Tokenizer) -> str:
    """What llama.cpp calls the way in which this tokenizer splits text.

    Raises:
        UserError: it has none that gives the same ids.
    """
    name = PRE_TOKENIZERS.get(tokenizer.pattern)
    if name is None:
        raise UserError(
            f"llama.cpp does not split text as this tokenizer does ({tokenizer.pattern[:60]!r})",
            hint="train with `tokenizer`=bpe:4096, for example, or export for transformers",
        )
    if name in WHOLE_PIECES and tokenizer.pattern != patterns.CHARACTERS:
        return name
    ranks = range(len(tokenizer.ranks))
    if alone := [rank for rank in ranks if not tokenizer.is_merged(rank)]:
        raise UserError(
            f"llama.cpp finds no token that merges don't lead to, as {len(alone):,} of this "
            f"tokenizer (the first is {tokenizer.decode(alone[:1])!r})",
            hint="train with `tokenizer`=bpe:4096, for example, or export for transformers",
        )
    return name


def write_gguf(path: Path, model: GPT, tokenizer: Tokenizer, name: str, kind: GGUFType) -> None:
    """Writes the whole file.

    Args:
        name: of the model, which programs show.
        kind: the type of the weights; norms, biases and positions are always f32.

    Raises:
        UserError: a model or tokenizer that llama.cpp can't run; gguf or transformers is missing.
    """
    gguf = import_gguf()
    check_can_be_gguf(model.config, tokenizer)
    layout = layout_of(model.config)
    architecture = ARCHITECTURES[layout.model_type]
    writer = gguf.GGUFWriter(path, architecture)
    try:
        writer.add_name(name)
        add_config(writer, model.config, kind)
        add_tokenizer(writer, tokenizer)
        for tensor_name, values in tensors(model, architecture):
            data, data_type = encoded(values, tensor_name, kind)
            writer.add_tensor(tensor_name, data, raw_dtype=data_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def add_config(writer: Any, config: GPTConfig, kind: GGUFType) -> None:
    """The model's sizes and choices, and how it samples unless told otherwise."""
    gguf = import_gguf()
    types = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "q8_0": "MOSTLY_Q8_0"}
    writer.add_file_type(gguf.LlamaFileType[types[kind]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.context_length)
    writer.add_embedding_length(config.d_model)
    writer.add_block_count(config.num_blocks)
    writer.add_feed_forward_length(config.hidden_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    if config.norm == "rms":
        writer.add_layer_norm_rms_eps(config.norm_eps)
    else:
        writer.add_layer_norm_eps(config.norm_eps)
    if config.position == "rotary":
        writer.add_key_length(config.head_size)
        writer.add_value_length(config.head_size)
        writer.add_rope_dimension_count(config.rotary_size)
        writer.add_rope_freq_base(config.rotary_base)
    if config.rope_scaling == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(config.rope_factor)
    sampling = asdict(Sampling())
    writer.add_sampling_temp(float(sampling["temperature"]))
    writer.add_sampling_top_k(0)  # all, as the server and `lit-gpt generate`
    writer.add_sampling_top_p(float(sampling["top_p"]))
    writer.add_sampling_min_p(0.0)


def add_tokenizer(writer: Any, tokenizer: Tokenizer) -> None:
    """The vocabulary, as GPT-2 spells bytes, its merges, special tokens and chat template."""
    gguf = import_gguf()
    ordinary = tokenizer.tokens[: len(tokenizer.ranks)]
    plain = Tokenizer(tokenizer.name, tokenizer.pattern, ordinary)
    spec = json.loads(to_hf(plain).to_str())
    special = tokenizer.special
    vocab = spec["model"]["vocab"]
    if twice := vocab.keys() & special.keys():
        raise UserError(
            f"the vocabulary has {min(twice)} as an ordinary and as a special token, which GGUF "
            "can't tell apart"
        )
    vocab |= special
    tokens = sorted(vocab, key=vocab.__getitem__)
    assert [vocab[token] for token in tokens] == list(range(tokenizer.vocab_size))
    types = gguf.TokenType
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer(tokenizer))
    writer.add_token_list(tokens)
    kinds = dict.fromkeys(special, types.CONTROL)
    kinds |= dict.fromkeys(tokenizer.visible_names, types.USER_DEFINED)
    writer.add_token_types([kinds.get(token, types.NORMAL) for token in tokens])
    merges = spec["model"]["merges"] or [NO_MERGE]
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in merges])
    ends = end_ids(tokenizer)
    adds = (writer.add_eos_token_id, writer.add_eot_token_id, writer.add_eom_token_id)
    for add, end in zip(adds, ends, strict=False):
        add(end)
    starts = [special[name] for name in tokenizer.start_names]
    pad = special_ids(tokenizer)["pad"]
    writer.add_bos_token_id(starts[0] if starts else ends[0])
    writer.add_pad_token_id(ends[0] if pad is None else pad)
    writer.add_add_bos_token(bool(starts))  # others begin with the text, as in training
    writer.add_add_eos_token(False)
    if tokenizer.chat_template is not None:
        writer.add_chat_template(tokenizer.chat_template)


def end_ids(tokenizer: Tokenizer) -> list[int]:
    """The tokens at which llama.cpp ends, the one that is called EOS first.

    Without any, it would take token 11 for the end, which may be a comma. Then a token of a byte
    that no text has is named instead.
    """
    named = special_ids(tokenizer)["eos"]
    ends = tokenizer.end_ids
    if not ends and NEVER not in tokenizer.ranks:
        raise UserError("the model has no end-of-text token, where llama.cpp could end")
    if not ends:
        return [tokenizer.ranks[NEVER]]
    return sorted(ends, key=lambda i: (i != named, i))


def tensors(model: GPT, architecture: str) -> list[tuple[str, np.ndarray]]:
    """All weights under GGUF's names, (out, in), float32."""
    gguf = import_gguf()
    config = model.config
    layout = layout_of(config)
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(kinds[architecture], config.num_blocks)
    found = []
    for theirs, weight in hf_weights(model).items():
        name = names.get_name(theirs, try_suffixes=(".weight", ".bias"))
        assert name is not None, theirs
        found.append((name, as_gguf(layout, config, name, weight).contiguous().numpy()))
    if config.rope_scaling == "llama3":
        size = config.rotary_size
        plain = rotary_rates(GPTConfig(**asdict(config) | {"rope_scaling": None}))
        factors = (plain / rotary_rates(config)).numpy().astype(np.float32)
        assert factors.shape == (size // 2,)
        found.append((gguf.TENSOR_NAMES[gguf.MODEL_TENSOR.ROPE_FREQS] + ".weight", factors))
    return found


def as_gguf(layout: Layout, config: GPTConfig, name: str, weight: Tensor) -> Tensor:
    """A weight of transformers, in the order in which llama.cpp keeps it."""
    if layout.model_type == "gpt2":  # Conv1D is (in, out)
        is_conv1d = name.startswith("blk.") and weight.ndim == 2
        return weight.t() if is_conv1d else weight
    part = name.split(".")[2] if name.startswith("blk.") else ""
    if ARCHITECTURES[layout.model_type] == "llama" and part in ("attn_q", "attn_k"):
        # Its rotary pairs are neighbours, not halves of the head.
        heads = config.num_heads if part == "attn_q" else config.num_kv_heads
        assert heads is not None
        pairs = weight.view(heads, 2, len(weight) // heads // 2, *weight.shape[1:])
        return pairs.transpose(1, 2).reshape(weight.shape)
    return weight


def encoded(values: np.ndarray, name: str, kind: GGUFType) -> tuple[np.ndarray, Any]:
    """The bytes of a tensor and their type: f32 for vectors and positions, f16 where q8_0's blocks
    of 32 do not fit."""
    gguf = import_gguf()
    types = gguf.GGMLQuantizationType
    if kind == "f32" or values.ndim < 2 or name.startswith("position_embd"):
        return values, types.F32
    if kind == "f16" or values.shape[-1] % 32:
        return values.astype(np.float16), types.F16
    return gguf.quants.quantize(values, types.Q8_0), types.Q8_0
