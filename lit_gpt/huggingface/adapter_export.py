"""Writes LoRA adapters in peft's format, and has peft load them. Written against peft 0.21."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from lit_gpt.checkpoint import Checkpoint
from lit_gpt.errors import UserError
from lit_gpt.huggingface.adapter import CONFIG, PREFIX, WEIGHTS
from lit_gpt.huggingface.architectures import by_head, layout_of
from lit_gpt.huggingface.export_check import check_export
from lit_gpt.huggingface.layouts import GPT2, GPT_NEOX
from lit_gpt.lora import LoraConfig, LoraLinear
from lit_gpt.model import GPT
from lit_gpt.text.corpus import Corpus
from lit_gpt.text.tokenizer import Tokenizer


def import_peft() -> Any:
    """The module, for `adapter`; a UserError where it is missing."""
    try:
        import peft
    except ImportError as error:
        problem = "needs peft, which checks the adapter"
        raise UserError(problem, field="adapter", hint="pip install peft") from error
    return peft


def check_can_be_adapter(checkpoint: Checkpoint, is_gguf: bool) -> None:
    """Refuses a checkpoint without adapters, and another format than peft's."""
    import_peft()
    if is_gguf:
        problem = "is a folder of peft, not a GGUF file"
        raise UserError(problem, field="adapter", hint="leave out `format`, or this")
    if checkpoint.lora is None:
        problem = f"{checkpoint.path} has no adapters: it was trained without LoRA"
        raise UserError(problem, field="adapter", hint="leave it out to export the model")


def adapters_of(model: GPT) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yields the name of each adapted module in transformers, its A (r, in) and B (out, r).

    Where transformers has one layer of which ours has three parts, its rank is three times ours.
    """
    layout = layout_of(model.config)
    for module, names in layout.modules(model.config.num_blocks):
        layer = model.get_submodule(module)
        if not isinstance(layer, LoraLinear):
            continue
        if len(names) == len(layer.lora_a):
            yield from zip(names, layer.lora_a, layer.lora_b, strict=True)
            continue
        a, b = layer.factors()
        if layout is GPT_NEOX:
            b = by_head(b, len(layer.lora_a), model.config.num_heads)
        yield names[0], a, b


def write_adapter(folder: Path, model: GPT, config: LoraConfig, base: str | None) -> None:
    """Writes both files.

    Args:
        model: with adapters.
        base: where peft finds the model that they adapt; None: its users say so.
    """
    from safetensors.torch import save

    layout = layout_of(model.config)
    weights: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}  # by the name of a module within its block
    for name, a, b in adapters_of(model):
        for part, weight in (("A", a), ("B", b)):
            key = f"{PREFIX}{layout.prefix}{name}.lora_{part}.weight"
            weights[key] = weight.detach().contiguous()
        ranks[re.sub(r"^.*?\d+\.", "", name)] = len(a)
    others = {name: rank for name, rank in ranks.items() if rank != config.rank}
    alpha = int(config.alpha) if config.alpha == int(config.alpha) else config.alpha
    fields = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": config.rank,
        "lora_alpha": alpha,
        "lora_dropout": config.dropout,
        "target_modules": sorted(ranks),
        "rank_pattern": others,
        "alpha_pattern": {name: alpha * rank / config.rank for name, rank in others.items()},
        "fan_in_fan_out": layout is GPT2,
        "bias": "none",
        "inference_mode": True,
    }
    text = json.dumps(fields, indent=2, ensure_ascii=False) + "\n"
    (folder / CONFIG).write_text(text, encoding="utf-8")
    (folder / WEIGHTS).write_bytes(save(weights, metadata={"format": "pt"}))


def base_folder(checkpoint: Checkpoint) -> str | None:
    """The Hugging Face folder that the adapters were trained on, as peft finds it from anywhere.

    Returns:
        None if they were trained on something else: a checkpoint, a GGUF file, or a folder with an
        adapter, of which transformers would load the adapter and the model in its config.
    """
    source = checkpoint.hyperparameters.get("init_from")
    if not isinstance(source, str):
        return None
    folder = Path(os.path.expanduser(source))
    if not (folder / "config.json").is_file() or (folder / CONFIG).exists():
        return None
    return str(folder.resolve())


def write_checked_adapter(
    folder: Path,
    checkpoint: Checkpoint,
    model: GPT,
    corpus: Corpus,
    fraction: float,
    write_folder: Callable[[Path, GPT, Tokenizer], None],
) -> list[str]:
    """Writes an adapter, has peft load it with the exported base, and compares them with the model.

    Args:
        model: with adapters.
        corpus, fraction: as for `check_export`.
        write_folder: exports a model.

    Returns:
        A line for each comparison.

    Raises:
        UserError: something differs.
    """
    config = checkpoint.lora
    assert config is not None
    write_adapter(folder, model, config, base_folder(checkpoint))
    base = folder.parent / "base"
    base.mkdir()
    write_folder(base, Checkpoint.read(checkpoint.base_path).build()[0], corpus.tokenizer)
    load = import_peft().PeftModel.from_pretrained
    return check_export(base, model, corpus, fraction, lambda theirs: load(theirs, folder))
