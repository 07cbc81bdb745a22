"""Tokenizer: text to token ids and back. Shapes: N tokens of a text, V of the vocabulary."""

from __future__ import annotations

import base64
import copy
import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import tiktoken

from lit_gpt.text import utf8
from lit_gpt.text.byte_gaps import SINGLE_BYTES, ByteGaps, check_has_bytes
from lit_gpt.text.chat import check_template, split_special
from lit_gpt.text.patterns import check_pattern
from lit_gpt.text.spelling import spelling_rows

BYTES = "bytes"  # the name of the vocabulary that has one token for each byte
END_OF_TEXT = b"\n\n"  # how the end of a document reads: as a blank line
END_NAME = "<|endoftext|>"  # what its token is called, as in GPT-2 and Qwen3
NO_SPECIAL: dict[str, Any] = {"names": [], "roles": {}, "start_names": [], "end_names": []}
ONLY_END = NO_SPECIAL | {"names": [END_NAME], "roles": {"eos_token": END_NAME}}


def checked_special(special: Any) -> dict[str, Any]:
    """The special tokens in a stranger's file.

    Raises:
        ValueError: they are not names, each of one token, and what these are for.
    """
    names, roles = special["names"], special["roles"]
    visible = list(special.get("visible_names", []))
    used = [*roles.values(), *special["start_names"], *special["end_names"], *visible]
    if not all(isinstance(name, str) and name for name in [*names, *roles, *used]):
        raise ValueError("its special tokens are not texts")
    if len(set(names)) < len(names) or not set(names).issuperset(used):
        raise ValueError("it has a special token twice, or names one that it does not have")
    return {key: special[key] for key in NO_SPECIAL} | {"visible_names": visible}


