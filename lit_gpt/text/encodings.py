"""What a file is that can't be read as text: another format, or text in another encoding."""

from __future__ import annotations

import codecs
import re

BEGINNINGS = (  # of files that are no text: bytes, and the offset where they stand
    (b"%PDF-", 0, "a PDF file", "convert it to text, for example with pdftotext"),
    (b"{\\rtf", 0, "a rich-text (RTF) file", "save it as plain text"),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", 0, "an old Office file (.doc, .xls, .ppt)", None),
    (b"SQLite format 3\0", 0, "an SQLite database", "export its text as .csv"),
    (b"PAR1", 0, "a Parquet file", "name it .parquet"),
    (b"ARROW1", 0, "an Arrow file", "save it as .parquet"),
    (b"\x1f\x8b\x08", 0, "a gzip file", "name it .gz"),
    (b"BZh", 0, "a bzip2 file", "name it .bz2"),
    (b"\xfd7zXZ\0", 0, "an xz file", "name it .xz"),
    (b"\x28\xb5\x2f\xfd", 0, "a zstd file", "name it .zst"),
    (b"7z\xbc\xaf\x27\x1c", 0, "a 7z archive", "unpack it"),
    (b"Rar!\x1a\x07", 0, "a RAR archive", "unpack it"),
    (b"ustar", 257, "a tar archive", "name it .tar"),
    (b"\x89PNG\r\n\x1a\n", 0, "an image (PNG)", ""),
    (b"\xff\xd8\xff", 0, "an image (JPEG)", ""),
    (b"GIF8", 0, "an image (GIF)", ""),
    (b"BM", 0, "an image (BMP)", ""),
    (b"ftypheic", 4, "an image (HEIC)", ""),
    (b"ftypavif", 4, "an image (AVIF)", ""),
    (b"II*\0", 0, "an image (TIFF)", ""),
    (b"MM\0*", 0, "an image (TIFF)", ""),
    (b"WEBP", 8, "an image (WebP)", ""),
    (b"WAVE", 8, "a sound file (WAV)", ""),
    (b"ID3", 0, "a sound file (MP3)", ""),
    (b"OggS", 0, "a sound file (Ogg)", ""),
    (b"fLaC", 0, "a sound file (FLAC)", ""),
    (b"ftyp", 4, "a video or sound file (MP4)", ""),
    (b"\x1aE\xdf\xa3", 0, "a video file (Matroska)", ""),
    (b"\x7fELF", 0, "a program", ""),
    (b"MZ", 0, "a program (Windows)", ""),
    (b"\xcf\xfa\xed\xfe", 0, "a program (macOS)", ""),
    (b"\xca\xfe\xba\xbe", 0, "a program (Java or macOS)", ""),
    (b"\x89HDF\r\n\x1a\n", 0, "an HDF5 file", ""),
    (b"\x93NUMPY", 0, "a NumPy array", ""),
)
MARKUP = (b"%PDF-", b"{\\rtf")  # may be ASCII throughout, yet is not text to read
OFFICE = {  # by the folder that a zip-based one has
    b"word/": "a Word document (.docx)",
    b"xl/": "an Excel workbook (.xlsx)",
    b"ppt/": "a PowerPoint presentation (.pptx)",
    b"mimetypeapplication/epub": "an e-book (.epub)",
    b"mimetypeapplication/vnd.oasis.opendocument": "an OpenDocument file (.odt, .ods, .odp)",
}
SAVE_AS_TEXT = "save it as plain text or .csv"
LEAVE_OUT = "leave it out, in a folder or archive with `exclude`"

# What texts are in that are neither UTF-8 nor marked.
MANY_BYTES = ("utf_16_le", "utf_16_be", "gb18030", "big5", "cp932", "euc_jp", "cp949")
ONE_BYTE = (
    "cp1252",
    "cp1250",
    "cp1251",
    "koi8_r",
    "cp1253",
    "cp1254",
    "cp1255",
    "cp1256",
    "cp1257",
)
LATIN = ("cp1250", "cp1254", "cp1257")  # differ from cp1252 in a few letters
KANA = re.compile(r"[\u3041-\u30fa]")  # only Japanese has these
MAX_RIVALS = 2
SAMPLED = 1 << 16  # bytes: the beginning of a file, or what is around the byte in question
SHOWN = 24  # characters of an example
BAD = re.compile(r"[\x00-\x08\x0e-\x1f\x7f-\x9f\ufffd\ufffe\uffff\ue000-\uf8ff]")
BEYOND = re.compile(r"[^\x00-\x7f]+")
GLUED = re.compile(
    r"[A-Za-z][^\x00-\x7f]{1,2}(?![^\x00-\x7f])|(?<![^\x00-\x7f])[^\x00-\x7f]{1,2}(?=[a-z])"
)


