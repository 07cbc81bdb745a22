"""Rows of .csv and .tsv files.

Unlike Python's csv module this keeps long fields on disk, and notices a stray quote. The rules of
.csv are RFC 4180's; a quote inside a field that does not begin with one is a plain character. A
field of a .tsv file goes on to the next tab or line end, unless it may be quoted as in .csv.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from lit_gpt.errors import UserError
from lit_gpt.text.windows import PIECE, Store, Window

SHORT = PIECE  # characters, quotes and end included, of a field that stays in memory
MAX_COLUMNS = 1 << 14
MAX_SHAPE = 100  # characters of text that are looked at for whether it looks like a row's field
MANY_ROWS = 20  # lines: fewer may look like rows by chance

LINE_END = re.compile(r"\r\n|\n|\r")
PART_OF_QUOTED = re.compile(r'(?:[^"]+|"")*')
NUMBER = re.compile(r'\s*"?[-+]?\d+(\.\d+)?"?\s*')

Row = tuple[str, list[str], Store]  # where it is, its fields, and the store of the long ones


class Table:
    """The rows of a file, the header first; all are as wide as that.

    Args:
        path, kind: of the file; csv or tsv.
        has_quotes: whether a field may be in double quotes.
        texts: the file's text, in pieces.
        counts: of "blank_lines", which are no rows, and "row_like_fields".
    """

    def __init__(
        self, path: Path, kind: str, has_quotes: bool, texts: Iterable[str], counts: dict[str, int]
    ) -> None:
        self._delimiter = "\t" if kind == "tsv" else ","
        self._quote = '"' if has_quotes else "\n"  # which begins no field
        self._counts = counts
        self._width = 0  # of the header
        self._window = Window(path, texts)
        self._store = Store(path)
        self._end = re.compile(rf"{self._delimiter}|\r\n|\n|\r|\Z")
        self._long = re.compile(rf"[^{self._delimiter}\r\n]{{{MAX_SHAPE},}}")
        self._plain = re.compile(rf"[^{self._delimiter}\r\n]*")
        self._simple = re.compile(rf"([^{self._quote}\r\n]*)(\r\n|\n|\r)")  # a row without quotes
        field = rf"()({self._plain.pattern})"
        if has_quotes:
            field = rf'(?:"([^"]*(?:""[^"]*)*)"|((?!"){self._plain.pattern}))'
        self._field = re.compile(rf"{field}({self._end.pattern})")

    def __iter__(self) -> Iterator[Row]:
        window = self._window
        while window.fill(1):
            window.row = window.line
            if row := self._row():
                self._width = self._width or len(row)
                if len(row) < self._width:
                    raise self._error(f"has {len(row):,} of its header's {self._width:,} fields")
                yield window.where, row, self._store
                self._store.clear()
            else:
                self._counts["blank_lines"] += 1

    def _row(self) -> list[str]:
        """The fields up to the end of the row; none if the line is empty."""
        window = self._window
        most = self._width or MAX_COLUMNS
        ahead = min(window.fill(SHORT), SHORT)  # which may move `at`
        limit = window.at + ahead
        match = self._simple.match(window.text, window.at, limit)
        if match and match.end() < limit and match[1].count(self._delimiter) < most:
            window.advance(match.end())
            window.line += match[2] == "\r"
            return match[1].split(self._delimiter) if match[1] else []
        row: list[str] = []
        end = self._delimiter
        while end == self._delimiter:
            if len(row) == most:
                whose = "its header's " if self._width else ""
                raise self._error(f"has more than {whose}{most:,} fields")
            is_empty = bool(LINE_END.match(window.text, window.at))
            field, end = self._next_field(row)
            if row or not is_empty:
                row.append(field)
        window.line += end == "\r"
        return row

    def _next_field(self, row: list[str]) -> tuple[str, str]:
        """The field after those of the row, or its name in the store; and what ends it."""
        window = self._window
        ahead = min(window.fill(SHORT), SHORT)  # which may move `at`
        limit = window.at + ahead
        match = self._field.match(window.text, window.at, limit)
        is_end = window.is_last and limit == len(window.text)
        if not match or (match.end() == limit and not is_end):
            return self._long_field(row)
        quoted, plain, end = match.groups()
        window.advance(match.end())
        if plain is not None:
            return plain, end
        self._check_lines(row, quoted, is_whole=True)
        return quoted.replace('""', '"'), end

    def _long_field(self, row: list[str]) -> tuple[str, str]:
        window = self._window
        is_quoted = window.text.startswith(self._quote, window.at)
        window.advance(window.at + is_quoted)
        name = self._store.add(self._pieces(row, is_quoted))
        if is_quoted and not window.fill(1):
            raise self._error("has a field in double quotes that never ends")
        window.advance(window.at + is_quoted)
        window.fill(2)
        match = self._end.match(window.text, window.at)
        if not match:
            raise self._error(f"has {window.text[window.at]!r} after a field in double quotes")
        window.advance(match.end())
        return name, match.group()

    def _pieces(self, row: list[str], is_quoted: bool) -> Iterator[str]:
        part = PART_OF_QUOTED if is_quoted else self._plain
        window = self._window
        shape = ""  # the lines of the beginning, their text shortened
        while window.fill(2):
            match = part.match(window.text, window.at, window.at + PIECE)
            piece = match.group() if match else ""
            if not piece:
                break
            window.advance(window.at + len(piece))
            if is_quoted and len(shape) < PIECE // 2:
                shape += self._long.sub(lambda text: text[0][:MAX_SHAPE], piece)
                if len(shape) >= PIECE // 2:
                    self._check_lines(row, shape, is_whole=False)
            yield piece.replace('""', '"') if is_quoted else piece
        if is_quoted and len(shape) < PIECE // 2:
            self._check_lines(row, shape, is_whole=window.fill(1) > 0)

    def _check_lines(self, row: list[str], content: str, is_whole: bool) -> None:
        """Refuses what a stray quote makes of rows: a field over lines that look like them.

        They do if there are as many delimiters in each line as in the header. If fewer than
        MANY_ROWS do so, they are refused only if they have numbers wherever this row has one, and
        counted otherwise: prose may look like that too, as any text without a comma does in a file
        of one column.

        Args:
            row: the fields before.
            content: of the field, as written; the beginning of it, unless `is_whole`.
        """
        first, *lines = LINE_END.split(content)
        if not lines or not self._width:
            return
        fields = [line.split(self._delimiter) for line in lines]
        *inner, last = fields
        inner = [line for line in inner if line != [""]]
        widths = {len(row) + first.count(self._delimiter) + 1, *map(len, inner)}
        if is_whole:
            widths.add(self._width - len(row) - 1 + len(last))
        rows = [*inner, last[:-1]] if is_whole else inner
        if widths != {self._width} or not rows:
            return
        own = [*row, *first.split(self._delimiter)]
        columns = [i for i, field in enumerate(own) if NUMBER.fullmatch(field)]
        numbers = [
            NUMBER.fullmatch(fields[i]) for fields in rows for i in columns if i < len(fields)
        ]
        is_many = len(rows) >= MANY_ROWS or (len(rows) > 1 and numbers and all(numbers))
        if is_many and self._width > 1:  # a text of many lines may be the only column
            raise self._error(
                f"has a field in double quotes over {len(rows) + 1:,} lines that look like rows",
                "remove the stray quote, or write the file as .jsonl if these lines are one text",
            )
        self._counts["row_like_fields"] += 1

    def _error(self, problem: str, hint: str | None = None) -> UserError:
        if not hint and self._quote == '"':
            hint = "put text that contains separators, quotes or line ends in double quotes"
        elif not hint:
            hint = "a .tsv file has no quoting unless you set `tsv_quotes`"
        return UserError(f"{self._window.where} {problem}", hint=hint)
