"""Training a vocabulary by byte-pair encoding."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from lit_gpt.errors import UserError
from lit_gpt.text.cutting import cut_safely
from lit_gpt.text.overlap import chunks
from lit_gpt.text.tokenizer import Tokenizer
from lit_gpt.text.vocabularies import PATTERN

if TYPE_CHECKING:
    from lit_gpt.text.files import Reader

SAMPLE = 1 << 26  # bytes of text to train on: 4096 merges take a minute and 1.3 GB at worst
PIECE = 1 << 19  # characters passed on at a time: rustbpe panics at a million spaces
BUFFER = 16  # pieces held at a time
CAREFUL = 0.98  # share of the training split, estimated in bytes, that is used at first
CHUNK = 1 << 20  # tokens counted at a time

Train = Callable[[Iterable[str]], Tokenizer]


def training_text(texts: Iterable[str | None], num_bytes: int) -> Iterator[str]:
    """The first bytes of a text, in pieces; if they are more than SAMPLE, only every n-th part."""
    every = -(-num_bytes // SAMPLE)
    at = 0
    for i, text in enumerate(texts):
        if at >= num_bytes:
            return
        if not text:
            continue
        encoded = text.encode()
        if at + len(encoded) > num_bytes:
            text = encoded[: num_bytes - at].decode("utf-8", "ignore")  # drops half a character
        at += len(encoded)
        if i % every == 0:
            yield from (text[start : start + PIECE] for start in range(0, len(text), PIECE))


def load_trainer(size: int, has_end: bool = False) -> Train:
    """A function from texts to a vocabulary of `size` tokens: the 256 bytes, then the merges.

    With `has_end`, the last of them is the end of text.

    Text is first split as by cl100k_base, so merges stay inside words, numbers and runs of spaces.
    Each merge joins the most frequent pair of adjacent tokens; of equals, the pair with the smaller
    ids. So the same text gives the same vocabulary on any number of cores. If the text runs out of
    pairs, there are fewer tokens than `size`. Raises a UserError if rustbpe is not installed.
    """
    try:
        import rustbpe
    except ImportError as error:
        raise UserError(
            "needs the package rustbpe",
            field="tokenizer",
            value=f"bpe:{size}",
            hint="install it: pip install rustbpe",
        ) from error

    def train(texts: Iterable[str]) -> Tokenizer:
        trainer = rustbpe.Tokenizer()
        trainer.train_from_iterator(texts, size - has_end, buffer_size=BUFFER, pattern=PATTERN)
        ranks = sorted(trainer.get_mergeable_ranks(), key=lambda pair: pair[1])
        tokenizer = Tokenizer(f"bpe:{size}", PATTERN, [bytes(token) for token, _ in ranks])
        tokenizer.use_splintr()
        return tokenizer.with_end_of_text().with_end_used(False) if has_end else tokenizer

    return train


def train_on_split(
    train: Train, reader: Reader, fraction: float, encode: Callable[[Tokenizer], np.ndarray]
) -> None:
    """Trains a vocabulary on the training split of a text, and encodes all of it.

    The split is counted in tokens, which don't exist yet. So training uses a bit less than that
    share of the bytes, and again fewer should these reach into the validation split after all.

    Args:
        fraction: share of the tokens, from the front, that are the training split.
        encode: encodes the text and returns the ids of its training split, (M,).
    """
    num_bytes = sum(len(text.encode()) for text in reader if text)
    if fraction < 1:
        num_bytes = int(num_bytes * fraction * CAREFUL)
    while True:
        tokenizer = train(training_text(cut_safely(reader, PATTERN), num_bytes))
        if reader.has_documents and tokenizer.end_of_text is None:
            tokenizer = tokenizer.with_end_of_text()
        lengths = tokenizer.token_lengths()
        train_bytes = sum(int(lengths[ids].sum()) for ids in chunks(encode(tokenizer), CHUNK))
        if num_bytes <= train_bytes:
            return
        num_bytes = int(train_bytes * CAREFUL)
