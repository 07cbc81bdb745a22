"""Conversations, and the tokenizer of a chat model: ours, and the same one of transformers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lit_gpt.text.tokenizer import SINGLE_BYTES, Tokenizer

USER, ASSISTANT = "user", "assistant"
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN3 = (  # as Qwen3's, without tools: earlier answers lose their thoughts
    "{%- set ns = namespace(last=0) %}{%- for m in messages %}{%- if m.role == 'user' %}"
    "{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}"
    "{%- for m in messages %}{%- set content = m.content %}{%- set thoughts = '' %}"
    "{%- if m.role == 'assistant' and '</think>' in content %}"
    "{%- set thoughts = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{%- set content = content.split('</think>')[-1].lstrip('\n') %}{%- endif %}"
    "{{- '<|im_start|>' + m.role + '\n' }}"
    "{%- if m.role == 'assistant' and loop.index0 > ns.last and (loop.last or thoughts) %}"
    "{{- '<think>\n' + thoughts + '\n</think>\n\n' }}{%- endif %}"
    "{{- content + '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
THOUGHTS = ["<think>", "</think>"]
GENERATION = (  # says where answers are, as transformers' return_assistant_tokens_mask wants it
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}{{ '\n' }}{% else %}"
    "{{ m['content'] }}<|im_end|>{{ '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def turns(*texts: str) -> list[dict[str, str]]:
    """Messages of the user and the assistant in turn."""
    return [{"role": (USER, ASSISTANT)[i % 2], "content": text} for i, text in enumerate(texts)]


def write_rows(path: Path, rows: list[Any]) -> Path:
    lines = (f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows)
    path.write_text("".join(lines), encoding="utf-8")
    return path


def write_chats(path: Path, number: int = 60) -> Path:
    """Answers of 1 to 52 characters, so that windows have unequal numbers of targets."""
    answers = ("1 2 3 4 5 6 7"[: 1 + i % 13] * (1 + i % 4) for i in range(number))
    rows = [{"messages": turns(f"Count to {i % 7}", x)} for i, x in enumerate(answers)]
    return write_rows(path, rows)


def chat_tokenizer(template: str | None = CHATML, more: Sequence[str] = ()) -> Tokenizer:
    """A token for each byte, those of ChatML, and more special ones."""
    plain = Tokenizer("bytes", r"[\s\S]", SINGLE_BYTES)
    names = ["<|im_start|>", "<|im_end|>", *more]
    tokenizer = plain.with_special(names, {"eos_token": "<|im_end|>"}, [], ["<|im_end|>"])
    tokenizer.chat_template = template
    return tokenizer.with_end_of_text()


def their_tokenizer(template: str, visible: Sequence[str] = ()) -> Any:
    """That of ChatML by transformers, with the same ids, and more tokens that are not special."""
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Theirs
    from transformers import PreTrainedTokenizerFast

    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]  # GPT-2's letters of bytes
    others = iter(range(256, 512))
    letters = [chr(byte if byte in printable else next(others)) for byte in range(256)]
    theirs = Theirs(models.BPE({letter: byte for byte, letter in enumerate(letters)}, []))
    theirs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    theirs.decoder = decoders.ByteLevel()
    names = chat_tokenizer(more=visible).special
    theirs.add_tokens([AddedToken(x, special=x not in visible, normalized=False) for x in names])
    ends = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    wrapped = PreTrainedTokenizerFast(tokenizer_object=theirs, **ends)
    wrapped.chat_template = template
    return wrapped
