"""Where a text is encoded until all of it is: kept when a long text is stopped half-way."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lit_gpt import storage
from lit_gpt.errors import UserError
from lit_gpt.text.files import Reader
from lit_gpt.text.manifest import FOLDER
from lit_gpt.text.token_file import is_begun, open_tokens

PARTIAL = "partial-"  # begins the name of a folder that a later start continues
SOURCE = "source.json"  # in it: which text it is of
EXPIRED = 30 * 86_400.0  # seconds: what nobody continued for a month may go


@contextmanager
def new_folder(folder: Path, reader: Reader, settings: str) -> Iterator[Path | None]:
    """A new folder that becomes `folder` after the block; None if another process made that.

    If the block fails, the new folder is removed. But one that a long text is encoded into is kept
    after Ctrl-C or a kill, and is given out again by the next call for the same `folder`.

    Args:
        settings: names the text, whatever its files hold.
    """
    source = [settings, reader.fingerprint]
    try:
        if not reader.stamps.is_large:
            with _of_its_own(folder) as new:
                yield new
            return
        message = f"Another process is encoding this text into {folder}: waiting for it"
        with storage.held(_lock(folder), message) as is_held:
            if open_tokens(folder):
                yield None
            elif is_held:
                _remove_leftovers(folder.parent, source)
                with _continued(folder, source) as new:
                    yield new
            else:
                with _of_its_own(folder) as new:
                    yield new
    except OSError as error:
        if not open_tokens(folder):
            raise UserError(
                f"cannot store the tokens in {folder.parent}: {error.strerror}",
                field="cache",
                hint="name another folder",
            ) from error


def _lock(folder: Path) -> Path:
    return folder.parent / FOLDER / f"{folder.name}.lock"


def _say_damaged(folder: Path) -> None:
    if folder.exists() and not open_tokens(folder):  # else another process was faster
        print(f"The tokens in {folder} are damaged: encoding the text again", file=sys.stderr)


@contextmanager
def _of_its_own(folder: Path) -> Iterator[Path]:
    """A temporary folder; other processes may work on the same text, and the first one wins."""
    _say_damaged(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    storage.remove_abandoned(folder.parent)
    with storage.temporary_folder(folder.parent) as work:
        new = work / "corpus"
        new.mkdir(mode=0o700)  # a text may be private
        yield new
        if not open_tokens(folder):
            shutil.rmtree(folder, ignore_errors=True)  # if it exists, it is damaged
        new.rename(folder)  # fails if another process was faster


@contextmanager
def _continued(folder: Path, source: list[str]) -> Iterator[Path]:
    """A folder that outlives this process; the lock of `folder` must be held."""
    _say_damaged(folder)
    new = folder.with_name(f"{PARTIAL}{folder.name}")
    new.mkdir(mode=0o700, parents=True, exist_ok=True)
    storage.write_json(new / SOURCE, source)
    try:
        yield new
        (new / SOURCE).unlink()
        shutil.rmtree(folder, ignore_errors=True)  # if it exists, it is damaged
        new.rename(folder)
    except (KeyboardInterrupt, SystemExit):
        if is_begun(new):
            print("Encoding was stopped: the next start continues there", file=sys.stderr)
        else:
            shutil.rmtree(new, ignore_errors=True)
        raise
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise


def _remove_leftovers(cache: Path, source: list[str]) -> None:
    """Removes what was kept of earlier contents of this text, or has long been forgotten."""
    storage.remove_abandoned(cache)
    for partial in cache.glob(f"{PARTIAL}*"):
        with suppress(OSError, ValueError, TypeError):
            settings, fingerprint = storage.read_json(partial / SOURCE)
            is_old = partial.stat().st_mtime < time.time() - EXPIRED
            if is_old or (settings == source[0] and fingerprint != source[1]):
                name = partial.name.removeprefix(PARTIAL)
                with storage.held(_lock(cache / name), wait=False) as is_held:
                    if is_held:
                        shutil.rmtree(partial)
