"""Text that is longer than memory: read through a window, and kept on disk where it must wait."""

from __future__ import annotations

import codecs
import secrets
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

from lit_gpt.errors import UserError

PIECE = 1 << 16  # characters handled at once, of a text that does not fit into memory
VIEW = 1 << 18  # characters that a view grows by at most
CODEC = "utf-16-le"  # joins the halves of a surrogate pair, wherever they were cut


class Window:
    """A view of a text that arrives in pieces; what has been read is dropped.

    Args:
        path: of the file that the text is from.
        texts: its pieces.

    Attributes:
        text: what is in view.
        at: where in it reading goes on.
        line: number of the line at `at`.
        row: number of the line where what is being read began; set by who reads.
        is_last: whether the text ends with this view.
    """

    def __init__(self, path: Path, texts: Iterable[str]) -> None:
        self._path = path
        self._texts = (x[i : i + VIEW] for x in texts for i in range(0, len(x), VIEW))
        self.text = ""
        self.at = 0
        self.line = 1
        self.row = 1
        self._dropped = 0  # characters
        self.is_last = False

    @property
    def where(self) -> str:
        """File and line of the row."""
        return f"{self._path}, line {self.row:,}"

    def more(self) -> bool:
        """Adds the next piece to the view; False if there is none."""
        piece = next(self._texts, None)
        if piece is None:
            self.is_last = True
            return False
        self._dropped += self.at
        self.text = self.text[self.at :] + piece
        self.at = 0
        return True

    def fill(self, size: int) -> int:
        """Looks ahead `size` characters, or to the end; returns how many are in view."""
        while len(self.text) - self.at < size and not self.is_last:
            self.more()
        return len(self.text) - self.at

    def advance(self, at: int) -> None:
        """Moves on to this place in the view."""
        self.line += self.text.count("\n", self.at, at)
        self.at = at

    def count(self, at: int) -> int:
        """Of the character at this place in the view: its number in the whole text, from 1."""
        return self._dropped + at + 1


class Store:
    """Long texts in a temporary file, each under a name that nobody can guess.

    So a row stands for itself with names instead of its long texts, and a name in a file is text.
    """

    def __init__(self, path: Path) -> None:
        self._path = path  # of the file that the texts are from
        self._file: IO[bytes] | None = None
        self._places: dict[str, tuple[int, int]] = {}  # start and end in bytes

    def add(self, pieces: Iterable[str]) -> str:
        """Keeps a text; returns its name."""
        name = secrets.token_hex(16)
        try:
            self._file = self._file or tempfile.TemporaryFile()  # noqa: SIM115
            start = self._file.seek(0, 2)
            for piece in pieces:
                self._file.write(piece.encode(CODEC, "surrogatepass"))
            self._places[name] = (start, self._file.tell())
        except OSError as error:
            raise self._failure(error) from error
        return name

    def pieces(self, text: str) -> Iterator[str]:
        """The pieces of the text with this name; any other text is itself.

        Raises:
            UnicodeError: there is half a surrogate pair in it.
        """
        if text not in self._places:
            yield text
            return
        at, end = self._places[text]
        assert self._file
        decoder = codecs.getincrementaldecoder(CODEC)()
        try:
            while at < end:
                self._file.seek(at)
                chunk = self._file.read(min(2 * PIECE, end - at))
                at += len(chunk)
                yield decoder.decode(chunk, final=at == end)
        except OSError as error:
            raise self._failure(error) from error

    def clear(self) -> None:
        """Forgets all texts."""
        if self._file:
            self._file.close()
        self._file = None
        self._places = {}

    def _failure(self, error: OSError) -> UserError:
        where = f"{self._path} in {tempfile.gettempdir()}"
        return UserError(f"cannot keep a long text of {where}: {error.strerror}")
