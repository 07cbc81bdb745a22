"""Owns files that are written whole or not at all: what they are called until then."""

from __future__ import annotations

from pathlib import Path

UNFINISHED = ".unfinished"  # ends the name of a file that is being written


def unfinished(path: str | Path) -> Path:
    """What is written before it becomes `path`."""
    return Path(path).with_name(f".{Path(path).name}{UNFINISHED}")


def write_whole(path: Path, text: str) -> None:
    """Writes a temporary file beside `path` and renames it: a reader never sees half of it."""
    temporary = unfinished(path)
    try:
        temporary.write_bytes(text.encode("utf-8", errors="replace"))
        temporary.replace(path)
    except OSError as error:
        error.filename = error.filename or str(path)  # a full disk doesn't say of which file
        raise
    finally:
        temporary.unlink(missing_ok=True)