class Tokenizer:
    """Byte-pair encoding without loss; all text is ordinary text, `<|endoftext|>` included.

    No text encodes to the token `end_of_text`, which follows each document; only a tokenizer from
    `with_end_of_text` has it. Nor does any to the other special tokens of an imported model, which
    only `encode_chat` writes.

    Args:
        name: where the vocabulary comes from, as in `vocabularies.load_tokenizer`.
        pattern: regular expression that splits text into pieces; merges stay inside a piece.
        tokens: the bytes of token 0, 1, ...: the single bytes, and merges in order of rank. Only
            an imported vocabulary lacks single bytes, and refuses a text that has these.
    """

    def __init__(self, name: str, pattern: str, tokens: list[bytes]) -> None:
        self.name = name
        self.pattern = pattern
        self.tokens = tokens
        self.is_bytes = tokens == SINGLE_BYTES
        self.ranks = {token: rank for rank, token in enumerate(tokens)}
        self.gaps = None if self.ranks.keys() >= set(SINGLE_BYTES) else ByteGaps(tokens)
        ranks = self.gaps.ranks if self.gaps else self.ranks
        self.encoding = tiktoken.Encoding(
            name, pat_str=pattern, mergeable_ranks=ranks, special_tokens={}
        )
        self.fast: Any = None  # a splintr tokenizer
        self.end_of_text: int | None = None
        self.end_is_used = True  # by the training text; if not, generation never chooses it
        self.special: dict[str, int] = {}  # names and ids of special tokens, end of text included
        self.special_roles: dict[str, str] = {}  # such as eos_token: the name of one
        self.start_names: list[str] = []  # of those that come before a prompt
        self.end_names: list[str] = []  # of those that end an answer
        self.visible_names: list[str] = []  # of those that are text to a reader, as <think>
        self.chat_template: str | None = None  # Jinja; None: text.chat has a plain one
        self._may_follow: dict[bytes, np.ndarray] = {}

    def use_splintr(self) -> None:
        """Encodes on all cores from now on; exact only for the pattern of cl100k_base."""
        import splintr

        vocabulary = self.to_dict()["vocabulary"].encode()  # without special tokens
        self.fast = splintr.Tokenizer.from_bytes(vocabulary, splintr.CL100K_BASE_PATTERN)

    def with_end_of_text(self, name: str = END_NAME) -> Tokenizer:
        """The same tokenizer with one more token, the last, which decodes to END_OF_TEXT."""
        new = copy.copy(self)  # shares the ranks: they decide how text is split
        new.end_of_text = len(self.tokens)
        new.tokens = [*self.tokens, END_OF_TEXT]
        new.special = {**self.special, name: new.end_of_text}
        new.special_roles = {"eos_token": name, **self.special_roles}
        new._may_follow = {}
        return new

    def with_special(
        self,
        names: list[str],
        roles: Mapping[str, str],
        start_names: list[str],
        end_names: list[str],
        visible_names: Sequence[str] = (),
    ) -> Tokenizer:
        """The same tokenizer with more tokens, which decode to their names.

        The end-of-text token comes after these.

        Args:
            names: of the new tokens, all different.
            roles: what a chat template calls some of them, such as `bos_token`.
            start_names: those that come before a prompt.
            end_names: those that end an answer, besides the end-of-text token.
            visible_names: those that other programs show in a text, and that a message may write.
        """
        assert self.end_of_text is None
        new = copy.copy(self)
        new.tokens = [*self.tokens, *(name.encode() for name in names)]
        new.special = {name: i for i, name in enumerate(names, len(self.tokens))}
        new.special_roles = dict(roles)
        new.start_names = list(start_names)
        new.end_names = list(end_names)
        new.visible_names = list(visible_names)
        new._may_follow = {}
        return new

    @property
    def end_ids(self) -> set[int]:
        """Ids of the tokens that end an answer; those of `end_names`, and end of text."""
        ends = {self.special[name] for name in self.end_names}
        return ends if self.end_of_text is None else ends | {self.end_of_text}

    def with_end_used(self, is_used: bool) -> Tokenizer:
        """The same tokenizer for a training text that has the end of text, or does not."""
        new = copy.copy(self)
        new.end_is_used = is_used
        new._may_follow = {}
        return new

    @property
    def learnt_end(self) -> int | None:
        """The end of text where the model was trained with it: a document follows it."""
        return self.end_of_text if self.end_is_used else None

    @property
    def vocab_size(self) -> int:
        return len(self.tokens)

    def encode(self, text: str) -> np.ndarray:
        """Text to ids, (N,) uint32.

        Raises:
            UserError: the text has a byte that an imported vocabulary lacks.
        """
        if self.is_bytes:
            return np.frombuffer(text.encode(), np.uint8).astype(np.uint32)
        if self.fast:
            return np.frombuffer(self.fast.encode_flat(text), np.dtype("<u4"))
        try:
            ids = self.encoding.encode_to_numpy(text, disallowed_special=())
            return self.gaps.own_ids(ids, text) if self.gaps else ids
        except UnicodeEncodeError:
            raise
        except ValueError:  # its regular expression gives up on a million spaces in a row
            half = len(text) // 2
            return np.concatenate([self.encode(text[:half]), self.encode(text[half:])])

    def encode_chat(self, text: str) -> np.ndarray:
        """What a chat template rendered to ids, (N,) uint32: special tokens by their names."""
        parts = split_special(text, list(self.special))
        rows = [
            self.encode(part) if place % 2 == 0 else np.array([self.special[part]], np.uint32)
            for place, part in enumerate(parts)
        ]
        return np.concatenate(rows)

    def encode_parts(self, texts: list[str | None]) -> np.ndarray:
        """Ids of one text after the other, (N,) uint32; None is the end of a document."""
        parts = [text for text in texts if text is not None]
        if self.fast:
            ids, starts = map(np.frombuffer, self.fast.encode_batch_flat(parts), ("<u4", "<u8"))
        else:
            rows = [self.encode(text) for text in ["", *parts]]
            ids = np.concatenate(rows)
            starts = np.cumsum([len(row) for row in rows])
        is_end = np.array([text is None for text in texts])
        if not is_end.any():
            return ids
        assert self.end_of_text is not None
        ends = starts[np.cumsum(~is_end)[is_end]]
        return np.insert(ids, ends.astype(np.int64), self.end_of_text)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return b"".join(self.tokens[i] for i in ids)

    def decode(self, ids: Iterable[int]) -> str:
        """Ids to text; invalid UTF-8, such as half a character, becomes U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def may_follow(self, begun: bytes) -> np.ndarray:
        """Which tokens, (V,) bool, keep the text valid UTF-8 after a character's first bytes."""
        if begun not in self._may_follow:
            self._may_follow[begun] = utf8.may_follow(self.tokens, begun)
            if self.end_of_text is not None:
                self._may_follow[begun][self.end_of_text] &= self.end_is_used
        return self._may_follow[begun]

    def token_lengths(self) -> np.ndarray:
        """UTF-8 bytes of each token, (V,) int64; bits per byte are counted with them."""
        lengths = np.array([len(token) for token in self.tokens], dtype=np.int64)
        lengths[len(self.ranks) :] = 0  # special tokens are not part of the text
        return lengths

    def spelling_rows(self, num_rows: int) -> np.ndarray:
        """See text/spelling.py."""
        return spelling_rows(self.tokens, num_rows)

    def compact(self, used: Iterable[int]) -> tuple[Tokenizer, np.ndarray]:
        """Keeps the 256 bytes, the tokens in `used`, the merges that lead to these and end of text.

        Merging by rank takes the same steps with these tokens as with all, so a text whose tokens
        are all in `used` splits into the same tokens, and any other text encodes without loss.
        Returns the smaller tokenizer, and the new ids by old ones, (V,) int64; -1: dropped.
        """
        keep = {self.ranks[byte] for byte in SINGLE_BYTES if byte in self.ranks}
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
        if self.fast is not None:
            smaller.use_splintr()
        if self.end_of_text is not None:
            smaller = smaller.with_end_of_text().with_end_used(self.end_is_used)
            new_ids[self.end_of_text] = len(old_ids)
        return smaller, new_ids

    def _last_merge(self, rank: int) -> list[bytes]:
        """The tokens that byte-pair encoding joins last into this one: merges below its rank."""
        parts = [bytes([byte]) for byte in self.tokens[rank]]
        while len(parts) > 2:
            joined = (self.ranks.get(left + right, rank) for left, right in pairwise(parts))
            best, at = min((candidate, i) for i, candidate in enumerate(joined))
            if best >= rank:  # no merges lead to it: tiktoken finds it only as a whole piece
                break
            parts[at : at + 2] = [self.tokens[best]]
        return parts

    def is_merged(self, rank: int) -> bool:
        """Whether merges lead to the token; if not, only a whole piece becomes it."""
        return len(self._last_merge(rank)) < 3

    def to_dict(self) -> dict[str, str]:
        """Plain strings for `from_dict`; the vocabulary is in tiktoken's file format."""
        tokens = self.tokens[: len(self.ranks)]
        lines = (f"{base64.b64encode(t).decode()} {i}\n" for i, t in enumerate(tokens))
        state = {"name": self.name, "pattern": self.pattern, "vocabulary": "".join(lines)}
        if self.end_of_text is not None:
            state["end_of_text"] = str(self.end_of_text)
        if not self.end_is_used:
            state["end_is_used"] = "no"
        special = {
            "names": list(self.special),
            "roles": self.special_roles,
            "start_names": self.start_names,
            "end_names": self.end_names,
        }
        if self.visible_names:
            special["visible_names"] = self.visible_names
        if special not in (NO_SPECIAL, ONLY_END):
            state["special"] = json.dumps(special)
        return (
            state if self.chat_template is None else state | {"chat_template": self.chat_template}
        )

    @classmethod
    def from_dict(cls, state: dict[str, str]) -> Tokenizer:
        """What `to_dict` returned, or a stranger's file holds.

        Raises:
            ValueError: it is not a vocabulary and a pattern for any text.
        """
        lines = state["vocabulary"].splitlines()
        tokens = [base64.b64decode(line.split()[0], validate=True) for line in lines]
        unique = set(tokens)
        if len(unique) < len(tokens) or b"" in unique:
            raise ValueError("its vocabulary has a token twice, or an empty one")
        check_has_bytes(unique)
        check_pattern(state["pattern"])
        tokenizer = cls(state["name"], state["pattern"], tokens)
        end = state.get("end_of_text")
        special = NO_SPECIAL if end is None else ONLY_END
        if "special" in state:
            special = checked_special(json.loads(state["special"]))
        *names, last = special["names"] if end else [*special["names"], END_NAME]
        tokenizer = tokenizer.with_special(**special | {"names": names})
        if end is not None:
            tokenizer = tokenizer.with_end_of_text(last)
            tokenizer.end_is_used = state.get("end_is_used") != "no"
        if end not in (None, str(len(tokens) + len(names))):
            raise ValueError(f"end-of-text token {end}, {len(tokens) + len(names)} others")
        if "chat_template" in state:
            check_template(state["chat_template"])
            tokenizer.chat_template = state["chat_template"]
        return tokenizer

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Tokenizer) and self.to_dict() == other.to_dict()
