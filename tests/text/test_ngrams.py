"""Baselines that adapt: what counting alone makes of a text that it has not seen before."""

from __future__ import annotations

import numpy as np
import pytest

from lit_gpt.text.ngrams import adaptive_baselines
from tests.recompute import adaptive_nats


@pytest.mark.parametrize(("size", "vocab_size"), [(2, 3), (60, 3), (200, 40), (200, 70_000)])
def test_each_token_is_predicted_from_those_before_it(size, vocab_size):
    tokens = np.random.default_rng(0).zipf(1.5, size).clip(max=vocab_size) - 1
    expected = [nats / (size - 1) for nats in adaptive_nats(tokens.tolist(), vocab_size)]
    found = adaptive_baselines(tokens.astype(np.uint16), vocab_size)
    assert found == pytest.approx(expected, rel=1e-9)


def test_a_text_of_one_token_costs_little_and_a_random_one_its_entropy():
    fair = np.random.default_rng(0).integers(0, 8, 20_000).astype(np.uint16)
    assert adaptive_baselines(fair, 8) == pytest.approx((np.log(8), np.log(8)), abs=0.01)
    unigram, bigram = adaptive_baselines(np.tile([0, 1, 2], 3000).astype(np.uint16), 8)
    assert unigram == pytest.approx(np.log(3), abs=0.01)
    assert bigram < 0.01
