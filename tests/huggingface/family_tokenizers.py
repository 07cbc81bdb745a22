"""Small tokenizers of the families, put together from the same steps as the real ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, processors
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence, Split
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from tests.huggingface.folders import QWEN_PATTERN, TEXT

LLAMA3_PATTERN = QWEN_PATTERN.replace(r"\p{N}", r"\p{N}{1,3}", 2).replace(
    r"[^\r\n\p{L}\p{N}{1,3}]", r"[^\r\n\p{L}\p{N}]"
)
CHATML = (  # as SmolLM2's, with a default system prompt
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are small.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA_CHAT = (  # as Llama 3's
    "{{- bos_token }}{%- for message in messages %}"
    "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{{- message['content'] | trim + '<|eot_id|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}"
    "{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
)
CHATML_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
LLAMA_SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>"]
LLAMA_SPECIAL += ["<|end_header_id|>", "<|eot_id|>"]
MISSING = (0x04, 0x06, 0x13, 0x14, 0x16, 0x1D, 0xC0, 0xC1, *range(0xF1, 0x100))  # SmolLM2's


def by_regex(pattern: str) -> Any:
    return [Split(Regex(pattern), "isolated"), ByteLevel(False, use_regex=False)]


STEPS = {
    "smollm2": [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)],
    "whole_digits": [Digits(individual_digits=False), ByteLevel(add_prefix_space=False)],
    "llama3": by_regex(LLAMA3_PATTERN),
    "qwen2": by_regex(QWEN_PATTERN),
    "neox": [ByteLevel(add_prefix_space=False)],
}
FAMILIES = tuple(STEPS)


def family_tokenizer(family: str) -> PreTrainedTokenizerFast:
    """Trained on TEXT, with the special tokens and the template of its family."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=family == "llama3"))
    steps = STEPS[family]
    tokenizer.pre_tokenizer = steps[0] if len(steps) == 1 else Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    if family in ("qwen2", "neox"):
        tokenizer.normalizer = normalizers.NFC()
    alphabet = set(ByteLevel.alphabet())
    if family == "smollm2":
        alphabet -= {BYTE_CHARS[byte] for byte in MISSING}
    special = LLAMA_SPECIAL if family == "llama3" else CHATML_SPECIAL
    if family == "neox":
        special = ["<|endoftext|>", "<|padding|>"]
    trainer = BpeTrainer(
        vocab_size=600, special_tokens=special, initial_alphabet=sorted(alphabet),
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator([TEXT * 2], trainer)
    roles = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
    template: str | None = CHATML
    if family == "neox":
        runs = [" " * length for length in range(24, 1, -1)]
        tokenizer.add_tokens([AddedToken(run, normalized=True) for run in runs])
        roles, template = dict.fromkeys(roles, "<|endoftext|>"), None
    if family == "llama3":
        bos = tokenizer.token_to_id("<|begin_of_text|>")
        first = processors.TemplateProcessing(
            single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", bos)]
        )
        level = processors.ByteLevel(trim_offsets=False)
        tokenizer.post_processor = processors.Sequence([level, first])
        roles, template = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}, LLAMA_CHAT
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, chat_template=template, clean_up_tokenization_spaces=False,
        **roles,
    )  # fmt: skip


def byte_chars() -> dict[int, str]:
    """How ByteLevel writes each byte: printable ones of Latin-1 as they are."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = (byte for byte in range(256) if byte not in shown)
    return {byte: chr(byte) for byte in shown} | {
        byte: chr(256 + i) for i, byte in enumerate(others)
    }


BYTE_CHARS = byte_chars()


def save_family(family: str, folder: Path) -> Path:
    family_tokenizer(family).save_pretrained(folder)
    return folder
