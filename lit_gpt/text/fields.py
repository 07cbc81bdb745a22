"""What of a row is text: a field, several of them, or the messages of a chat."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator, Mapping
from typing import Any

from lit_gpt.errors import UserError
from lit_gpt.text.windows import PIECE, Store

FIELD = "text"  # which holds the documents, unless `text_field` names others
MAX_LISTED = 20  # field names in an error
MAX_NAME = 60  # characters of each
MESSAGE_KEYS = (("role", "content"), ("from", "value"))  # of OpenAI and of ShareGPT
KINDS: dict[type, str] = {
    **{dict: "an object", list: "a list", bool: "a boolean", type(None): "null"},
    **{str: "a text", bytes: "a text", memoryview: "a text"},
}


def text_of(row: Any, fields: tuple[str, ...], where: str, store: Store) -> Iterator[str]:
    """The text of a row, in non-empty pieces: its fields, with a line end between two of them.

    Fields that are null or empty are left out. Where no other field is named, a row that is a
    string is its own text.

    Args:
        row: a string or a dict of fields.
        fields: names, as `find` reads them.
        where: file and line of the row.
        store: of its long strings.
    """
    if isinstance(row, str) and fields == (FIELD,):
        yield from _pieces(row, f"{where}: the string", store)
        return
    if not isinstance(row, dict):
        raise UserError(f"{where} is not a JSON object such as {{{json.dumps(fields[0])}: ...}}")
    has_text = False
    for field in fields:
        separator = "\n" if has_text else ""
        for piece in _pieces(find(row, field, where), f"{where}: {field!r}", store):
            yield separator + piece
            separator = ""
            has_text = True


def find(row: dict[str, Any], field: str, where: str) -> Any:
    """The field of that name; "a.b" is the field "b" of the field "a", if there is no "a.b"."""
    if field in row:
        return row[field]
    dots = (i for i, x in enumerate(field) if x == "." and field[:i] in row)
    if (dot := next(dots, None)) is None:
        raise no_field(where, field, list(_names(row)))
    head = field[:dot]
    tail = field[dot + 1 :]
    if row[head] is None:
        return None
    if not isinstance(row[head], dict):
        raise UserError(f"{where}: {head!r} holds {kind_of(row[head])}, so it has no {tail!r}")
    return find(row[head], tail, f"{where}, {head!r}")


def _pieces(value: Any, what: str, store: Store) -> Iterator[str]:
    """The text of a field's value."""
    if isinstance(value, list):
        yield from _chat(value, what, store)
    elif value is not None:
        yield from string_pieces(value, what, store)


def _chat(messages: list[Any], what: str, store: Store) -> Iterator[str]:
    """Messages as "role: content", with an empty line between two of them."""
    for i, message in enumerate(messages):
        which = f"{what}, message {i + 1:,}"
        keys = [keys for keys in MESSAGE_KEYS if isinstance(message, dict) and keys[0] in message]
        if not keys:
            raise UserError(
                f"{what} holds a list, not text, and its element {i + 1:,} is no chat message",
                hint='name a field with text, or with messages like {"role": ..., "content": ...}',
            )
        role, content = keys[0]
        if i:
            yield "\n\n"
        yield from string_pieces(message[role], f"{which}: {role!r}", store)
        yield ": "
        yield from string_pieces(message.get(content), f"{which}: {content!r}", store)


def string_pieces(value: Any, what: str, store: Store) -> Iterator[str]:
    """The text of a string, or of UTF-8 bytes."""
    if isinstance(value, bytes):
        value = memoryview(value)
    if not isinstance(value, str | memoryview):
        raise UserError(f"{what} holds {kind_of(value)}, not text")
    try:
        for piece in store.pieces(value) if isinstance(value, str) else _decoded(value):
            piece.encode()  # fails on a lone surrogate, as \ud800 writes it
            if piece:
                yield piece
    except UnicodeError as error:
        raise UserError(f"{what} is not valid Unicode text: {error}") from error


def _decoded(content: memoryview) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    for at in range(0, len(content), PIECE):
        yield decoder.decode(content[at : at + PIECE])
    yield decoder.decode(b"", final=True)


def kind_of(value: Any) -> str:
    return KINDS.get(type(value)) or "a number"


def _names(row: Mapping[str, Any]) -> Iterator[str]:
    """The fields of a row, nested ones with dots."""
    for name, value in row.items():
        if isinstance(value, dict) and value:
            yield from (f"{name}.{inner}" for inner in _names(value))
        else:
            yield name


def no_field(where: str, field: str, names: list[str]) -> UserError:
    """The error for a row that has not exactly one field of that name."""
    short = [x if len(x) <= MAX_NAME else f"{x[:MAX_NAME]}..." for x in names[:MAX_LISTED]]
    listed = ", ".join(map(repr, short)) or "none"
    more = f" and {len(names) - MAX_LISTED:,} more" if len(names) > MAX_LISTED else ""
    number = names.count(field)
    has = f"{number} fields {field!r}" if number > 1 else f"no field {field!r}"
    return UserError(
        f"{where} has {has}",
        hint="name one with `text_field`, or leave the file out, in a folder with `exclude`; there "
        f"are {listed}{more}",
    )
