"""From facts and a trial to a choice: candidates that turn out too large for the memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from lit_gpt.budget import planner
from lit_gpt.budget.candidates import Candidate
from lit_gpt.budget.choice import Choice
from lit_gpt.budget.planner import RIVALS, TRIES, plan_budget
from lit_gpt.budget.text_facts import TextFacts
from lit_gpt.budget.trial import Rates, Times
from tests.budget.test_choice import ENGLISH, LAPTOP, LONG, choose_in

FASTER = Rates(tuple(rate / 100 for rate in LAPTOP.seconds))
NONE = Times(math.inf, math.inf, math.inf)


def machine(rates: Rates, time: Callable[[Candidate], Times]) -> type:
    """In place of the Trial: these rates, and times of candidates."""

    class Machine:
        threads = None

        def __init__(self, *_):
            pass

        def rates(self):
            return rates

        def set_threads(self, candidate):
            pass

        def time(self, candidate):
            return time(candidate)

    return Machine


@pytest.fixture
def plan(monkeypatch):
    """`plan(seconds, rates, ...)`: the choice for so many seconds, 10 of them gone."""
    monkeypatch.setattr(planner, "seconds_since_start", lambda: 10.0)

    def run(
        seconds: float,
        rates: Rates,
        time: Callable[[Candidate], Times],
        facts: TextFacts,
        exact: Callable[[str], TextFacts],
        **given: str,
    ) -> Choice:
        monkeypatch.setattr(planner, "exact_facts", lambda _, name, bits: exact(name))
        monkeypatch.setattr(planner, "Trial", machine(rates, time))
        return plan_budget(
            seconds,
            lambda: facts,
            lambda *_: None,
            given=given,
            fixed={"style": "modern"},
            device=torch.device("cpu"),
            precision="32-true",
        )

    return run


@pytest.fixture
def plan_for(plan):
    """`plan_for(limit)`: a choice where steps that move more bytes fail, and what was tried."""

    def run(limit: float, factor: float = 1.0) -> tuple[Choice, list[float]]:
        tried = []

        def time(candidate: Candidate) -> Times:
            tried.append(candidate.bytes_moved)
            times = FASTER(candidate)
            fits = candidate.bytes_moved <= limit
            return Times(factor * times.step, times.eval_batch, times.token) if fits else NONE

        choice = plan(36_000, FASTER, time, LONG, lambda _: LONG, tokenizer="bpe:4096")
        return choice, tried

    return run


def test_a_model_too_large_for_the_memory_is_left_out_however_many_there_are(plan_for):
    """Each failure leaves out all that are nearly as large, so it soon comes to those that fit."""
    usual = choose_in(36_000, LONG, rates=FASTER).plan.candidate.bytes_moved
    limit = usual / 6
    choice, tried = plan_for(limit)
    assert choice.plan.candidate.bytes_moved <= limit
    failed = [size for size in tried if size > limit]
    assert len(failed) > TRIES
    assert all(after <= 0.7 * before for before, after in pairwise(failed))


def test_few_candidates_are_timed(plan_for):
    choice, tried = plan_for(math.inf, factor=1.3)
    assert 1 <= len(tried) <= TRIES
    assert choice.plan.candidate.bytes_moved in tried


def test_the_best_of_each_tokenizer_is_timed_before_one_is_chosen(plan):
    """Where the steps of the first choice's turn out to be slow, another wins."""
    only = {facts.name: replace(ENGLISH, tokenizers=(facts,)) for facts in ENGLISH.tokenizers}
    expected = choose_in(60, ENGLISH).plan.candidate.tokenizer.name

    def run(slow: str | None) -> tuple[str, list[str]]:
        tried = []

        def time(candidate: Candidate) -> Times:
            tried.append(candidate.tokenizer.name)
            times = LAPTOP(candidate)
            return replace(times, step=times.step * (9 if tried[-1] == slow else 1))

        choice = plan(60, LAPTOP, time, ENGLISH, only.__getitem__)
        assert len(set(tried[:RIVALS])) == RIVALS
        return choice.plan.candidate.tokenizer.name, tried

    chosen, tried = run(None)
    assert chosen == expected == tried[0]
    assert run(expected)[0] != expected
