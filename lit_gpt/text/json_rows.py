"""Rows of JSON: one on each line (.jsonl, .ndjson), or an array of them and the like (.json).

Python's own parser reads what is short. A long value is first abridged: its long strings go to
disk, and a name stands for each, so that what is left is short.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from lit_gpt.errors import UserError
from lit_gpt.text.windows import PIECE, Store, Window

LONG = 1 << 20  # characters: a longer value, or line, is abridged
MAX_ABRIDGED = 1 << 22  # characters: the parser may make 30 bytes of each
SHORT = 1 << 10  # characters of a string that stays where it is

BLANK = re.compile(r"[ \t\r\n]*")
BLANK_LINES = re.compile(r"[ \t\r\n]*\n")
SPACE = re.compile(r"[ \t\r\n]+")
SHORT_STRING = re.compile(rf'"(?:[^"\\\x00-\x1f]|\\.){{0,{SHORT}}}"')
# Of a string, up to an escape sequence that goes on in the next piece.
WHOLE = re.compile(r'(?:[^"\\\x00-\x1f]+|\\u[0-9a-fA-F]{4}|\\[^u])*')
OTHER = re.compile(r'[\[{]+|[\]}]|\n|[^\[\]{}"\n]+')  # no string
DECODER = json.JSONDecoder(parse_int=float)  # whose digits have no limit; numbers are no text

Row = tuple[str, Any, Store]  # where it is, its value, and the store of its long strings


def read_json(
    path: Path, is_lines: bool, texts: Iterable[str], counts: dict[str, int]
) -> Iterator[Row]:
    """The rows in a JSON file; blank lines are counted in `counts`."""
    window = Window(path, texts)
    store = Store(path)
    try:
        for value in _lines(window, store, counts) if is_lines else _values(window, store):
            yield window.where, value, store
            store.clear()
    except (ValueError, RecursionError) as error:
        reason = str(error)
        if isinstance(error, json.JSONDecodeError):
            at = f"column {error.colno:,}" if is_lines else f"character {window.count(error.pos):,}"
            reason = f"{error.msg}: {at}"
        raise UserError(
            f"{window.where} is not valid JSON ({reason})", hint="fix or remove it"
        ) from error


def _lines(window: Window, store: Store, counts: dict[str, int]) -> Iterator[Any]:
    """The value on each line."""
    while window.fill(1):
        if blank := BLANK_LINES.match(window.text, window.at):
            counts["blank_lines"] += blank.group().count("\n")
            window.advance(blank.end())
            continue
        window.row = window.line
        if end := _line_end(window):
            line = window.text[window.at : end]
            window.advance(end)
        else:
            line = _abridged(window, store, is_line=True)
            window.advance(min(window.at + 1, len(window.text)))
        if BLANK.fullmatch(line):
            counts["blank_lines"] += 1
        else:
            yield DECODER.decode(line) if end else _parsed(line)


def _line_end(window: Window) -> int | None:
    """Where the line at hand ends in the view; None if it is long."""
    start = window.at
    while (end := window.text.find("\n", start)) < 0 and len(window.text) - window.at <= LONG:
        start = len(window.text) - window.at  # what is in view then is searched already
        if not window.more():
            end = len(window.text) - 1
            break
    return end + 1 if 0 <= end <= window.at + LONG else None


def _values(window: Window, store: Store) -> Iterator[Any]:
    """The elements of an array, or values with white space between them."""
    mark = _next(window)
    if mark != "[":
        while _next(window):
            yield _value(window, store)
        return
    window.advance(window.at + 1)
    mark = _next(window)
    while mark != "]":
        yield _value(window, store)
        mark = _next(window)
        if mark == ",":
            window.advance(window.at + 1)
            _next(window)
        elif mark != "]":
            raise ValueError("Expecting ',' or ']' after a value")
    window.advance(window.at + 1)
    if _next(window):
        raise ValueError("Extra data after the array")


def _next(window: Window) -> str:
    """Moves on past white space, and returns the next character; "" at the end."""
    while window.fill(1):
        match = BLANK.match(window.text, window.at)
        assert match
        window.advance(match.end())
        if window.at < len(window.text):
            break
    window.row = window.line
    return window.text[window.at : window.at + 1]


def _value(window: Window, store: Store) -> Any:
    """The value at hand, without what follows."""
    while True:
        try:
            value, end = DECODER.raw_decode(window.text, window.at)
        except json.JSONDecodeError:
            if window.is_last:
                raise
        else:
            if end < len(window.text) or window.is_last:  # a number may go on
                window.advance(end)
                return value
        if len(window.text) - window.at > LONG:
            return _parsed(_abridged(window, store, is_line=False))
        window.more()


def _abridged(window: Window, store: Store, is_line: bool) -> str:
    """The value at hand, or all of the line, with names for its long strings."""
    parts = []
    size = 0
    depth = 0
    while window.fill(2 * SHORT + 2):  # with escapes and quotes
        char = window.text[window.at]
        if match := SHORT_STRING.match(window.text, window.at):
            part = match.group()
            window.advance(match.end())
        elif char == '"':
            part = f'"{store.add(_string(window))}"'
        else:
            match = OTHER.match(window.text, window.at)
            assert match
            if is_line and char == "\n":
                break
            depth += len(match.group()) * (char in "[{") - (char in "]}")
            part = SPACE.sub(" ", match.group())
            window.advance(match.end())
        parts.append(part)
        size += len(part)
        if size > MAX_ABRIDGED:
            raise UserError(
                f"{window.where} has more than {MAX_ABRIDGED:,} characters besides long strings",
                hint="remove the fields that you don't need, or make it several rows",
            )
        if not is_line and depth <= 0 and char in '"]}':
            break
    return "".join(parts)


def _string(window: Window) -> Iterator[str]:
    """The pieces of the string at hand."""
    window.advance(window.at + 1)
    while True:
        match = WHOLE.match(window.text, window.at, window.at + PIECE)
        assert match
        if part := match.group():
            yield _parsed(f'"{part}"')
            window.advance(match.end())
            continue
        rest = window.text[window.at : window.at + 6]  # an escape sequence has up to six characters
        if rest.startswith('"'):
            window.advance(window.at + 1)
            return
        is_begun = not rest or (rest[0] == "\\" and len(rest) < 6)
        if not is_begun or not window.more():
            raise ValueError("Unterminated string, or a character or escape that it can't have")


def _parsed(text: str) -> Any:
    """Decodes JSON, without a column in the error: the text is not as in the file."""
    try:
        return DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise ValueError(error.msg) from error