def format_of_bytes(head: bytes) -> tuple[str, str] | None:
    """What a file is that begins like this, and what to do; None if it may be text.

    Args:
        head: its first bytes, at least 512 if it has them.
    """
    if head.startswith(b"PK\x03\x04"):
        for part, kind in OFFICE.items():
            if part in head:
                return kind, SAVE_AS_TEXT
        if b"/data.pkl" in head:
            return "a PyTorch checkpoint", LEAVE_OUT
        return "a zip archive", "name it .zip"
    for beginning, at, kind, hint in BEGINNINGS:
        if head.startswith(beginning, at):
            return kind, SAVE_AS_TEXT if hint is None else hint or LEAVE_OUT
    return None


def suggest_encoding(sample: bytes, at: int, tried: str) -> str:
    """A hint: which encoding a text seems to have, how sure that is, and how it would read.

    Args:
        sample: bytes of the text, from the start of a character.
        at: the first byte that can't be read.
        tried: the codec that can't read it.
    """
    if sample.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "name its encoding with `encoding`: utf-16, as it begins with the mark of that"
    if is_mostly(sample, tried):
        return f"nearly all of it is {tried}, so it is damaged there: repair it"
    if is_mostly(sample, "utf-8"):
        return "name its encoding with `encoding`: probably utf-8"
    found = detect(sample)
    if not found:
        return "name its encoding with `encoding`, or convert it to UTF-8"
    first, *others = found
    text = decode(sample, first) or ""
    place = max(0, len(decode(sample[:at], first) or "") - SHOWN // 2)
    example = " ".join(text[place : place + SHOWN].split())
    rivals = [name for name in others if decode(sample, name) != text][:MAX_RIVALS]
    sure = "perhaps" if rivals else "probably"
    instead = f"; or {' or '.join(rivals)}" if rivals else ""
    return f"name its encoding with `encoding`: {sure} {first}, which reads {example!r}{instead}"


def is_mostly(sample: bytes, name: str) -> bool:
    """Whether what is beyond ASCII is of this codec but for a few bytes."""
    text = sample.decode(name, "replace")
    beyond = sum(character > "\x7f" for character in text)
    return beyond > 0 and text.count("\ufffd") <= beyond // 5


def detect(sample: bytes) -> list[str]:
    """Encodings that may be the text's, the likeliest first."""
    import charset_normalizer

    if b"\0" not in sample:  # only lines beyond ASCII tell its encodings apart
        lines = sample.splitlines(keepends=True)
        sample = b"".join(line for line in lines if not line.isascii())
    sample = sample[:SAMPLED]
    matches = charset_normalizer.from_bytes(sample, cp_isolation=[*MANY_BYTES, *ONE_BYTE])
    likely: list[tuple[bool, float, int, str]] = []
    for rank, match in enumerate(matches):
        for name in {match.encoding, *match.could_be_from_charset}:
            text = decode(sample, name)
            if text is None or BAD.search(text):
                continue
            if name in MANY_BYTES and (name.startswith("utf_16") or not is_glued(text)):
                is_japanese = 5 * len(KANA.findall(text)) > sum(char > "\x7f" for char in text)
                likely.append((not is_japanese, match.chaos, rank, name))
            elif name in ONE_BYTE:  # of those that are equally clean, the most common
                likely.append((True, match.chaos, len(matches) + ONE_BYTE.index(name), name))
    names = [name for *_, name in sorted(likely)]
    if names and names[0] in LATIN and "cp1252" not in names and decode(sample, "cp1252"):
        names.insert(1, "cp1252")  # rejected too easily, as for short French texts
    return [common_name(sample, name) for name in names]


def is_glued(text: str) -> bool:
    """Whether most characters beyond ASCII stand inside words of ASCII, as in "Gr鲞e"."""
    return 2 * len(GLUED.findall(text)) > len(BEYOND.findall(text))


def common_name(sample: bytes, name: str) -> str:
    """What people call a codec, where that decodes the text too."""
    common = {"cp932": "shift_jis", "cp949": "euc_kr"}.get(name, name)
    if decode(sample, common) != decode(sample, name):
        common = name
    return common.replace("utf_16_", "utf-16-")


def decode(sample: bytes, name: str) -> str | None:
    """The text, without a character that the end cuts in two; None if it is not of this codec."""
    try:
        return codecs.getincrementaldecoder(name)().decode(sample)
    except UnicodeError:
        return None
