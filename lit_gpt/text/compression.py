"""Unpacking of .gz, .bz2, .xz and .zst files, piece by piece, whatever they expand to."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from lit_gpt.errors import UserError

PACKERS = ("gz", "bz2", "xz", "zst")  # as file names end
# Unpacking this much at a time yields at most 32 MB (zstd makes 128 KB out of 4 bytes), so memory
# stays bounded whatever a file expands to.
PACKED = 1 << 10  # bytes
UNPACKED = 1 << 18  # bytes that are passed on together
# Bytes of text that any .zst file may look back, as for the command zstd; and that a large one may,
# as `zstd --long=31` makes them. They are held in memory.
WINDOW = 1 << 27
LONG_WINDOW = 1 << 31
MAX_RATIO = 16  # of a window to the file: small files can't ask for gigabytes
XZ_MEMORY = 1 << 29  # bytes that decoding a .xz file may take; `xz -9` needs 65 MB
TOO_MUCH = ("Memory usage limit exceeded", "requires too much memory")  # in messages of xz and zstd


def unpack(path: Path, packed: str, chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Unpacks a file of one of PACKERS, one stream or several in a row; in the end yields b""."""
    new_decoder, failure = _decoder(path, packed)
    decoder = None
    parts: list[bytes] = []
    size = 0
    try:
        for chunk in chunks:
            for at in range(0, len(chunk), PACKED):
                piece = chunk[at : at + PACKED]
                while piece := piece if decoder else piece.lstrip(b"\0"):  # padding, as on tapes
                    decoder = decoder or new_decoder()
                    for part in _decompress(decoder, piece):
                        parts.append(part)
                        size += len(part)
                        if size >= UNPACKED:
                            yield b"".join(parts)
                            parts = []
                            size = 0
                    piece = decoder.unused_data
                    decoder = None if decoder.eof else decoder
    except failure as error:
        if any(words in str(error) for words in TOO_MUCH):
            problem = f"{path} needs too much memory to unpack"
            command = "xz -d" if packed == "xz" else "zstd -d --long=31"
            raise UserError(problem, hint=f"unpack it first, with {command}") from error
        raise UserError(
            f"{path} is not a valid .{packed} file ({error}): it is damaged or in another format"
        ) from error
    if decoder:
        raise UserError(f"{path} is truncated", hint="get the file again")
    if size:
        yield b"".join(parts)
    yield b""


def _decompress(decoder: Any, piece: bytes) -> Iterator[bytes]:
    """What a piece unpacks to; of .bz2 and .xz in parts, as 40 bytes of .bz2 may become 45 MB."""
    if not hasattr(decoder, "needs_input"):
        yield decoder.decompress(piece)
        return
    yield decoder.decompress(piece, UNPACKED)
    while not decoder.eof and not decoder.needs_input:
        yield decoder.decompress(b"", UNPACKED)


def _decoder(path: Path, packed: str) -> tuple[Callable[[], Any], type[Exception]]:
    """A maker of decoders, with `decompress`, `eof` and `unused_data`, and what these raise."""
    if packed == "gz":
        return lambda: zlib.decompressobj(wbits=31), zlib.error
    if packed == "bz2":
        import bz2

        return bz2.BZ2Decompressor, OSError
    if packed == "xz":
        import lzma

        return lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ, XZ_MEMORY), lzma.LZMAError
    try:
        import zstandard
    except ImportError as error:
        raise needs_package(path, "zstandard", "zstd") from error
    size = path.stat().st_size if path.is_file() else 0  # 0: it is in an archive
    window = min(max(WINDOW, MAX_RATIO * size), LONG_WINDOW)
    unpacker = zstandard.ZstdDecompressor(max_window_size=window)
    return unpacker.decompressobj, zstandard.ZstdError


def needs_package(path: Path, package: str, extra: str) -> UserError:
    return UserError(
        f"{path} needs the package {package}", hint=f'install it: pip install -e ".[{extra}]"'
    )
