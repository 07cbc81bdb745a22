"""Chat templates: a conversation as the text, and the ids, that a model was trained on.

A template is a Jinja program that comes with a model, so it may be a stranger's: it runs in Jinja's
sandbox, with the same variables, functions and settings as in transformers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cache
from typing import TYPE_CHECKING, Any, NoReturn, TypedDict

from lit_gpt.errors import UserError

if TYPE_CHECKING:
    import numpy as np

    from lit_gpt.text.tokenizer import Tokenizer

LONGEST = 200_000  # characters of a template
MARK = "\ufdd0"  # a noncharacter; in a special token's name, it says that this is plain text
# Where answers are, as for transformers.
GENERATION = re.compile(r"(\{%[-+]?\s*)generation(\s*[-+]?%\})")
END_GENERATION = re.compile(r"(\{%[-+]?\s*)endgeneration(\s*[-+]?%\})")
# For models without a template. Each answer ends with the end-of-text token; a tokenizer without
# one reads a blank line instead, which is how end of text reads.
PLAIN_SOURCE = (
    "{% for message in messages %}{{ message['role'] | capitalize + ':\\n' }}"
    "{{ message['content'] | trim }}"
    "{{ eos_token if message['role'] == 'assistant' and eos_token else '\\n\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:\\n' }}{% endif %}"
)


class Message(TypedDict):
    """One turn of a conversation; the role is system, user or assistant."""

    role: str
    content: str


@dataclass(frozen=True)
class ChatTemplate:
    """Turns messages into text.

    Args:
        source: the Jinja program.
        variables: the special tokens that it may name, such as `eos_token`.
        special: names of the special tokens, without visible ones. In a message they are plain
            text: there, `render` puts a MARK into them, which `Tokenizer.encode_chat` removes.
    """

    source: str
    variables: Mapping[str, str] = field(default_factory=dict)
    special: frozenset[str] = frozenset()

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> ChatTemplate:
        """The tokenizer's own template, or else PLAIN_SOURCE."""
        source = tokenizer.chat_template or PLAIN_SOURCE
        hidden = frozenset(tokenizer.special).difference(tokenizer.visible_names)
        return cls(source, tokenizer.special_roles, hidden)

    @property
    def stop(self) -> tuple[str, ...]:
        """Where an answer ends besides its end token: with PLAIN_SOURCE, at another turn."""
        return ("\n\nUser:", "\n\nSystem:") if self.source == PLAIN_SOURCE else ()

    def render(
        self, messages: Sequence[Message | dict[str, Any]], add_generation_prompt: bool = False
    ) -> str:
        """The conversation as text for `Tokenizer.encode_chat`.

        Args:
            messages: the turns; only their texts are used.
            add_generation_prompt: whether the text ends with what comes before an answer.

        Raises:
            UserError: messages that the template refuses, or a template with an error.
        """
        import jinja2

        given = [_checked(message, self.special) for message in messages]
        try:
            return _compiled(self.source).render(
                messages=given,
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self.variables,
            )
        except (
            jinja2.TemplateError,
            LookupError,
            TypeError,
            ValueError,
            ArithmeticError,
            RecursionError,
        ) as error:
            why = " ".join(str(error).split())[:300] or type(error).__name__
            raise UserError(f"the model's chat template refuses this: {why}") from error


PLAIN = ChatTemplate(PLAIN_SOURCE)


def chat_ids(
    tokenizer: Tokenizer,
    messages: Sequence[Message | dict[str, Any]],
    add_generation_prompt: bool = True,
) -> np.ndarray:
    """The ids (N,) of a conversation; errors as for `ChatTemplate.render`."""
    text = ChatTemplate.of(tokenizer).render(messages, add_generation_prompt)
    return tokenizer.encode_chat(text)


def check_template(source: str) -> None:
    """Refuses what is not a template, without running it.

    Raises:
        ValueError: it is too long, or has a syntax error.
    """
    import jinja2

    if len(source) > LONGEST:
        raise ValueError(f"its chat template is longer than {LONGEST:,} characters")
    try:
        _compiled(source)
    except (jinja2.TemplateError, RecursionError) as error:
        why = " ".join(str(error).split())[:300]
        raise ValueError(f"its chat template has an error ({why})") from error


def _checked(message: Mapping[str, Any], special: frozenset[str]) -> dict[str, str]:
    """A message as plain texts, special tokens in it marked."""
    role, content = message.get("role"), message.get("content")
    if not (isinstance(role, str) and isinstance(content, str)):
        raise UserError("each message must have a role and a content, both texts")
    return {"role": marked(role, special), "content": marked(content, special)}


def marked(text: str, special: frozenset[str]) -> str:
    text = text.replace(MARK, "")
    for name in special:
        if len(name) > 1:
            text = text.replace(name, name[0] + MARK + name[1:])
    return text


def split_special(text: str, names: Sequence[str]) -> list[str]:
    """Cuts a rendered text at special tokens: plain text at even places, names at odd ones."""
    if not names:
        return [text.replace(MARK, "")]
    longest_first = sorted(names, key=lambda name: (-len(name), name))
    parts = re.split(f"({'|'.join(map(re.escape, longest_first))})", text)
    return [part.replace(MARK, "") for part in parts]


@cache
def _compiled(source: str) -> Any:
    """The program in a sandbox like that of transformers (utils/chat_template_utils.py)."""
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> NoReturn:
        raise ValueError(message)

    def tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)  # Jinja's escapes HTML

    # {% generation %}, which says where answers are, changes nothing about the text.
    source = END_GENERATION.sub(r"\1endif\2", GENERATION.sub(r"\1if true\2", source))
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
    return environment.from_string(source)
