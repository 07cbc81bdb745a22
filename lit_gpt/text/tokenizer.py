"""Owns text <-> token ids: tiktoken encodings, built offline, and compact ones for one corpus."""

from __future__ import annotations

import base64
import codecs
import copy
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import numpy as np
import tiktoken

# Split patterns and sha256 of the vocabulary files, both as tiktoken pins them
# (tiktoken_ext/openai_public.py), and the number of ordinary tokens.
OFFLINE = {
    "cl100k_base": (
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
        r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s",
        "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7",
        100_256,
    ),
    "o200k_base": (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
        r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
        r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d",
        199_998,
    ),
}
BYTES = "bytes"
END_OF_TEXT = b"\n\n"  # how the end of a document reads: as a blank line


class Tokenizer:
    """Text to ids and back, without loss: all text is ordinary text, `<|endoftext|>` included.

    The one token that no text encodes to is `end_of_text`, after each document; only a tokenizer
    from `with_end_of_text` has it.

    Args:
        name: where the vocabulary comes from, as given to `load_tokenizer`.
        pattern: regular expression that splits text into pieces; merges stay inside a piece.
        tokens: the bytes of token 0, 1, ...: all 256 single bytes, merges in the order of rank.
    """

    def __init__(self, name: str, pattern: str, tokens: list[bytes]) -> None:
        self.name, self.pattern, self.tokens = name, pattern, tokens
        self.fast: Any = None  # splintr's tokenizer, where it gives the same ids, sooner
        self.ranks = {token: rank for rank, token in enumerate(tokens)}
        self.encoding = tiktoken.Encoding(
            name, pat_str=pattern, mergeable_ranks=self.ranks, special_tokens={}
        )
        self.end_of_text: int | None = None
        self._may_follow: dict[bytes, np.ndarray] = {}

    def with_end_of_text(self) -> Tokenizer:
        """The same with one more token, the last, for the end of a document.

        It reads as END_OF_TEXT, but counts as no bytes of text and may not cut a character.
        """
        new = copy.copy(self)  # the ranks, so how text is split, stay as they are
        new.end_of_text = len(self.tokens)
        new.tokens, new._may_follow = [*self.tokens, END_OF_TEXT], {}
        return new

    @property
    def vocab_size(self) -> int:
        return len(self.tokens)

    def encode(self, text: str) -> np.ndarray:
        """Text to ids, (N,) uint32."""
        if self.name == BYTES:
            return np.frombuffer(text.encode(), np.uint8).astype(np.uint32)
        if self.fast:
            return np.frombuffer(self.fast.encode_flat(text), np.dtype("<u4"))
        try:
            return self.encoding.encode_to_numpy(text, disallowed_special=())
        except UnicodeEncodeError:
            raise
        except ValueError:  # its regular expression gives up on a million blanks in a row
            half = len(text) // 2
            return np.concatenate([self.encode(text[:half]), self.encode(text[half:])])

    def encode_parts(self, texts: list[str | None]) -> np.ndarray:
        """Ids of one text after the other, (N,) uint32; splintr does so on all cores.

        None stands for the end of a document, a token of its own.
        """
        parts = [text for text in texts if text is not None]
        if self.fast:
            ids, starts = map(np.frombuffer, self.fast.encode_batch_flat(parts), ("<u4", "<u8"))
        else:
            rows = [self.encode(text) for text in parts]
            ids = np.concatenate([np.zeros(0, np.uint32), *rows])
            starts = np.cumsum([0, *map(len, rows)])
        if len(parts) == len(texts):
            return ids
        before = np.cumsum([text is not None for text in texts])  # parts, at each of the texts
        ends = [count for count, text in zip(before, texts, strict=True) if text is None]
        return np.insert(ids, starts[ends].astype(np.int64), self.end_of_text)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return b"".join(self.tokens[i] for i in ids)

    def decode(self, ids: Iterable[int]) -> str:
        """Ids to text; bytes that are no UTF-8 (a character cut in two) show as U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def may_follow(self, begun: bytes) -> np.ndarray:
        """Which tokens, (vocab_size,) bool, go on from the bytes of a begun character as UTF-8."""
        if begun not in self._may_follow:
            allowed = np.zeros(self.vocab_size, dtype=bool)
            for i, token in enumerate(self.tokens):
                # Only 10xxxxxx goes on from a begun character: spares trying most tokens.
                if (token[0] >> 6 == 0b10) == bool(begun):
                    allowed[i] = unfinished_bytes(begun + token) is not None
            self._may_follow[begun] = allowed
        return self._may_follow[begun]

    def token_lengths(self) -> np.ndarray:
        """UTF-8 bytes of each token, (vocab_size,) int64: what bits per byte are counted with."""
        lengths = np.array([len(token) for token in self.tokens], dtype=np.int64)
        if self.end_of_text is not None:
            lengths[self.end_of_text] = 0  # it is none of the text
        return lengths

    def compact(self, used: Iterable[int]) -> tuple[Tokenizer, np.ndarray]:
        """Keeps the 256 bytes, the tokens in `used` and, for each, the merges that lead to it.

        An end-of-text token is kept, as the last.

        Merging by rank takes the same steps with these as with all, so a text whose tokens are
        all in `used` splits into the same tokens, and any other text still encodes exactly.

        Returns:
            the smaller tokenizer, and an array that maps old ids to new ones (-1: dropped).
        """
        keep = {self.ranks[bytes([byte])] for byte in range(256)}
        todo = [int(i) for i in used if i != self.end_of_text]
        while todo:
            rank = todo.pop()
            if rank not in keep:
                keep.add(rank)
                todo += [self.ranks[part] for part in self._last_merge(rank)]
        old_ids = np.array(sorted(keep))
        new_ids = np.full(self.vocab_size, -1, dtype=np.int64)
        new_ids[old_ids] = np.arange(len(old_ids))
        smaller = Tokenizer(self.name, self.pattern, [self.tokens[i] for i in old_ids])
        if self.end_of_text is None:
            return smaller, new_ids
        new_ids[self.end_of_text] = len(old_ids)
        return smaller.with_end_of_text(), new_ids

    def _last_merge(self, rank: int) -> list[bytes]:
        """The tokens that byte-pair encoding joins last to make this one: merges below its rank."""
        parts = [bytes([byte]) for byte in self.tokens[rank]]
        while len(parts) > 2:
            joined = (self.ranks.get(left + right, rank) for left, right in pairwise(parts))
            best, at = min((candidate, i) for i, candidate in enumerate(joined))
            if best >= rank:  # no merge leads to it: tiktoken still finds it as a whole piece
                break
            parts[at : at + 2] = [self.tokens[best]]
        return parts

    def to_dict(self) -> dict[str, str]:
        """Plain strings that make the tokenizer again, the vocabulary in tiktoken's file format."""
        tokens = self.tokens[: self.end_of_text]
        lines = (f"{base64.b64encode(t).decode()} {i}\n" for i, t in enumerate(tokens))
        state = {"name": self.name, "pattern": self.pattern, "vocabulary": "".join(lines)}
        return state if self.end_of_text is None else state | {"end_of_text": str(len(tokens))}

    @classmethod
    def from_dict(cls, state: dict[str, str]) -> Tokenizer:
        lines = state["vocabulary"].splitlines()
        tokens = [base64.b64decode(line.split()[0], validate=True) for line in lines]
        tokenizer = cls(state["name"], state["pattern"], tokens)
        if "end_of_text" not in state:
            return tokenizer
        if state["end_of_text"] != str(len(tokens)):
            raise ValueError(f"end-of-text token {state['end_of_text']}, {len(tokens)} others")
        return tokenizer.with_end_of_text()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Tokenizer) and self.to_dict() == other.to_dict()

    __hash__ = None


def unfinished_bytes(text: bytes) -> bytes | None:
    """The bytes of a character that `text` begins at its end; None where it is no UTF-8."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        decoder.decode(text)
    except UnicodeDecodeError:
        return None
    rest = decoder.getstate()[0]
    return None if b"\xed\xa0" <= rest < b"\xee" else rest  # what would become a surrogate
