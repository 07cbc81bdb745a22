"""The index of a token store: its shards, their checksums, the tokenizer, what the text was.

A store is one sequence of N tokens, in shards. A shard holds little-endian ids and after them the
CRC-32 of each of its pages, little-endian uint32, so that any part of it can be read by itself and
checked. The index has the CRC-32 of these, which is the shard's checksum, and is written last.
"""

from __future__ import annotations

import zlib
from dataclasses import asdict, dataclass
from functools import cached_property

import numpy as np

from lit_gpt import storage
from lit_gpt.errors import UserError
from lit_gpt.store.objects import AGAIN, MissingObject, Objects
from lit_gpt.text.finding import INDEX, STORE
from lit_gpt.text.token_file import CorpusInfo
from lit_gpt.text.tokenizer import Tokenizer

VERSION = 1  # of the format: raise it when what is stored changes
PAGE = 1 << 13  # tokens checked together


@dataclass(frozen=True)
class Shard:
    name: str
    num_tokens: int
    checksum: int  # CRC-32 of the pages' CRC-32s


def pack_shard(ids: np.ndarray) -> tuple[bytes, int]:
    """The content of a shard, and its checksum.

    Args:
        ids: (N,) uint16 or uint32.
    """
    content = ids.astype(ids.dtype.newbyteorder("<"), copy=False)
    pages = (content[at : at + PAGE] for at in range(0, len(content), PAGE))
    trailer = np.array([zlib.crc32(page.data) for page in pages], "<u4").tobytes()
    return b"".join([content.data, trailer]), zlib.crc32(trailer)


@dataclass(frozen=True)
class Index:
    """Plain data, but for `tokenizer` and what follows from it."""

    shards: list[Shard]
    dtype: str  # uint16 or uint32
    block_tokens: int  # read, and mixed with others, as a whole
    tokenizer_state: dict[str, str]  # Tokenizer.to_dict()
    tokenizer_option: str  # as the user named it
    info: CorpusInfo

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer.from_dict(self.tokenizer_state)

    @cached_property
    def ends(self) -> np.ndarray:
        """How many tokens there are up to the end of each shard, (number of shards,)."""
        return np.cumsum([shard.num_tokens for shard in self.shards])

    def to_json(self) -> bytes:
        value = {"format": STORE, "version": VERSION, "page_tokens": PAGE} | asdict(self)
        return storage.dump_json(value).encode()

    @classmethod
    def parse(cls, content: bytes) -> Index:
        """What `to_json` returned.

        Raises:
            ValueError: it is damaged, or of another version.
        """
        value = storage.parse_json(content.decode(), "its index")
        if value.pop("format") != STORE:
            raise ValueError("its index is of another format")
        version, page = value.pop("version"), value.pop("page_tokens")
        if (version, page) != (VERSION, PAGE):
            raise ValueError(f"its format is version {version}, and this lit_gpt reads {VERSION}")
        value["shards"] = [Shard(**shard) for shard in value["shards"]]
        value["info"] = CorpusInfo(**value["info"])
        index = cls(**value)
        sizes = [shard.num_tokens for shard in index.shards]
        if min(sizes, default=0) < 1 or sum(sizes) != index.info.num_tokens:
            raise ValueError("its index contradicts itself")
        if index.dtype not in ("uint16", "uint32") or index.block_tokens < 1:
            raise ValueError("its index contradicts itself")
        return index


def read_index(objects: Objects) -> Index:
    """The index of a finished store.

    Raises:
        UserError: there is none, or it is damaged.
    """
    try:
        return Index.parse(objects.get(INDEX))
    except MissingObject as error:
        raise UserError(
            f"has no {INDEX}, so it is not a token store, or not a finished one",
            field=objects.field,
            value=objects.place,
            hint="write one with `lit-gpt prepare`, or wait for its last task",
        ) from error
    except (ValueError, LookupError, TypeError) as error:
        reason = error if isinstance(error, ValueError) else "its index is damaged"
        raise UserError(
            f"can't be read: {reason}",
            field=objects.field,
            value=objects.place,
            hint=AGAIN,
        ) from error
