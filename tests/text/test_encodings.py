"""Files that are not UTF-8 text: named for what they are, or a suggestion that reads them right."""

import io
import re
import sqlite3
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from lit_gpt.errors import UserError
from lit_gpt.text.files import Reader, TextFiles
from tests.conftest import ROOT
from tests.text.conftest import write

SENTENCES = {
    "Größe über alles.": ["latin-1"],
    "L'été dernier, où étais-tu ? Ça va très bien, garçon.": ["cp1252", "utf-16-le"],
    "¿Dónde está la niña? ¡Mañana será otro día!": ["latin-1"],
    "Zażółć gęślą jaźń. Dzisiaj jest bardzo ładna pogoda.": ["cp1250"],
    "Сегодня очень хорошая погода, пойдём гулять в парк.": ["cp1251", "koi8-r"],
    "今天天气很好，我们一起去公园散步吧。": ["gbk", "gb18030", "utf-16-le", "utf-16-be"],
    "农夫山泉": ["gbk", "utf-16-le"],
    "The price of 农夫山泉 is 2 yuan.\nNext line": ["gb18030", "utf-16-le", "utf-16-be"],
    "今天天氣很好，我們一起去公園散步吧。臺灣的夏天非常炎熱。": ["big5", "utf-16-le"],
    "今日はとても天気がいいので、公園を散歩しましょう。": ["shift_jis", "utf-16-le"],
    "川は街を流れ、人々は橋の上から景色を眺める。朝は静かだった。": ["shift_jis", "euc_jp"],
    "오늘은 날씨가 아주 좋아서 공원에서 산책합시다.": ["euc_kr"],
    "plain English with a “quote”": ["cp1252", "utf-16-le", "utf-16-be"],
    "In German it is Größe, and in the same line there is a lot of English.": ["latin-1"],
    "纯棉T恤 圆领 男女同款，A股上市公司。": ["gbk"],
}
CASES = [(text, encoding) for text, encodings in SENTENCES.items() for encoding in encodings]


def refusal(path: Path, encoding: str = "utf-8") -> str:
    with pytest.raises(UserError) as error:
        list(Reader(TextFiles(str(path), encoding=encoding)))
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(("text", "encoding"), CASES)
@pytest.mark.parametrize("times", [1, 30])
def test_what_is_suggested_reads_the_text_right(text, encoding, times, tmp_path):
    path = write(tmp_path / "x.txt", (text * times).encode(encoding))
    said = refusal(path)
    found = re.search(r"`?encoding`?: (?:probably|perhaps) ([\w-]+), which reads ['\"]", said)
    assert found, said
    again = Reader(TextFiles(str(path), encoding=found.group(1)))
    assert "".join(again) == text * times


@pytest.mark.parametrize(
    "text", ["Être déçu à l'été, ça gêne.", "Får får får? Nej, får får lamm. Åäö"]
)
def test_what_might_be_western_is_never_sure_to_be_something_else(text, tmp_path):
    said = refusal(write(tmp_path / "x.txt", text.encode("cp1252")))
    assert "perhaps" in said
    assert "cp1252" in said
    assert "shift_jis" not in said  # of which a letter inside of a word would be half a character


def test_the_suggestion_says_how_sure_it_is_and_shows_the_text(tmp_path):
    said = refusal(write(tmp_path / "x.txt", "Größe über alles.".encode("latin-1")))
    assert said == (
        f"{tmp_path / 'x.txt'} is not utf-8 text (byte 0xf6 at offset 2); name its encoding with "
        "encoding: probably cp1252, which reads 'Größe über alles.'"
    )
    said = refusal(write(tmp_path / "x.txt", "où étais-tu ?".encode("latin-1")))
    assert "perhaps cp1252, which reads 'où étais-tu ?'; or cp1250" in said


def test_far_into_a_file_the_place_itself_is_looked_at(tmp_path):
    content = b"plain line\n" * 200_000 + "Größe über alles.\n".encode("latin-1")
    said = refusal(write(tmp_path / "x.txt", content))
    assert "probably cp1252" in said
    assert "Größe über" in said


def test_a_damaged_text_is_not_given_another_encoding(tmp_path):
    text = "Größe über alles. " * 20
    said = refusal(write(tmp_path / "x.txt", text.encode() + b"\xff" + text.encode()))
    assert "nearly all of it is utf-8, so it is damaged there" in said
    said = refusal(write(tmp_path / "x.txt", text.encode()), "ascii")
    assert said.endswith("name its encoding with encoding: probably utf-8")


def office(*names: str) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("[Content_Types].xml", "<Types/>")
        for name in names:
            archive.writestr(name, "<x/>")
    return content.getvalue()


def database(folder: Path) -> bytes:
    connection = sqlite3.connect(folder / "x.db")
    connection.execute("create table t (a text)")
    connection.commit()
    connection.close()
    return (folder / "x.db").read_bytes()


@pytest.mark.parametrize(
    ("content", "kind", "hint"),
    [
        (b"%PDF-1.4\nall ASCII", "a PDF file", "convert it to text, for example with pdftotext"),
        (b"%PDF-1.7\n%\xe2\xe3", "a PDF file", "convert it to text, for example with pdftotext"),
        (b"{\\rtf1 text}", "a rich-text (RTF) file", "save it as plain text"),
        (office("word/document.xml"), "a Word document (.docx)", "save it as plain text or .csv"),
        (office("xl/workbook.xml"), "an Excel workbook (.xlsx)", "save it as plain text or .csv"),
        (office("other"), "a zip archive", "name it .zip"),
        (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(500), "an old Office file (.doc,", "save it"),
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "an image (PNG)", "leave it out, in a folder"),
        (b"\xff\xd8\xff\xe0\0\x10JFIF", "an image (JPEG)", "leave it out"),
        (b"\x1f\x8b\x08\0\0\0\0\0", "a gzip file", "name it .gz"),
        (database, "an SQLite database", "export its text as .csv"),
        (b"\x7fELF\2\1\1\0", "a program", "leave it out"),
    ],
)
def test_what_is_no_text_is_named(content, kind, hint, tmp_path):
    content = content(tmp_path) if callable(content) else content
    path = write(tmp_path / "x.txt", content)
    assert refusal(path).startswith(f"{path} is {kind}")
    assert f", not text; {hint}" in refusal(path)


@pytest.mark.parametrize(
    "content", [b"\0" * 5000, bytes(range(256)) * 20, b"a\0b\xff\0\0\1\2" * 99]
)
def test_bytes_of_any_kind_are_not_taken_for_text(content, tmp_path):
    said = refusal(write(tmp_path / "x.txt", content))
    assert "looks like a binary file" in said or "name its encoding with encoding, or" in said


def test_the_detector_is_imported_only_when_it_is_needed(tmp_path):
    code = (
        "import sys; from lit_gpt.text.files import Reader, TextFiles\n"
        "list(Reader(TextFiles(sys.argv[1])))\n"
        "sys.exit('charset_normalizer' in sys.modules)"
    )
    words = [sys.executable, "-c", code, str(write(tmp_path / "x.txt"))]
    assert subprocess.run(words, cwd=ROOT).returncode == 0
