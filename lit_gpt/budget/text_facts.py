"""What matters about a text for the choice: its length, and what each tokenizer makes of it."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from lit_gpt.budget.recipe import SOFTMAX_CUTOFF
from lit_gpt.text.bpe import CAREFUL, load_trainer, training_text
from lit_gpt.text.cutting import cut_safely
from lit_gpt.text.files import Reader, TextFiles
from lit_gpt.text.ngrams import frequency_baselines
from lit_gpt.text.overlap import CHUNK, chunks
from lit_gpt.text.splits import Splits, naming_val_path
from lit_gpt.text.token_file import split_at
from lit_gpt.text.tokenizer import BYTES, Tokenizer
from lit_gpt.text.vocabularies import PATTERN, load_tokenizer

SAMPLE = 1 << 20  # bytes that the tokenizers are tried on
BLOCK = 1 << 13  # characters that stay together in the sample
SHARES = 50  # blocks that a text is cut into at least, so that a short one has both splits
NAMED = "cl100k_base"
BPE_SIZES = (512, 1024, 2048, 4096, 8192, 16384)
BYTES_PER_ENTRY = 50  # of text, for each token of bpe:N: with less, most are never learnt

Parts = list[str | None]  # texts; None ends a document


@dataclass(frozen=True)
class TokenizerFacts:
    """A text in the tokens of one tokenizer.

    Args:
        name: as `tokenizer` names it.
        vocab_size: of the vocabulary as the run will have it: compact, where that applies.
        bytes_per_token: on text that the vocabulary was not trained on.
        train_tokens: length of the training split.
        val_tokens: length of the validation split.
        bigram: bits per byte of the validation text, predicted from counts of pairs of tokens.
        text_bits: the lowest `bigram` of any tokenizer: how hard the text is.
        encoding: seconds to train it and to encode both splits; 0 once that is done.
        frequent: share of the text's tokens that are among the first SOFTMAX_CUTOFF of the
            vocabulary.
    """

    name: str
    vocab_size: int
    bytes_per_token: float
    train_tokens: int
    val_tokens: int
    bigram: float
    text_bits: float
    encoding: float = 0.0
    frequent: float = 0.7


@dataclass(frozen=True)
class TextFacts:
    """What the choice knows about a text.

    Args:
        train_bytes: length of the training split, as UTF-8.
        tokenizers: the ones to choose from.
    """

    train_bytes: int
    tokenizers: tuple[TokenizerFacts, ...]


@dataclass(frozen=True)
class Sample:
    """Blocks spread evenly over a text, those of the validation split apart.

    Args:
        share: of the text that the sample is.
    """

    train: Parts
    val: Parts
    train_bytes: int  # of the whole split
    val_bytes: int
    share: float


def size(parts: Iterable[str | None]) -> int:
    return sum(len(part.encode()) for part in parts if part)


def blocks(parts: Iterable[str | None], most: int) -> Iterable[Parts]:
    """The text in blocks of about `most` characters: pieces, or many short documents."""
    block: Parts = []
    length = 0
    for part in parts:
        for at in range(0, len(part or " "), most):
            piece = None if part is None else part[at : at + most]
            block.append(piece)
            length += len(piece or "")
            if length >= most:
                yield block
                block = []
                length = 0
    if block:
        yield block


def take_sample(text: TextFiles, train_fraction: float, val_path: str | list[str] | None) -> Sample:
    """Reads the text to count its bytes, and again to take blocks of it.

    Args:
        val_path: a separate validation text: a ninth as much of it is taken.

    Raises:
        UserError: the text can't be read.
    """
    reader = Reader(text, needs_fields=val_path is None)
    total = size(reader)
    train_bytes = total if val_path is not None else int(total * train_fraction)
    val_bytes = total - train_bytes
    train: Parts = []
    val: Parts = []
    at = 0
    for block, is_taken in spread_blocks(reader, total, SAMPLE):
        if is_taken:
            # The one that both splits share validates: in training it would tell what comes.
            (train if at + size(block) <= train_bytes else val).extend(block)
        at += size(block)
    share = (size(train) + size(val)) / total
    if val_path is not None:
        with naming_val_path():
            val_reader = Reader(replace(text, path=val_path), needs_fields=False)
            val_bytes = size(val_reader)
            for block, is_taken in spread_blocks(val_reader, val_bytes, SAMPLE // 9):
                val += block if is_taken else []
    return Sample(train, val, train_bytes, val_bytes, share)


def spread_blocks(reader: Reader, total: int, most: int) -> Iterator[tuple[Parts, bool]]:
    """The blocks of a text of `total` bytes, and whether each is of a sample of `most` bytes."""
    taken = min(1.0, most / max(1, total))
    for i, block in enumerate(blocks(reader, min(BLOCK, max(1, total // SHARES)))):
        yield block, int((i + 1) * taken) > int(i * taken)


def measure_text(
    text: TextFiles,
    train_fraction: float = 0.9,
    val_path: str | list[str] | None = None,
    is_compact: bool = True,
) -> TextFacts:
    """Tries all tokenizers on a sample of a text.

    Args:
        val_path: a separate validation text.
        is_compact: whether the run leaves out the tokens that the training text never uses.

    Raises:
        UserError: the text can't be read.
    """
    sample = take_sample(text, train_fraction, val_path)
    found = [byte_facts(sample), named_facts(sample, is_compact), *bpe_facts(sample)]
    text_bits = min(facts.bigram for facts in found)
    return TextFacts(
        sample.train_bytes, tuple(replace(facts, text_bits=text_bits) for facts in found)
    )


def byte_facts(sample: Sample) -> TokenizerFacts:
    return facts_of(load_tokenizer(BYTES).with_end_of_text(), sample, 0.0)


def named_facts(sample: Sample, is_compact: bool) -> TokenizerFacts:
    """Facts of cl100k_base, whose compact vocabulary grows with the text.

    The number of different tokens grows as a power of the text's length (Heaps' law), whose
    exponent is taken from the first half and the whole of the sample's training part. The whole
    training text lacks fewer of the validation part's tokens than the sample does, so bytes per
    token and `bigram` lie between those of two vocabularies: of the training part, and of both.
    """
    tokenizer = load_tokenizer(NAMED).with_end_of_text()
    if not is_compact:
        return facts_of(tokenizer, sample, 0.0)
    parts = sample.train
    half = tokenizer.compact(used(tokenizer, parts[: len(parts) // 2]))[0].vocab_size
    whole, _ = tokenizer.compact(used(tokenizer, parts))
    first = max(size(parts[: len(parts) // 2]), 1)
    exponent = math.log(whole.vocab_size / half) / math.log(max(2.0, size(parts) / first))
    grown = int(min(tokenizer.vocab_size, whole.vocab_size * (1 / sample.share) ** exponent))
    facts = facts_of(whole, sample, 0.0)
    unknown = sample.share ** (1 - exponent)  # of the sample's, how many are left
    if unknown < 1:
        known, _ = tokenizer.compact(used(tokenizer, [*sample.train, *sample.val]))
        others = facts_of(known, sample, 0.0)
        for name in ("bytes_per_token", "bigram"):
            value = unknown * getattr(facts, name) + (1 - unknown) * getattr(others, name)
            facts = replace(facts, **{name: value})
        facts = replace(facts, val_tokens=int(sample.val_bytes / facts.bytes_per_token))
    return replace(facts, vocab_size=grown)


def used(tokenizer: Tokenizer, parts: Parts) -> np.ndarray:
    """The different ids of a text."""
    return np.unique(tokenizer.encode_parts([part for part in parts if part]))


def bpe_facts(sample: Sample) -> list[TokenizerFacts]:
    """Facts of each bpe:N, from one training: a small vocabulary begins a larger one."""
    start = time.perf_counter()
    most = (sample.train_bytes + sample.val_bytes) // BYTES_PER_ENTRY
    sizes = [size for size in BPE_SIZES if size <= max(most, BPE_SIZES[0])]
    num_bytes = int(size(sample.train) * CAREFUL)  # as in the run
    texts = training_text(cut_safely(sample.train, PATTERN), num_bytes)
    largest = load_trainer(sizes[-1])(texts)
    training = time.perf_counter() - start
    found: list[TokenizerFacts] = []
    for number in sizes:
        if found and number > 2 * largest.vocab_size:
            break  # the text has no more pairs to merge
        tokenizer = Tokenizer(f"bpe:{number}", PATTERN, largest.tokens[: number - 1])
        tokenizer.use_splintr()
        found.append(facts_of(tokenizer.with_end_of_text(), sample, training))
    return found


def facts_of(tokenizer: Tokenizer, sample: Sample, training: float) -> TokenizerFacts:
    """What a tokenizer makes of the sample, scaled up to the text.

    Args:
        training: seconds that it took to train it on the sample.
    """
    start = time.perf_counter()
    train = encode(tokenizer, sample.train)
    val = encode(tokenizer, sample.val)
    encoding = time.perf_counter() - start + training
    num_train, num_val = (
        len(ids) + parts.count(None) for ids, parts in ((train, sample.train), (val, sample.val))
    )
    per_train_token = max(1, size(sample.train)) / max(1, num_train)
    has_val = size(sample.val) > BLOCK  # else too little to tell
    per_token = size(sample.val) / num_val if has_val else per_train_token
    if not has_val:
        train, val = np.split(train, [9 * len(train) // 10])
    bigram = bigram_bits(train, val, tokenizer)
    return TokenizerFacts(
        name=tokenizer.name,
        vocab_size=tokenizer.vocab_size,
        bytes_per_token=per_token,
        train_tokens=int(sample.train_bytes / per_train_token),
        val_tokens=int(sample.val_bytes / per_token),
        bigram=bigram,
        text_bits=bigram,
        encoding=encoding / sample.share,
        frequent=frequent_share(train, tokenizer),
    )


def frequent_share(ids: np.ndarray, tokenizer: Tokenizer) -> float:
    return float((ids < int(SOFTMAX_CUTOFF * tokenizer.vocab_size)).mean()) if len(ids) else 1.0


def encode(tokenizer: Tokenizer, parts: Parts) -> np.ndarray:
    """The ids of a text, without the ends of documents."""
    pieces: list[str | None] = [part for part in cut_safely(parts, tokenizer.pattern) if part]
    return tokenizer.encode_parts(pieces) if pieces else np.empty(0, np.uint32)


def bigram_bits(train: np.ndarray, val: np.ndarray, tokenizer: Tokenizer) -> float:
    """Bits per byte of `val` under the bigram counts of `train`."""
    if len(val) < 2 or len(train) < 2:
        return 8.0  # too short a text to tell, and to train on
    return frequency_baselines(train, val, tokenizer.token_lengths())[1]


def exact_facts(splits: Splits, name: str, text_bits: float = math.inf) -> TextFacts:
    """Facts of a text that one tokenizer has encoded already.

    Pairs of tokens are counted in the first SAMPLE bytes or so of the training split.

    Args:
        name: the tokenizer's.
        text_bits: the lowest `bigram` of other tokenizers.
    """
    tokenizer = splits.corpus.tokenizer
    lengths = tokenizer.token_lengths()
    train_bytes, val_bytes = (
        sum(int(lengths[part].sum()) for part in chunks(ids, CHUNK))
        for ids in (splits.train, splits.val)
    )
    sample = splits.train[: split_at(len(splits.train), min(1.0, SAMPLE / max(1, train_bytes)))]
    bigram = bigram_bits(sample, splits.val, tokenizer)
    facts = TokenizerFacts(
        name=name,
        vocab_size=tokenizer.vocab_size,
        bytes_per_token=val_bytes / len(splits.val),
        train_tokens=len(splits.train),
        val_tokens=len(splits.val),
        bigram=bigram,
        text_bits=min(bigram, text_bits),
        frequent=frequent_share(sample, tokenizer),
    )
    return TextFacts(train_bytes, (facts,))
