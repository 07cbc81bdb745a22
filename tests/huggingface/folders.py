"""Small folders made by transformers itself: GPT-2 and Qwen3 with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    AddedToken,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

KINDS = ("gpt2", "qwen3")
QWEN_PATTERN = (  # of Qwen3's tokenizer.json
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEXT = (
    "The cat sat on the mat, and it's raining: 猫坐在垫子上，外面在下雨。 We'll see 12345 words!\n"
    "def f(x):\n    return x  # naïve café\n\n\tthe mat, the cat; they've  sat there.\r\n"
) * 40
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def split_by(kind: str) -> Any:
    if kind == "gpt2":
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    split = pre_tokenizers.Split(Regex(QWEN_PATTERN), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([split, byte_level])


def make_tokenizer(kind: str, vocab_size: int = 400) -> PreTrainedTokenizerFast:
    """Trained on TEXT; its special tokens come first, so that all ids differ from ours."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = split_by(kind), decoders.ByteLevel()
    if kind == "qwen3":
        tokenizer.normalizer = normalizers.NFC()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=list(SPECIALS), initial_alphabet=alphabet,
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator([TEXT], trainer)
    if kind == "qwen3":
        tokenizer.add_tokens([AddedToken("<think>", normalized=False)])  # as Qwen3 has some
        eos = {"eos_token": "<|im_end|>"}
    else:
        eos = {"eos_token": "<|endoftext|>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **eos
    )


def make_model(kind: str, vocab_size: int = 420, **changes: Any) -> torch.nn.Module:
    """Random weights, larger than at the start of training, biases and norms too."""
    torch.manual_seed(0)
    if kind == "gpt2":
        sizes = {"n_positions": 48, "n_embd": 32, "n_layer": 2, "n_head": 4}
        ends = {"bos_token_id": 0, "eos_token_id": 0}
        config = GPT2Config(**{"vocab_size": vocab_size, **sizes, **ends, **changes})
        model = GPT2LMHeadModel(config)
    else:
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 56}
        sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12}
        rest = {"max_position_embeddings": 4096, "tie_word_embeddings": True}
        rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
        config = Qwen3Config(**{"vocab_size": vocab_size, **sizes, **rest, **rope, **changes})
        model = Qwen3ForCausalLM(config)
    for name, weight in model.named_parameters():
        around = 1.0 if "norm" in name or ("ln_" in name and name.endswith("weight")) else 0.0
        torch.nn.init.normal_(weight, around, 0.15)
    return model.eval()


def make_folder(folder: Path, kind: str, shards: str = "5GB", **changes: Any) -> Path:
    """config.json, model.safetensors, tokenizer.json and what else transformers writes."""
    make_model(kind, **changes).save_pretrained(folder, max_shard_size=shards)
    make_tokenizer(kind).save_pretrained(folder)
    return folder
