"""Training a vocabulary by byte-pair encoding."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from lit_gpt.errors import UserError
from lit_gpt.text.tokenizer import Tokenizer
from lit_gpt.text.vocabularies import PATTERN

SAMPLE = 1 << 26  # bytes of text to train on: 4096 merges take a minute and 1.3 GB at worst
PIECE = 1 << 19  # characters passed on at a time: rustbpe panics at a million spaces
BUFFER = 16  # pieces held at a time

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


def load_trainer(size: int) -> Train:
    """A function from texts to a vocabulary of `size` tokens: the 256 bytes, then the merges.

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
            hint='install it: pip install -e ".[bpe]"',
        ) from error

    def train(texts: Iterable[str]) -> Tokenizer:
        trainer = rustbpe.Tokenizer()
        trainer.train_from_iterator(texts, size, buffer_size=BUFFER, pattern=PATTERN)
        ranks = sorted(trainer.get_mergeable_ranks(), key=lambda pair: pair[1])
        tokenizer = Tokenizer(f"bpe:{size}", PATTERN, [bytes(token) for token, _ in ranks])
        tokenizer.use_splintr()
        return tokenizer

    return train
