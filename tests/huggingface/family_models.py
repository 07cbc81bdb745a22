"""Small models of the families, as their own config.json describes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.huggingface.family_tokenizers import save_family

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"intermediate_size": 56, "max_position_embeddings": 256}
GROUPED = SIZES | {"num_key_value_heads": 2}
LLAMA3 = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 64}
MODELS: dict[str, dict[str, Any]] = {  # the fields that are not the defaults of transformers
    "smollm2": GROUPED
    | {"model_type": "llama", "rms_norm_eps": 1e-5, "tie_word_embeddings": True}
    | {"rope_theta": 100_000.0},
    "llama3": GROUPED
    | {"model_type": "llama", "rms_norm_eps": 1e-5, "head_dim": 12, "rope_theta": 500_000.0}
    | {"rope_scaling": LLAMA3},
    "qwen2": GROUPED
    | {"model_type": "qwen2", "rope_theta": 1e6, "sliding_window": 8, "use_sliding_window": False},
    "mistral": GROUPED | {"model_type": "mistral", "rms_norm_eps": 1e-5, "sliding_window": 12},
    "neox": SIZES
    | {"model_type": "gpt_neox", "rotary_pct": 0.25, "rotary_emb_base": 10_000, "hidden_size": 64},
}
TOKENIZERS = {"mistral": "whole_digits"}  # where it has none of its own


def family_model(family: str, vocab_size: int = 640, **changes: Any) -> torch.nn.Module:
    """Random weights, larger than at the start of training, biases and norms too."""
    torch.manual_seed(0)
    fields = {"vocab_size": vocab_size, **MODELS[family], **changes}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields))
    for name, weight in model.named_parameters():
        torch.nn.init.normal_(weight, 1.0 if "norm" in name else 0.0, 0.15)
    return model.eval()


def family_folder(folder: Path, family: str, **changes: Any) -> Path:
    """config.json, model.safetensors, tokenizer.json and what else transformers writes."""
    family_model(family, **changes).save_pretrained(folder)
    return save_family(TOKENIZERS.get(family, family), folder)
