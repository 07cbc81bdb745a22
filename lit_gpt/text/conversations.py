"""Conversations in the rows of documents: messages, or a prompt and its completion."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from lit_gpt.errors import UserError
from lit_gpt.text.chat import MARK, PLAIN_SOURCE, ChatTemplate, Message, split_special
from lit_gpt.text.fields import MESSAGE_KEYS, find, kind_of, string_pieces
from lit_gpt.text.windows import Store

# What a row has to have; the first that it has is read.
FIELDS = (("messages",), ("conversations",), ("prompt", "completion"))
ROLES = {
    **{role: role for role in ("system", "user", "assistant", "tool")},
    **{"human": "user", "gpt": "assistant"},  # of ShareGPT
}
PLAIN_TEXT = object()  # in the place of a row
WANTED = 'a row needs the field "messages", or "prompt" and "completion", and none called "text"'


@dataclass(frozen=True)
class Conversation:
    """Turns of which the model learns the answers.

    Args:
        where: file and line.
        messages: the turns; none if it is plain text that goes on.
        first_answer: place of the first message that may be an answer to learn.
        prompt: plain text, without roles.
        completion: what the model learns to continue it with.
    """

    where: str
    messages: tuple[Message, ...] = ()
    first_answer: int = 0
    prompt: str = ""
    completion: str = ""

    def __len__(self) -> int:
        """Characters, without what a template adds."""
        texts = [self.prompt, self.completion, *(turn["content"] for turn in self.messages)]
        return sum(map(len, texts))

    @property
    def answers(self) -> list[int]:
        """The places of the messages to learn."""
        turns = enumerate(self.messages)
        return [i for i, x in turns if i >= self.first_answer and x["role"] == "assistant"]

    @property
    def text(self) -> str:
        """As plain text, in which no token is special: to train a vocabulary on."""
        if not self.messages:
            return self.prompt + self.completion
        plain = ChatTemplate(PLAIN_SOURCE, {"eos_token": MARK})
        return split_special(plain.render(self.messages), [])[0]


def fields_of(names: Iterable[str]) -> tuple[str, ...]:
    """Those of a row's fields that hold a conversation; none if it holds none, or a text."""
    names = set(names)
    if "text" in names:
        return ()
    return next((fields for fields in FIELDS if names.issuperset(fields)), ())


def has_conversation(
    where: str, row: Any, fields: tuple[str, ...], store: Store, loss_on: str | None
) -> bool:
    """Whether a row holds a conversation, as `read_conversation` reads it."""
    if not isinstance(row, dict):
        return False
    if not fields:
        return bool(fields_of(row))
    if len(fields) > 1:
        return len(fields) == 2 and loss_on == "answers"
    return isinstance(find(row, fields[0], where), list)


def read_conversation(where: str, row: Any, fields: tuple[str, ...], store: Store) -> Conversation:
    """The conversation in a row.

    Args:
        where: file and line of the row.
        fields: the one with messages, or those of prompt and completion; none: one of FIELDS.
        store: of its long strings.

    Raises:
        UserError: it holds none, or one that can't be used.
    """
    if row is PLAIN_TEXT:
        hint = "leave it out with `exclude`"
        raise UserError(f"{where} is plain text, among files with conversations", hint=hint)
    fields = fields or fields_of(row if isinstance(row, dict) else ())
    if not fields or not isinstance(row, dict):
        raise UserError(f"{where} holds no conversation", hint=WANTED)
    values = [find(row, field, where) for field in fields]
    names = [f"{where}: {field!r}" for field in fields]
    named = list(zip(values, names, strict=True))
    if len(fields) == 2 and not any(isinstance(value, list) for value in values):
        prompt, completion = ("".join(string_pieces(*pair, store)) for pair in named)
        if not completion.strip():
            raise UserError(f"{names[1]} is empty, so there is nothing to learn")
        return Conversation(where, prompt=prompt, completion=completion)
    parts = [tuple(_messages(*pair, store)) for pair in named]
    first = len(parts[0]) if len(parts) == 2 else 0
    found = Conversation(where, sum(parts, ()), first)
    if not found.answers:
        raise UserError(f"{names[-1]} has no message of the assistant to learn")
    return found


def _messages(value: Any, what: str, store: Store) -> Iterator[Message]:
    if not isinstance(value, list):
        raise UserError(f"{what} holds {kind_of(value)}, not a list of messages")
    if not value:
        raise UserError(f"{what} is empty")
    for i, message in enumerate(value):
        which = f"{what}, message {i + 1:,}"
        keys = [keys for keys in MESSAGE_KEYS if isinstance(message, dict) and keys[0] in message]
        if not keys:
            hint = 'messages look like {"role": "user", "content": "..."}'
            raise UserError(f"{which} has no role", hint=hint)
        role, content = keys[0]
        name = ROLES.get(message[role]) if isinstance(message[role], str) else None
        if name is None:
            problem = f"{which} has the {role} {message[role]!r}"
            raise UserError(problem, hint=f"use one of {', '.join(ROLES)}")
        text = "".join(string_pieces(message.get(content), f"{which}: {content!r}", store))
        if name == "assistant" and not text.strip():
            raise UserError(f"{which} is an empty answer")
        yield {"role": name, "content": text}
