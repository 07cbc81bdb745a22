"""Which files a path names, and what is refused: real links, pipes, permissions and changes."""

import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from lit_gpt.errors import UserError
from lit_gpt.text import files as files_module
from lit_gpt.text.files import Reader, TextFiles
from lit_gpt.text.finding import SAMPLE, find_files
from tests.conftest import ROOT
from tests.text.conftest import unix, write

pytestmark = unix  # links, pipes and permissions


def names_in(root: Path) -> list[str]:
    return [str(path.relative_to(root)) for path in find_files(str(root))]


def read(
    files: list[Path], encoding: str = "utf-8", ends_files: bool = True
) -> tuple[str, dict[str, int]]:
    """The text, with | between files, and what was counted."""
    reader = Reader(TextFiles(files, encoding=encoding), ends_files=ends_files)
    return "".join("|" if part is None else part for part in reader), reader.counts


@pytest.fixture
def root(tmp_path) -> Path:
    (tmp_path / "texts").mkdir()
    return tmp_path / "texts"


# The sample text


def test_the_sample_text_is_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_files(SAMPLE) == [ROOT / SAMPLE]
    with pytest.raises(UserError, match="no such file or folder"):
        find_files(f"./{SAMPLE}")  # only the default itself
    own = write(tmp_path / SAMPLE)
    assert find_files(SAMPLE) == [own.relative_to(tmp_path)]


# Links


def test_a_link_to_a_folder_is_read(root, tmp_path):
    for name in ("1.txt", "deeper/2.txt"):
        write(tmp_path / "elsewhere" / name)
    (root / "link").symlink_to(tmp_path / "elsewhere")
    assert names_in(root) == ["link/1.txt", "link/deeper/2.txt"]


def test_a_link_to_a_file_is_read(root, tmp_path):
    (root / "link.txt").symlink_to(write(tmp_path / "elsewhere.txt"))
    assert names_in(root) == ["link.txt"]


def test_the_path_itself_may_be_a_link(root, tmp_path):
    write(root / "a")
    (tmp_path / "link").symlink_to(root)
    assert names_in(tmp_path / "link") == ["a"]


def test_a_hidden_link_is_left_out_and_a_link_into_a_hidden_folder_is_not(root):
    write(root / ".hidden" / "a")
    (root / ".link").symlink_to(root / ".hidden")
    (root / "link").symlink_to(root / ".hidden")
    assert names_in(root) == ["link/a"]


def test_loops_of_links_are_harmless(root):
    write(root / "a" / "1.txt")
    write(root / "b" / "2.txt")
    (root / "a" / "up").symlink_to(root)
    (root / "a" / "self").symlink_to(root / "a")
    (root / "b" / "a").symlink_to(root / "a")
    (root / "a" / "b").symlink_to(Path("..") / "b")
    assert names_in(root) == ["a/1.txt", "a/b/2.txt"]


def test_each_real_file_and_folder_is_read_once_at_its_first_name(root):
    write(root / "m" / "1.txt")
    write(root / "n.txt")
    (root / "a").symlink_to(root / "m")
    (root / "z").symlink_to(root / "m")
    (root / "o.txt").symlink_to(root / "n.txt")
    assert names_in(root) == ["a/1.txt", "n.txt"]


def test_hard_links_are_files_of_their_own(root):
    os.link(write(root / "a"), root / "b")
    assert names_in(root) == ["a", "b"]


