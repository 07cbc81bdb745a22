"""Archives: their files in order, each in its own format; damage, bombs and hostile names."""

import bz2
import gzip
import io
import json
import lzma
import re
import tarfile
import tracemalloc
import zipfile
from pathlib import Path

import pytest

from lit_gpt.errors import UserError
from lit_gpt.text.files import Reader, TextFiles
from tests.text.conftest import write

FILES = {
    "b/2.txt": b"two\n",
    "a.txt": "农夫".encode(),
    "b/.hidden/x": b"\0",
    "__MACOSX/._a.txt": b"\0",
    "b/1.txt.gz": gzip.compress(b"one\n"),
    "b-.txt": b"minus",
}
TAR = {  # how each ending is written
    ".tar": bytes,
    ".tar.gz": gzip.compress,
    ".tgz": gzip.compress,
    ".tar.bz2": bz2.compress,
    ".TAR.xz": lzma.compress,
    ".txz": lzma.compress,
}


def zipped(files: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", method) as archive:
        archive.mkdir("b")
        for name, data in files.items():
            archive.writestr(name, data)
    return content.getvalue()


def tarred(files: dict[str, bytes], form: int = tarfile.PAX_FORMAT) -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w", format=form) as archive:
        link = tarfile.TarInfo("link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return content.getvalue()


def reader(path: Path, field: str | None = None) -> Reader:
    return Reader(TextFiles(str(path), text_field=field))


def text(path: Path, field: str | None = None) -> str:
    return "".join("|" if part is None else part for part in reader(path, field))


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as error:
        text(path)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_zip_is_read_as_the_folder_that_it_holds(method, tmp_path):
    for name, content in FILES.items():
        write(tmp_path / "folder" / name, content)
    write(tmp_path / "x.zip", zipped(FILES, method))
    assert text(tmp_path / "x.zip") == "农夫|one\n|two\n|minus"
    assert text(tmp_path / "folder") == text(tmp_path / "x.zip")


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
@pytest.mark.parametrize("ending", TAR)
def test_a_tar_is_read_as_it_comes(ending, form, tmp_path):
    files = {f"{'long' * 40}/ä.txt": b"first\n", "../etc/x": b"zero\n"} | FILES
    write(tmp_path / f"x{ending}", TAR[ending](tarred(files, form)))
    assert text(tmp_path / f"x{ending}") == "first\n|zero\n|two\n|农夫|one\n|minus"


@pytest.mark.parametrize("kind", ["x.zip", "x.tgz"])
def test_each_file_has_the_format_of_its_name(kind, tmp_path):
    rows = "".join(json.dumps({"text": t, "body": t.upper()}) + "\n" for t in ("one", "two"))
    files = {"a.jsonl": rows.encode(), "b.csv": b"text,body\nc,C\n", "c.txt": b"plain"}
    write(
        tmp_path / kind, (zipped if kind == "x.zip" else lambda f: gzip.compress(tarred(f)))(files)
    )
    assert text(tmp_path / kind) == "one|two|text,body\nc,C\n|plain|"
    assert text(tmp_path / kind, "body") == "ONE|TWO|C|plain|"
    prints = {reader(tmp_path / kind, field).fingerprint for field in (None, "body", "text")}
    assert len(prints) == 3


@pytest.mark.parametrize("kind", ["x.zip", "x.tgz"])
def test_files_in_an_archive_are_excluded_and_counted(kind, tmp_path):
    files = {"a.txt": b"a\n", "p.png": b"\x89PNG\r\n\x1a\n\0", "old/b.txt": b"b\n"}
    files |= {"old/c/d.txt": b"d\n", "new/old.txt": b"n\n", "new/e.jsonl": b"{}"}
    write(
        tmp_path / kind, (zipped if kind == "x.zip" else lambda f: gzip.compress(tarred(f)))(files)
    )
    globs = ["*.png", "old", "new/*.jsonl", "d.txt", "x"]
    reader = Reader(TextFiles(str(tmp_path / kind), exclude=globs))
    assert [*reader] == [*reader] == ["a\n", None, "n\n"]
    assert [reader.excluded[glob] for glob in globs] == [1, 2, 1, 0, 0]
    other = Reader(TextFiles(str(tmp_path / kind), exclude=[*globs, "a.txt"]))
    assert other.fingerprint != reader.fingerprint
    assert "".join(other) == "n\n"


def test_parquet_files_in_archives(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = io.BytesIO()
    parquet.write_table(pyarrow.table({"text": ["one", "two"]}), table)
    write(tmp_path / "x.zip", zipped({"a.parquet": table.getvalue()}))
    write(tmp_path / "x.tar", tarred({"a.parquet": table.getvalue()}))
    assert text(tmp_path / "x.zip") == text(tmp_path / "x.tar") == "one|two|"


def test_archives_among_other_files(tmp_path):
    write(tmp_path / "folder" / "1.txt", b"one")
    write(tmp_path / "folder" / "2.zip", zipped({"x": b"two"}))
    write(tmp_path / "folder" / "3.txt", b"three")
    assert text(tmp_path / "folder") == "one|two|three"


def encrypted() -> bytes:
    content = bytearray(zipped({"a.txt": b"text"}, zipfile.ZIP_STORED))
    for signature, at in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        content[content.rfind(signature) + at] |= 1
    return bytes(content)


def with_a_huge_header() -> bytes:
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 1 << 32
    return info.tobuf() + bytes(1 << 20)


CONTENT = b"text " * 1000
BAD = {
    "no.zip": (b"text", "{} is not a valid .zip file (File is not a zip file): it is damaged"),
    "no.tar": (b"text" * 1000, "{} is not a valid .tar file ("),
    "no.tgz": (gzip.compress(b"text" * 1000), "{} is not a valid .tar file ("),
    "cut.zip": (zipped({"a": CONTENT})[:-9], "{} is not a valid .zip file (File is not a zip"),
    "cut.tar": (tarred({"a": CONTENT})[:3000], "{} is not a valid .tar file (unexpected end"),
    "cut.tgz": (gzip.compress(tarred({"a": CONTENT}))[:-9], "{} is truncated; get the file again"),
    "end.tar": (tarred({"a": CONTENT, "b": CONTENT})[:6400], "{} is damaged or truncated"),
    "secret.zip": (encrypted(), "{} is encrypted; unpack it with its password"),
    "lzma.zip": (
        zipped({"a": CONTENT}, zipfile.ZIP_LZMA),
        "{} is compressed in an unusual way ('a' by method 14); unpack it",
    ),
    "bzip2.zip": (
        zipped({"a": CONTENT}, zipfile.ZIP_BZIP2),
        "{} is compressed in an unusual way ('a' by method 12); unpack it",
    ),
    "nested.zip": (
        zipped({"in.zip": zipped({"a": CONTENT})}),
        "{0}/in.zip is an archive in an archive; unpack {0}",
    ),
    "image.zip": (
        zipped({"a.txt": CONTENT, "b.png": b"\x89PNG\r\n\x1a\n\0"}),
        "{}/b.png is an image (PNG), not text; leave it out",
    ),
    "name.zip": (zipped({"a\x1b[31m\n.txt": b"\xff"}), "{}/a?[31m?.txt is not utf-8 text (byte"),
    "none.zip": (zipped({".hidden": b"text"}), "path: no text in {}; name a file that has some"),
    "header.tar": (with_a_huge_header(), "{} is not a valid .tar file (a header of 4,294,967,"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_read_is_one_line(name, tmp_path):
    content, message = BAD[name]
    said = refusal(write(tmp_path / name, content))
    assert said.startswith(message.format(tmp_path / name)), said


@pytest.mark.parametrize("at", [0.05, 0.3, 0.5, 0.7])
def test_a_damaged_zip_is_refused(at, tmp_path):
    content = bytearray(zipped({"a": bytes(range(97, 123)) * 99}, zipfile.ZIP_STORED))
    content[int(len(content) * at)] ^= 1
    assert str(tmp_path / "x.zip") in refusal(write(tmp_path / "x.zip", bytes(content)))


def test_damaged_headers_of_a_tar_do_not_end_it(tmp_path):
    content = tarred({"a": CONTENT, "b": CONTENT})
    header = content.index(b"b" + bytes(99))
    damaged = content[:header] + b"c" + content[header + 1 :]
    with pytest.raises(UserError, match="damaged or truncated"):
        text(write(tmp_path / "x.tar", damaged))
    with pytest.raises(UserError, match="damaged or truncated"):
        text(write(tmp_path / "y.tar", content + content))  # two in a row


@pytest.mark.parametrize("name", ["x.zip", "x.tgz", "x.tar.bz2", "x.txz"])
def test_bombs_fill_no_memory(name, tmp_path):
    plain = b"a" * (1 << 26)
    pack = {"x.tgz": gzip.compress, "x.tar.bz2": bz2.compress, "x.txz": lzma.compress}.get(name)
    content = pack(tarred({"a.txt": plain})) if pack else zipped({"a.txt": plain})
    path = write(tmp_path / name, content)
    del plain
    tracemalloc.start()
    assert sum(map(len, reader(path))) == 1 << 26
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 60e6


def test_an_archive_that_changes_is_noticed(tmp_path):
    path = write(tmp_path / "x.zip", zipped({"a": b"one", "b": b"two"}))
    parts = iter(reader(path))
    next(parts)
    with path.open("ab") as file:
        file.write(b"!")
    with pytest.raises(UserError, match=f"^{re.escape(str(path))} changed while it was being read"):
        list(parts)


def test_nothing_is_written_to_disk(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "nowhere"))
    path = write(tmp_path / "in" / "x.zip", zipped({"../../evil.txt": b"evil"}))
    assert text(path) == "evil"
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == [path]
