"""Which files a path names: files, folders and globs, with what to leave out."""

from __future__ import annotations

import glob
import os
import re
import stat
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from fnmatch import fnmatchcase
from importlib import metadata
from pathlib import Path, PurePath, PurePosixPath

from lit_gpt.errors import UserError

STORE = "lit_gpt token store"  # begins the index of one
INDEX = "index.json"
PLAN = "plan.json"
PLANNED = '"tokenizer_option"'  # begins the plan of one
ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*://")  # of object storage
SAMPLE = "data/订单商品名称.csv"  # the text to train on unless another is named


def find_files(
    paths: str | list[str],
    exclude: str | list[str] | None = None,
    excluded: Counter[str] | None = None,
) -> list[Path]:
    """The files that the paths name, in that order: files, folders, globs ("texts/**/*.txt").

    A folder stands for all files in it and its subfolders, and a glob for what it matches, both in
    the order of their names; the name of an existing file or folder is never a glob. Hidden files
    and folders are skipped. Links are followed, and each real file and folder is read once, at the
    first of its names, so links may form a ring.

    Args:
        exclude: globs of names ("*.log") or, with a slash, of paths inside the folder ("old/*");
            what they match is left out of folders and globs, with all that is in it. A file or
            folder that `paths` names is never left out. See `is_member_excluded` for archives.
        excluded: counts the files and folders that were left out, by glob, 0 too.

    Raises:
        UserError: there are no files, or among them is one that can't be read: a broken link, a
            pipe, a folder without permission.
    """
    globs = exclude if isinstance(exclude, list) else [exclude] if exclude else []
    excluded = Counter() if excluded is None else excluded
    excluded.update(dict.fromkeys(globs, 0))
    found: dict[str, Path] = {}  # by real name
    for path in paths if isinstance(paths, list) else [paths]:
        if is_token_store(path):
            problem = "names no text files, but a token store, or a place for one"
            hint = "only training and planning read token stores, one at a time"
            raise UserError(problem, field="path", value=path, hint=hint)
        before = excluded.total()
        files: list[tuple[Path, str]] = []
        for root, base in _roots(path):
            files += _walk(root, base, excluded)
        if not files:
            problem = "no files in this folder"
            if excluded.total() > before:
                problem = "`exclude` leaves no files in this folder"
            raise UserError(problem, field="path", value=path, hint="name one with text files")
        for place, real in files:
            found.setdefault(real, place)
    if not found:
        raise UserError("names no files", field="path", value=paths, hint="name a file or folder")
    return list(found.values())


def is_token_store(path: str | list[str]) -> bool:
    """Whether a path names a token store: any address, or a folder with an index or a plan of one.

    Without an index it isn't finished, which `read_index` says.
    """
    if not isinstance(path, str):
        return False
    if ADDRESS.match(path):
        return True
    for name, sign in ((INDEX, STORE), (PLAN, PLANNED)):
        # Also an unknown user's ~, a NUL.
        with (
            suppress(OSError, RuntimeError, ValueError),
            (Path(path).expanduser() / name).open("rb") as file,
        ):
            if sign.encode() in file.read(200):
                return True
    return False


def _is_excluded(place: PurePath, base: PurePath, excluded: Counter[str]) -> bool:
    """Whether a glob matches the name of a file or folder, or its path below `base`."""
    inside = place.relative_to(base).as_posix()
    for pattern in excluded:
        wanted = pattern.removeprefix("./").rstrip("/")
        if place != base and fnmatchcase(inside if "/" in wanted else place.name, wanted):
            excluded[pattern] += 1
            return True
    return False


def is_member_excluded(name: str, excluded: Counter[str]) -> bool:
    """Whether a glob matches a file in an archive, or a folder in it that has the file.

    Args:
        name: of the file, in the archive.
        excluded: counts the files that were left out, by glob.
    """
    base = PurePosixPath("/")
    place = base / name
    return any(_is_excluded(part, base, excluded) for part in [*reversed(place.parents), place])


def _roots(path: str) -> list[tuple[Path, Path]]:
    """The file or folder of this name, or what it matches as a glob; each with its base.

    Names below the base may be excluded: all in a folder, but the matches of a glob, too.
    """
    try:
        root = Path(path).expanduser()
        os.stat(root if path else "")
    except PermissionError:
        pass  # _walk reports it
    except (OSError, RuntimeError, ValueError) as error:  # also an unknown user's ~, a NUL
        problem = "no such file or folder"
        if isinstance(error, FileNotFoundError | NotADirectoryError):
            if path == SAMPLE and (sample := _installed_sample()):
                return [(sample, sample)]
            if glob.has_magic(str(root)) and not root.is_symlink():
                problem = "matches no files"
                if matches := sorted(map(Path, glob.glob(str(root), recursive=True))):
                    return [(match, match.parent) for match in matches]
        raise UserError(problem, field="path", value=path) from error
    return [(root, root)]


def _installed_sample() -> Path | None:
    """The sample text in the repository around this package, or where the wheel put it."""
    places = [Path(__file__).parents[2] / SAMPLE]
    with suppress(metadata.PackageNotFoundError):
        files = metadata.files("lit_gpt") or []
        places += [Path(file.locate()) for file in files if file.name == places[0].name]
    return next(filter(Path.exists, places), None)


def _walk(root: Path, base: Path, excluded: Counter[str]) -> Iterator[tuple[Path, str]]:
    """Files, each with its real name, but for those that a glob excludes; see `_is_excluded`."""
    seen: set[str] = set()
    todo = [(root, os.path.realpath(root))]
    while todo:
        place, real = todo.pop()
        if excluded and _is_excluded(place, base, excluded):
            continue
        try:
            if place.is_symlink():
                real = os.path.realpath(place)
            if real in seen:
                continue
            seen.add(real)
            mode = place.stat().st_mode
            if stat.S_ISDIR(mode):
                names = sorted(os.listdir(place), reverse=True)  # the last is popped first
                todo += [(place / x, os.path.join(real, x)) for x in names if x[0] != "."]
            elif stat.S_ISREG(mode):
                yield place, real
            else:
                raise UserError(
                    f"{place} is a pipe, a socket or a device", field="path", hint="name text files"
                )
        except OSError as error:
            is_broken = isinstance(error, FileNotFoundError) and place.is_symlink()
            reason = "the link is broken" if is_broken else error.strerror
            raise UserError(f"cannot read {place}: {reason}") from error
