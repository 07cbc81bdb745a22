"""Owns vocabularies of one's own: trained on the text by byte-pair encoding, or read from a file.

Both split text as cl100k_base does, so that merges stay inside words, numbers and runs of blanks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

from lit_gpt.errors import UserError
from lit_gpt.text.tokenizer import OFFLINE, Tokenizer

PATTERN = OFFLINE["cl100k_base"][0]
SAMPLE = 1 << 26  # bytes of text to train on: 4096 merges of them take a minute and 1.3 GB at worst
PIECE = 1 << 19  # characters handed over at a time; of a million blanks rustbpe makes a panic
BUFFER = 16  # pieces held at a time


def training_text(texts: Iterable[str], num_bytes: int) -> Iterator[str]:
    """The first bytes of a text, in pieces; where they are more than SAMPLE, every n-th part."""
    every, at = -(-num_bytes // SAMPLE), 0
    for i, text in enumerate(texts):
        if at >= num_bytes:
            return
        if not text:
            continue
        size = len(encoded := text.encode())
        if at + size > num_bytes:
            text = encoded[: num_bytes - at].decode("utf-8", "ignore")  # no half character
        at += size
        if i % every == 0:
            yield from (text[start : start + PIECE] for start in range(0, len(text), PIECE))


def load_trainer(size: int) -> Callable[[Iterable[str]], Tokenizer]:
    """What makes a vocabulary of texts: `size` tokens, the 256 bytes, then merges as found.

    Each merge joins the pair of tokens that stands most often side by side inside a piece; of
    equals, the pair with the smaller ids. So the same text gives the same vocabulary, on any
    number of cores. Where the text runs out of pairs there are fewer tokens than `size`.

    Raises:
        UserError: rustbpe is not installed.
    """
    try:
        import rustbpe
    except ImportError as error:
        raise UserError(
            f'--data.tokenizer=bpe:{size} needs the package rustbpe: pip install -e ".[bpe]"'
        ) from error
    return partial(_train, rustbpe, size)


def _train(rustbpe: Any, size: int, texts: Iterable[str]) -> Tokenizer:
    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator(texts, size, buffer_size=BUFFER, pattern=PATTERN)
    ranks = sorted(trainer.get_mergeable_ranks(), key=lambda pair: pair[1])
    tokenizer = Tokenizer(f"bpe:{size}", PATTERN, [bytes(token) for token, _ in ranks])
    # As with cl100k_base, whose pattern it is: 170,000 odd texts split as tiktoken splits them.
    import splintr

    vocabulary = tokenizer.to_dict()["vocabulary"].encode()
    tokenizer.fast = splintr.Tokenizer.from_bytes(vocabulary, splintr.CL100K_BASE_PATTERN)
    return tokenizer


Train = Callable[[Iterable[str]], Tokenizer]