def test_eleven_hundred_folders_inside_each_other(root):
    here = os.open(root, os.O_RDONLY)
    for _ in range(1100):  # by steps: a path of this length can't be made at once
        os.mkdir("d", dir_fd=here)
        inner = os.open("d", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = inner
    os.close(os.open("x", os.O_CREAT | os.O_WRONLY, dir_fd=here))
    os.close(here)
    try:
        assert names_in(root) == ["d/" * 1100 + "x"]
    finally:
        subprocess.run(["rm", "-r", root])  # Python's own rmtree gives up


# What is no text


@pytest.mark.parametrize("inside", [True, False], ids=["in a folder", "alone"])
@pytest.mark.parametrize("kind", ["pipe", "socket", "device"])
def test_what_is_no_file_is_refused(kind, inside, root):
    place = root / "it"
    if kind == "pipe":
        os.mkfifo(place)
    elif kind == "socket":
        socket.socket(socket.AF_UNIX).bind(os.path.relpath(place))  # short enough for a socket
    else:
        place.symlink_to("/dev/null")
    with pytest.raises(UserError, match=f"^path: {place} is a pipe, a socket or a device; name"):
        find_files(str(root if inside else place))


@pytest.mark.parametrize(
    ("target", "reason"),
    [("nowhere", "the link is broken"), ("it", "Too many levels of symbolic links")],
    ids=["broken", "ring"],
)
def test_a_link_that_leads_nowhere_is_refused(target, reason, root):
    (root / "it").symlink_to(root / target)
    with pytest.raises(UserError, match=f"^cannot read {root}/it: {reason}$"):
        find_files(str(root))
    with pytest.raises(UserError, match=f"^path '{root}/it': no such file or folder$"):
        find_files(str(root / "it"))


@pytest.mark.parametrize("path", ["", "a\0b", "\ud800", "~nobody_at_all/x", "~\0"])
def test_what_is_no_path(path):
    with pytest.raises(UserError, match=re.escape(f"path {path!r}: no such file or folder")):
        find_files(path)


def test_names_that_are_no_unicode(root):
    path = Path(os.fsdecode(os.fsencode(root) + b"/caf\xe9.txt"))
    try:
        write(path, b"\xff")
    except OSError:
        pytest.skip("this file system takes only names in Unicode")
    assert find_files(str(root)) == [path]
    with pytest.raises(UserError, match=r"caf\\udce9.txt is not utf-8 text"):
        read([path])


# Permissions, as another user


@pytest.fixture
def as_nobody():
    """`as_nobody(code, *args)`: Python code run by a user who may do nothing special."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        pytest.skip("only root can run something as another user")

    def run(code: str, *args: object) -> tuple[int, str]:
        code = (
            "import os, sys; from lit_gpt import command\n"
            "from lit_gpt.text import files, finding, corpus\n"
            f"os.setuid(65534)\nsys.exit(command.run(lambda: {code}))"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, *map(str, args)], capture_output=True, text=True
        )
        return done.returncode, done.stderr

    return run


@pytest.fixture
def public():
    """A folder that everybody may look into, which pytest's own is not."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("closed", "mode", "given", "named"),
    [
        ("a/x.txt", 0o000, "", "a/x.txt"),
        ("a/x.txt", 0o000, "a/x.txt", "a/x.txt"),
        ("a", 0o000, "", "a"),
        ("a", 0o444, "", "a/x.txt"),  # can be listed, not entered
        ("a", 0o000, "a", "a"),
        ("a", 0o000, "a/x.txt", "a/x.txt"),
    ],
)
def test_what_may_not_be_read_is_named(closed, mode, given, named, as_nobody, public):
    write(public / "a" / "x.txt")
    write(public / "b.txt")
    code = "files.Reader(files.TextFiles(sys.argv[1]))"
    (public / closed).chmod(mode)
    try:
        status, err = as_nobody(code, public / given)
    finally:
        (public / closed).chmod(0o755)
    assert (status, err) == (2, f"error: cannot read {public / named}: Permission denied\n")


def test_a_cache_that_may_not_be_written_is_named(as_nobody, public):
    code = (
        "corpus.load_corpus(files.TextFiles(sys.argv[1], cache=sys.argv[2]), "
        "corpus.Vocabulary('bytes'))"
    )
    status, err = as_nobody(code, write(public / "x.txt"), public / "cache")
    assert (status, err) == (
        2,
        f"error: --cache: cannot store the tokens in {public}/cache: Permission denied; "
        "name another folder\n",
    )


# The text


@pytest.mark.parametrize("chunk", [4, 64])
@pytest.mark.parametrize(
    "encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "gb18030"]
)
def test_a_byte_order_mark_is_counted_in_every_encoding(encoding, chunk, root, monkeypatch):
    """One for each file: a second one in a row is text, and so is one inside."""
    monkeypatch.setattr(files_module, "CHUNK", chunk)
    mark = "" if encoding in files_module.BOMS else "\ufeff"  # else Python writes one
    texts = ["\ufeffone\n", "", "t\ufeffwo\n"]
    files = [write(root / f"{i}", (mark + t).encode(encoding)) for i, t in enumerate(texts)]
    text, counts = read(files, encoding)
    assert (text, counts["removed_boms"]) == ("\ufeffone\n|t\ufeffwo\n", 3)


