"""Which tokens of a conversation the model has to produce: the answers, with what ends each.

The ids are those that generation will see: what precedes an answer is encoded as in a prompt, and
the answer by itself. Elsewhere they are the ids of the whole rendered text, as transformers has it.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any, Literal

import numpy as np

from lit_gpt.errors import UserError
from lit_gpt.text.chat import END_GENERATION, GENERATION, MARK, ChatTemplate, marked
from lit_gpt.text.conversations import Conversation
from lit_gpt.text.tokenizer import END_OF_TEXT, Tokenizer

# Bits of an id of the full vocabulary, on its way to the disk.
COUNTED = 1 << 31  # it is of an answer
START = 1 << 30  # it begins a conversation
ID = START - 1
FLAG_BITS = 30  # shifts the two to a byte
MARKS = (secrets.token_hex(16), secrets.token_hex(16))  # that no text has: around an answer

LossOn = Literal["answers", "all"]
Span = tuple[int, int]  # start and end in characters


def split_flags(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ids (N,) uint32 without the bits, and the bits, (N,) uint8."""
    return ids & np.uint32(ID), (ids >> np.uint32(FLAG_BITS)).astype(np.uint8)


def is_start(flags: np.ndarray) -> np.ndarray:
    """Which tokens begin a conversation, (N,) bool."""
    return (flags & (START >> FLAG_BITS)).astype(bool)


def is_answer(flags: np.ndarray) -> np.ndarray:
    """Which tokens are of an answer, (N,) bool."""
    return (flags & (COUNTED >> FLAG_BITS)).astype(bool)


def encode_conversations(
    tokenizer: Tokenizer,
    template: ChatTemplate,
    loss_on: LossOn,
    conversations: Sequence[Conversation],
) -> np.ndarray:
    """Ids of one conversation after the other, with COUNTED and START, (N,) uint32.

    Args:
        loss_on: all: each token counts.

    Raises:
        UserError: the template refuses one, or does not show where its answers are.
    """
    rows = []
    for conversation in conversations:
        begin = START
        for ids, is_counted in parts_of(conversation, tokenizer, template, loss_on):
            row = ids | np.uint32(COUNTED * is_counted)
            row[0] |= np.uint32(begin)
            rows.append(row)
            begin = 0
    return np.concatenate(rows)


def parts_of(
    conversation: Conversation, tokenizer: Tokenizer, template: ChatTemplate, loss_on: LossOn
) -> Iterator[tuple[np.ndarray, bool]]:
    """The ids of a conversation in non-empty parts, and whether each counts."""
    is_all = loss_on == "all"
    if not conversation.messages:
        first = [tokenizer.special[name] for name in tokenizer.start_names]
        prompt = np.append(np.array(first, np.uint32), tokenizer.encode(conversation.prompt))
        if len(prompt):
            yield prompt, is_all
        end = tokenizer.special.get(tokenizer.special_roles.get("eos_token", ""))
        if end is None:  # then a blank line ends a document
            yield tokenizer.encode(conversation.completion + END_OF_TEXT.decode()), True
        else:
            ids = tokenizer.encode(conversation.completion)
            yield np.append(ids, np.uint32(end)), True
        return
    try:
        if is_all:
            yield tokenizer.encode_chat(template.render(conversation.messages)), True
            return
        text, answers = find_answers(conversation, template)
        check_answers(conversation, text, answers)
    except UserError as error:
        error.problem = f"{conversation.where}: {error.problem}"
        raise
    places = [0, *(place for span in answers for place in span), len(text)]
    for i, (start, end) in enumerate(pairwise(places)):
        if start < end:
            yield tokenizer.encode_chat(text[start:end]), i % 2 == 1


def find_answers(conversation: Conversation, template: ChatTemplate) -> tuple[str, list[Span]]:
    """The conversation as text, and where its answers are, with what ends each.

    A template may say that by {% generation %}, as for transformers. Else an answer is what
    follows the text that asks for it, up to the end of its turn.
    """
    if GENERATION.search(template.source):
        return marked_answers(conversation, template)
    messages = conversation.messages
    text = template.render(messages)
    spans = []
    for i in conversation.answers:
        before = template.render(messages[:i], add_generation_prompt=True)
        until = template.render(messages[: i + 1])
        last = marked(messages[i]["content"].split()[-1], template.special)
        end = answer_end(text, before, until, last)
        if end is None:
            raise UserError(
                "the model's chat template renders earlier turns differently once more follow, so "
                f"the answer in message {i + 1:,} can't be located",
                hint="mark answers by {% generation %} in the template, keep one answer in each "
                "conversation, or use `loss_on` all",
            )
        spans.append((len(before), end))
    return text, spans


def check_answers(conversation: Conversation, text: str, answers: list[Span]) -> None:
    """Refuses a template that leaves out what is to be learnt, as one for other kinds of content.

    It may leave out the thoughts before it.
    """
    found = "".join(text[start:end] for start, end in answers).replace(MARK, "")
    for i in conversation.answers:
        if conversation.messages[i]["content"].split()[-1] not in found:
            problem = f"the model's chat template leaves out the answer in message {i + 1:,}"
            raise UserError(problem, hint="use another template, or another model")


def answer_end(text: str, before: str, until: str, last: str) -> int | None:
    """Where an answer ends in the text of a conversation; None: it can't be told.

    Args:
        before: the text that asks for it.
        until: the text of the conversation up to its turn.
        last: the last word of the answer.
    """
    if not (last and text.startswith(before) and until.startswith(before) and until != before):
        return None
    if text.startswith(until):
        return len(until)
    # As by Qwen3's, which begins the last answer of a conversation, and no other, with thoughts.
    answer = until[len(before) :]
    _, found, end = answer.rpartition(last)
    stop = len(until)
    while found and (place := text.rfind(last + end, len(before), stop)) >= 0:
        stop = place + len(last + end)
        if answer.endswith(text[len(before) : stop]):
            return stop
        stop -= 1
    return None


def marked_answers(conversation: Conversation, template: ChatTemplate) -> tuple[str, list[Span]]:
    """The same by a template with {% generation %}."""

    def generated(caller: Callable[[], str]) -> str:
        return MARKS[0] + caller() + MARKS[1]

    source = GENERATION.sub(r"\1call generated()\2", template.source)
    source = END_GENERATION.sub(r"\1endcall\2", source)
    variables: dict[str, Any] = {**template.variables, "generated": generated}
    marking = replace(template, source=source, variables=variables)
    text = ""
    spans = []
    for i, part in enumerate(re.split("|".join(MARKS), marking.render(conversation.messages))):
        if i % 2 and part:
            spans.append((len(text), len(text) + len(part)))
        text += part
    if conversation.first_answer:  # a prompt may have answers, too
        begin = len(template.render(conversation.messages[: conversation.first_answer]))
        spans = [span for span in spans if span[0] >= begin]
    if not spans:
        raise UserError("the model's chat template marks no answer")
    return text, spans
