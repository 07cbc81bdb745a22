"""Files are whole or absent, whatever happens while they are written; a folder has one holder."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lit_gpt.errors import UserError
from lit_gpt.storage import (
    atomic_open,
    atomic_write_text,
    cache_folder,
    locked,
    remove_unfinished,
    temporary_folder,
    unfinished,
)


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# Whole files


def test_a_file_appears_only_when_it_is_complete(tmp_path):
    path = tmp_path / "file"
    for content in (b"first", b"second"):
        before = path.read_bytes() if path.exists() else None
        with atomic_open(path) as file:
            file.write(content)
            file.flush()
            assert (path.read_bytes() if path.exists() else None) == before
        assert path.read_bytes() == content
    assert names_in(tmp_path) == ["file"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError()])
def test_a_failed_write_leaves_the_earlier_file(error, tmp_path):
    def write_half() -> None:
        with atomic_open(tmp_path / "file") as file:
            file.write(b"half")
            raise error

    atomic_write_text(tmp_path / "file", "earlier")
    with pytest.raises(type(error)):
        write_half()
    assert (tmp_path / "file").read_text() == "earlier"
    assert names_in(tmp_path) == ["file"]


def test_a_full_disk_says_of_which_file(small_disk):
    disk = small_disk(64)
    atomic_write_text(disk / "file", "earlier")
    with pytest.raises(OSError, match="No space left on device") as error:
        atomic_write_text(disk / "file", "x" * 100_000)
    assert (error.value.errno, error.value.filename) == (errno.ENOSPC, str(disk / "file"))
    assert (disk / "file").read_text() == "earlier"
    assert names_in(disk) == ["file"]


def test_text_is_utf8_with_its_line_ends(tmp_path):
    atomic_write_text(tmp_path / "file", "农夫\r\n\ud800\n")
    assert (tmp_path / "file").read_bytes() == "农夫\r\n?\n".encode()


def test_what_a_killed_process_left_half_written_is_removed(tmp_path):
    code = (
        "import os, sys; from pathlib import Path; from lit_gpt.storage import atomic_open\n"
        "with atomic_open(Path(sys.argv[1])) as file:\n"
        "    file.write(b'half'); file.flush(); os._exit(9)"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "file"])
    assert done.returncode == 9
    (tmp_path / "kept").touch()
    assert len(names_in(tmp_path)) == 2
    remove_unfinished(tmp_path)
    assert names_in(tmp_path) == ["kept"]


def test_two_processes_may_write_the_same_file(tmp_path):
    path = tmp_path / "file"
    code = (
        "import sys; from pathlib import Path; from lit_gpt.storage import atomic_write_text\n"
        "atomic_write_text(Path(sys.argv[1]), 'theirs')"
    )
    with atomic_open(path) as file:
        file.write(b"our")
        subprocess.run([sys.executable, "-c", code, path], check=True)
        assert path.read_text() == "theirs"
        file.write(b"s")
    assert path.read_text() == "ours"
    assert names_in(tmp_path) == ["file"]


# Locks


def test_a_folder_has_one_holder_and_is_free_when_that_is_killed(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from lit_gpt.storage import locked\n"
        "with locked(Path(sys.argv[1])): print('held', flush=True); time.sleep(600)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, tmp_path], stdout=-1, text=True)
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(UserError) as error, locked(tmp_path, hint="wait"):
        pass
    assert str(error.value) == f"another process is using {tmp_path}; wait"
    holder.kill()
    holder.wait()
    with locked(tmp_path) as is_held:
        assert is_held


def test_a_temporary_folder_is_held_and_goes_with_all_that_is_in_it(tmp_path):
    with temporary_folder(tmp_path) as work:
        (work / "file").touch()
        with pytest.raises(UserError, match="another process is using"), locked(work):
            pass
    with pytest.raises(KeyboardInterrupt), temporary_folder(tmp_path):
        raise KeyboardInterrupt
    assert names_in(tmp_path) == []


# The cache


@pytest.mark.skipif(sys.platform != "linux", reason="each platform has its own place")
def test_the_default_cache_is_the_one_of_earlier_versions(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder(None) == cache_folder("~/.cache/lit_gpt") == tmp_path / ".cache/lit_gpt"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert cache_folder(None) == tmp_path / "x" / "lit_gpt"
    assert cache_folder("here") == Path("here")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["a\0b", "\ud800", "~nobody_at_all/x"])
def test_a_cache_that_is_not_a_name(name):
    with pytest.raises(UserError) as error:
        cache_folder(name)
    assert str(error.value) == f"cache {name!r}: not a valid folder name"


def test_a_link_at_the_temporary_name_is_not_followed(tmp_path):
    """In a stranger's folder it could lead to any file."""
    precious = tmp_path / "precious"
    precious.write_text("Chapter 1", encoding="utf-8")
    unfinished(tmp_path / "report.html").symlink_to(precious)
    atomic_write_text(tmp_path / "report.html", "page")
    assert precious.read_text(encoding="utf-8") == "Chapter 1"
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == "page"
    assert not (tmp_path / "report.html").is_symlink()


@pytest.mark.parametrize("path", [".", "/"])
def test_a_folder_is_not_written_as_a_file(path):
    with pytest.raises(IsADirectoryError):
        atomic_write_text(Path(path), "text")