@pytest.mark.parametrize("chunk", [4, 64])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-32"])
@pytest.mark.parametrize(
    ("texts", "text", "added"),
    [
        (["one", "two"], "one\ntwo", 1),
        (["one\n", "two\r\n", "three"], "one\ntwo\r\nthree", 0),
        (["one", "", "", "two"], "one\ntwo", 1),
        (["one", "\n", "two", "\n"], "one\n\ntwo\n\n", 2),
        (["one\r", "two"], "one\r\ntwo", 1),
        (["", "one", ""], "one", 0),
    ],
)
def test_what_is_put_between_files_is_counted(
    texts, text, added, encoding, chunk, root, monkeypatch
):
    """Ends of text, or line ends for a model that knows none."""
    monkeypatch.setattr(files_module, "CHUNK", chunk)
    files = [write(root / f"{i}", part.encode(encoding)) for i, part in enumerate(texts)]
    found, counts = read(files, encoding, ends_files=False)
    assert (found, counts["added_line_ends"], counts["file_ends"]) == (text, added, 0)
    some = [part for part in texts if part]
    found, counts = read(files, encoding)
    assert (found, counts["added_line_ends"]) == ("|".join(some), 0)
    assert counts["file_ends"] == len(some) - 1


@pytest.mark.parametrize(
    ("content", "encoding", "message"),
    [
        (b"+2AA-", "utf-7", "{} is not utf-7 text: 'utf-8' codec can't encode"),
        (b"a\\ud800", "unicode_escape", "{} is not unicode_escape text: 'utf-8' codec"),
        (b"a\xed\xa0\x80", "utf-8", "{} is not utf-8 text (byte 0xed at offset 1)"),
        (b"\x00\xd8a\0", "utf-16-le", "{} is not utf-16-le text (byte 0x00 at offset 0)"),
        ("ab\0".encode("utf-16"), "utf-16", "{} looks like a binary file (NUL byte); leave it out"),
        ("农a\0".encode(), "utf-8", "{} looks like a binary file (NUL byte at offset 4); leave"),
        (b"x", "undefined", "{} is not undefined text: undefined encoding"),
        (b"x", "idna", "encoding 'idna': unknown encoding; try utf-8"),
        (b"x", "punycode", "encoding 'punycode': unknown encoding; try utf-8"),
        (b"x", "utf\0", "encoding 'utf\\x00': unknown encoding; try utf-8"),
        (b"x", "\ud800", "encoding '\\ud800': unknown encoding; try utf-8"),
        (b"x", "", "encoding '': unknown encoding; try utf-8"),
    ],
)
def test_text_that_cannot_be_kept_is_refused(content, encoding, message, root):
    path = write(root / "x", content)
    with pytest.raises(UserError, match=re.escape(message.format(path))):
        read([path], encoding)


# Changes while it is read


def overwrite(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-10, os.SEEK_END)
        file.write(b"0123456789")


def become_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


CHANGED = "{root} changed while it was being read; start again"
CHANGES = {  # done to the file being read, or to the one after it: what comes of it
    "append": (lambda path: path.write_bytes(path.read_bytes() + b"!"), CHANGED, CHANGED),
    "truncate": (lambda path: os.truncate(path, 50_000), CHANGED, CHANGED),
    "empty": (lambda path: os.truncate(path, 0), CHANGED, CHANGED),
    "overwrite": (overwrite, CHANGED, CHANGED),
    "vanish": (Path.unlink, None, "cannot read {root}/b.txt: No such file or directory"),
    "become a folder": (become_a_folder, None, "cannot read {root}/b.txt: Is a directory"),
    "touch": (Path.touch, None, None),
    "a new file": (lambda path: write(path.with_name("c.txt")), None, None),
}


@pytest.mark.parametrize("name", ["a.txt", "b.txt"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_while_reading_is_noticed_or_without_effect(change, name, root):
    files = [write(root / n, b"0 text\r\n" * 200_000) for n in ("a.txt", "b.txt")]  # two chunks
    reader = Reader(TextFiles(files))
    do, *messages = CHANGES[change]
    message = messages[name == "b.txt"]

    def read_on() -> str:
        parts = iter(reader)
        first = next(parts)
        do(root / name)
        return first + "".join(part or "|" for part in parts)

    if message is None:
        text = read_on()
        assert text == "|".join(["0 text\r\n" * 200_000] * 2)
    else:
        with pytest.raises(UserError, match=f"^{message.format(root=root)}$"):
            read_on()


def test_a_file_that_vanishes_before_it_is_read(root, monkeypatch):
    found = [write(root / "a"), root / "b"]
    monkeypatch.setattr(files_module, "find_files", lambda *_: found)
    with pytest.raises(UserError, match=f"^cannot read {root}/b: No such file or directory$"):
        Reader(TextFiles(str(root)))
