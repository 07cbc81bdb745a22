"""Baselines: how well unigram and bigram counts predict a text."""

from __future__ import annotations

from operator import itemgetter

import numpy as np

from lit_gpt.text.overlap import chunks

SORTED_CHUNK = 1 << 23  # pairs sorted at a time: large, because each chunk is searched once
MAX_TARGETS = 1 << 21  # validation tokens that the baselines are measured on
CONCENTRATIONS = 2.0 ** np.arange(-2, 18)  # tried for the priors, in pseudo-counts


def frequency_baselines(
    train: np.ndarray, val: np.ndarray, token_lengths: np.ndarray
) -> tuple[float, float]:
    """Bits per byte of the validation text under unigram and under bigram counts.

    Measured on val[1:], the targets of the final loss; if these are more than MAX_TARGETS, on that
    many or half of it, evenly spread. Probabilities are the training split's counts, smoothed by
    Dirichlet priors, the bigram's by the unigram's and that one's by a uniform one (MacKay and Peto
    1995, A Hierarchical Dirichlet Language Model): p(w | c) = (n(c, w) + a p(w)) / (n(c) + a).
    Each `a` is the best of a few values on the validation text, which favours the baselines over
    the model that is compared with them.

    Args:
        train: (M,) ids.
        val: (N,) ids, N at least 2.
        token_lengths: (V,) bytes of each token of the vocabulary.
    """
    vocab_size = len(token_lengths)
    every = -(-(len(val) - 1) // MAX_TARGETS)
    codes = pair_codes(val[:-1:every], val[1::every], vocab_size)
    pairs, times = np.unique(codes, return_counts=True)
    context, target = np.divmod(pairs, pairs.dtype.type(vocab_size))
    token_counts = np.zeros(vocab_size, dtype=np.int64)
    pair_counts = np.zeros(len(pairs), dtype=np.int64)
    for chunk in chunks(train, SORTED_CHUNK, overlap=1):
        token_counts += np.bincount(chunk[:SORTED_CHUNK], minlength=vocab_size)
        codes = pair_codes(chunk[:-1], chunk[1:], vocab_size)
        codes.sort()
        pair_counts += np.searchsorted(codes, pairs, "right") - np.searchsorted(codes, pairs)
    context_counts = token_counts[context] - (context == train[-1])  # nothing follows the last one
    num_bytes = times @ token_lengths[target]
    prior: float | np.ndarray = 1 / vocab_size
    results = []
    for counts, totals in ((token_counts[target], len(train)), (pair_counts, context_counts)):
        tried = ((counts + a * prior) / (totals + a) for a in CONCENTRATIONS)
        bits, prior = min(((-(times @ np.log2(p)), p) for p in tried), key=itemgetter(0))
        results.append(float(bits / num_bytes))
    unigram, bigram = results
    return unigram, bigram


def adaptive_baselines(tokens: np.ndarray, vocab_size: int) -> tuple[float, float]:
    """Nats/token of a text under unigram and under bigram counts that see nothing but the text.

    Each of tokens[1:] is predicted from the counts of the tokens before it, so that none takes part
    in its own prediction (Dawid 1984, The Prequential Approach). The smoothing is that of
    `frequency_baselines`, its `a` again the best of a few.

    Args:
        tokens: (N,) ids, N at least 2; memory grows with it.
    """
    total = np.arange(1, len(tokens))  # tokens before each target
    occurrences = earlier(tokens)
    pairs = earlier(pair_codes(tokens[:-1], tokens[1:], vocab_size))
    prior: float | np.ndarray = 1 / vocab_size
    results = []
    for counts, totals in ((occurrences[1:], total), (pairs, occurrences[:-1])):
        tried = ((counts + a * prior) / (totals + a) for a in CONCENTRATIONS)
        nats, prior = min(((-np.log(p).mean(), p) for p in tried), key=itemgetter(0))
        results.append(float(nats))
    unigram, bigram = results
    return unigram, bigram


def earlier(values: np.ndarray) -> np.ndarray:
    """How many equal ones come before each of the values."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    places = np.arange(len(values))
    is_first = np.diff(ordered, prepend=ordered[:1]) != 0  # of its value; the very first is at 0
    counts = np.empty(len(values), dtype=np.int64)
    counts[order] = places - np.maximum.accumulate(np.where(is_first, places, 0))
    return counts


def pair_codes(first: np.ndarray, second: np.ndarray, vocab_size: int) -> np.ndarray:
    """One number per pair of ids, of 32 bits if they suffice: those sort faster."""
    codes = first.astype(np.uint32 if vocab_size <= 1 << 16 else np.uint64)
    codes *= codes.dtype.type(vocab_size)
    codes += second
    return codes
