"""From a text and a time to options: facts, trial and choice, one after the other."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from lit_gpt.budget import recipe
from lit_gpt.budget.candidates import Candidate
from lit_gpt.budget.choice import TOKENIZER, Budget, Choice, choose
from lit_gpt.budget.text_facts import TextFacts, exact_facts
from lit_gpt.budget.trial import Rates, Times, Trial
from lit_gpt.command import seconds_since_start
from lit_gpt.text.splits import Splits

RIVALS = 4  # tokenizers whose best candidates are timed, before one is chosen
TRIES = 3  # candidates that are timed at most, each the best once the one before was timed
SMALLER = 0.7  # of one that did not fit into the memory: the next is tried below that
CHECK = 200  # times the seconds of a step: the budget from which threads are measured again
SHORTEST = 16  # tokens of a window, with which the text is encoded


@dataclass
class Corrected:
    """Rates, corrected by the times of the candidates that were timed.

    Each tokenizer has a factor of its own, as the rates are least exact for large vocabularies.
    """

    rates: Rates
    trial: Trial
    factors: dict[str, float] = field(default_factory=dict)
    timed: dict[tuple[Any, ...], Times] = field(default_factory=dict)
    is_closed: bool = False  # to candidates that were not timed
    too_large: float = math.inf  # bytes moved in a step: the memory is too small for these

    def __call__(self, candidate: Candidate) -> Times:
        if candidate.key in self.timed:
            return self.timed[candidate.key]
        if self.is_closed or candidate.bytes_moved >= self.too_large:
            return Times(math.inf, math.inf, math.inf)
        times = self.rates(candidate)
        factor = self.factors.get(candidate.tokenizer.name, 1.0)
        return Times(times.step * factor, times.eval_batch * factor, times.token)

    def time(self, candidate: Candidate) -> bool:
        """Times it; False if that was done before."""
        if candidate.key in self.timed:
            return False
        times = self.timed[candidate.key] = self.trial.time(candidate)
        found = times.step / self.rates(candidate).step
        if found < 10:  # else it was too large for the memory, or paged
            self.factors[candidate.tokenizer.name] = found
        if math.isinf(times.step):
            self.too_large = min(self.too_large, SMALLER * candidate.bytes_moved)
        return True


def plan_budget(
    seconds: float,
    measure: Callable[[], TextFacts],
    encode: Callable[[str, int], Splits],
    *,
    given: Mapping[str, Any],
    fixed: Mapping[str, Any],
    device: torch.device,
    precision: str,
) -> Choice:
    """Chooses a run's options.

    Args:
        seconds: of the whole process.
        measure: tries all tokenizers on the text.
        encode: the splits of the text by a tokenizer, given the shortest window they must have.
        given: options that the user set, by plain name.
        fixed: arguments of GPTConfig besides the sizes.

    Raises:
        UserError: a text that can't be used, or options that don't fit together.
    """
    chosen = {name: recipe.FIXED[name] for name in ("style", "tie_embeddings")}
    if fixed.get("style") in (None, "fast"):
        tables = ("spelling_rows", "output_spelling_rows")
        chosen |= dict.fromkeys(tables, recipe.SPELLING_ROWS)
    fixed = {**chosen, "dropout": given.get("dropout", 0.0), **fixed}
    optimizer = given.get("optimizer", recipe.FIXED["optimizer"])
    trial = Trial(device, precision, optimizer, dict(fixed), "threads" in given, seconds)
    clock = Corrected(trial.rates(), trial)

    def choose_now(facts: TextFacts) -> Choice:
        now = Budget(seconds, seconds_since_start(), given, fixed, trial.threads)
        return choose(now, facts, clock)

    def check_threads(choice: Choice) -> None:
        if CHECK * choice.plan.times.step < seconds:
            trial.set_threads(choice.plan.candidate)  # a large one may be faster on all

    name = given.get("tokenizer")
    first: Choice | None = None
    facts = measure()
    if name is None:
        first = choose_now(facts)
        check_threads(first)
        for candidate in first.rivals[:RIVALS]:
            clock.time(candidate)
        first = choose_now(facts)
        name = first.plan.candidate.tokenizer.name
    splits = encode(name, given.get("context_length", SHORTEST))
    exact = exact_facts(splits, name, facts.tokenizers[0].text_bits)
    rivals = len(clock.timed)
    while True:
        times = [*clock.timed.values()][rivals:]
        clock.is_closed = sum(math.isfinite(time.step) for time in times) == TRIES
        choice = choose_now(exact)
        if not clock.timed:
            check_threads(choice)
        if not clock.time(choice.plan.candidate):
            break
    if first is not None:  # which compared the tokenizers
        choice.reasons[TOKENIZER] = first.reasons[TOKENIZER]
    return choice
