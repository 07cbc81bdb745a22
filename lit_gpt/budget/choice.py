"""The choice: the options with which a model learns a text best in a given time, and why."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lit_gpt.budget import law, recipe
from lit_gpt.budget.candidates import Candidate, candidates
from lit_gpt.budget.durations import duration
from lit_gpt.budget.text_facts import TextFacts
from lit_gpt.budget.trial import Times
from lit_gpt.errors import UserError

TARGET = 0.98  # of the budget, as BudgetClock aims
START = 2.0  # seconds from the choice to the first evaluation, the encoding left out
END = 1.5  # seconds from the final loss to the end of the process
EVALUATIONS = 10  # in a run, besides that at step 0
EVALUATED = 0.04  # of the budget, at most, for all of them
MOST_EVAL_BATCHES = 10  # of each split
FINAL = 0.05  # of the budget, at most, for the final loss
SAMPLES = 32  # tokens, of three texts side by side or one after the other
DISK = 150e6  # bytes/s
STATE = 12  # bytes of a weight in a checkpoint, with its moments
FILES = 2  # checkpoints at an evaluation
LEAST_STEPS = 20
LONGEST_STEP = 0.02  # of the budget: a trial has to take a few
ALIKE = 1.005  # bits per byte, relative: less than the law's error within a text
AS_LONG = 0.9  # of the best plan's seconds
TOKENIZER = 1  # the place of its reason

CHOSEN = (  # plain names of the options that are chosen, unless they are given
    *("tokenizer", "context_length", "batch_size", "order"),
    *("style", "d_model", "num_blocks", "num_heads", "tie_embeddings", "dropout"),
    *("spelling_rows", "output_spelling_rows", "softmax_cutoff"),
    *("optimizer", "learning_rate", "table_rate", "table_eps", "weight_decay"),
    *("schedule", "warmup_steps"),
    *("max_steps", "val_check_interval", "limit_val_batches", "max_tokens", "threads"),
)


@dataclass(frozen=True)
class Budget:
    """The limits of the choice.

    Args:
        seconds: of the whole process.
        spent: seconds from its start to now.
        given: options that the user set, by plain name.
        fixed: arguments of GPTConfig besides the sizes.
        threads: 1 where more are hardly faster; None: PyTorch's number.
    """

    seconds: float
    spent: float
    given: Mapping[str, Any] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    threads: int | None = None


@dataclass(frozen=True)
class Plan:
    """A candidate and what the time allows it.

    Args:
        steps: optimizer steps.
        useful_steps: more would not help.
        eval_batches: of each split in an evaluation.
        final_tokens: predicted for the final loss; None: the whole split.
        bits_per_byte: expected on the validation split.
    """

    candidate: Candidate
    times: Times
    steps: int
    useful_steps: int
    eval_batches: int
    final_tokens: int | None
    seconds: float  # from now to the end
    bits_per_byte: float

    @property
    def epochs(self) -> float:
        return self.candidate.epochs(self.steps)

    @property
    def window(self) -> float:
        """Seconds of a window without gradients."""
        return self.times.eval_batch / self.candidate.batch_size


@dataclass(frozen=True)
class Choice:
    """What was chosen.

    Args:
        options: by plain name, without those that the user gave.
        reasons: a line for each decision.
        bits_per_byte: expected, and the ends of a range of it.
        rivals: the best candidate of each tokenizer, the best ones first.
    """

    plan: Plan
    options: dict[str, Any]
    reasons: list[str]
    bits_per_byte: tuple[float, float, float]
    rivals: list[Candidate]


def choose(budget: Budget, text: TextFacts, times_of: Callable[[Candidate], Times]) -> Choice:
    """The options with the fewest expected bits per byte within the budget.

    Args:
        times_of: how long a candidate takes here.

    Raises:
        UserError: the given options don't fit together, or nothing can be trained in the time.
    """
    plans = [
        plan
        for candidate in candidates(text.tokenizers, budget.given, budget.fixed)
        if (plan := plan_of(budget, candidate, times_of(candidate)))
    ]
    if not plans:
        raise UserError(
            f"leaves no time for {budget.given.get('max_steps', LEAST_STEPS):,} steps: "
            f"{duration(budget.spent)} are gone already",
            field="budget",
            hint="give it more time or a shorter text, or leave more options to it",
        )
    best = smallest_of_the_best(plans)
    options = options_of(budget, best)
    low, high = (best.bits_per_byte * factor for factor in law.RANGE)
    return Choice(
        plan=best,
        options={name: value for name, value in options.items() if name not in budget.given},
        reasons=reasons_of(budget, plans, best, options),
        bits_per_byte=(best.bits_per_byte, low, high),
        rivals=best_of_each(plans),
    )


def best_of_each(plans: list[Plan]) -> list[Candidate]:
    """The best candidate of each tokenizer, the best ones first."""
    best: dict[str, Candidate] = {}
    for plan in sorted(plans, key=lambda plan: plan.bits_per_byte):
        best.setdefault(plan.candidate.tokenizer.name, plan.candidate)
    return list(best.values())


def smallest_of_the_best(plans: list[Plan]) -> Plan:
    """The smallest model that the law can't tell from the best one, and that uses the time as well.

    Twice the weights change little where a size is about right, but learn a text by heart sooner.
    """
    best = min(plans, key=lambda plan: plan.bits_per_byte)
    alike = [
        plan
        for plan in plans
        if plan.candidate.tokenizer is best.candidate.tokenizer
        and plan.bits_per_byte <= ALIKE * best.bits_per_byte
        and plan.seconds >= AS_LONG * best.seconds
    ]
    return min(alike, key=lambda plan: (plan.candidate.weights, plan.bits_per_byte))


def plan_of(budget: Budget, candidate: Candidate, times: Times) -> Plan | None:
    """How many steps fit into the time; None: too few, or the given number does not."""
    tokenizer = candidate.tokenizer
    batches = eval_batches(budget, candidate, times)
    weights = candidate.weights + candidate.vocabulary_weights
    saving = FILES * (0.05 + STATE * weights / DISK)
    evaluation = 2 * batches * times.eval_batch + SAMPLES * times.token + saving
    final_tokens, final = final_evaluation(budget, candidate, times)
    evaluations = EVALUATIONS + 1.0
    step = times.step
    if every := evaluation_steps(budget, candidate):  # given: their number grows with the steps
        evaluations = 1.0
        step += evaluation / every
    others = START + tokenizer.encoding + evaluations * evaluation + final + END
    left = TARGET * budget.seconds - budget.spent - others
    steps = int(left / step) if times.step < LONGEST_STEP * budget.seconds else 0
    wanted = budget.given.get("max_steps")
    useful = wanted or max(1, math.floor(recipe.MOST_EPOCHS / candidate.epochs(1)))
    if steps < (wanted or min(LEAST_STEPS, useful)):
        return None
    steps = min(steps, useful)
    if wanted is None and (best := law.useful_steps(candidate, steps)) < steps:
        steps = useful = max(best, min(LEAST_STEPS, useful))
    return Plan(
        candidate=candidate,
        times=times,
        steps=steps,
        useful_steps=useful,
        eval_batches=batches,
        final_tokens=final_tokens,
        seconds=others + steps * step,
        bits_per_byte=law.expected(candidate, steps),
    )


def evaluation_steps(budget: Budget, candidate: Candidate) -> float | None:
    """Steps between evaluations, where that is given, in steps or as a share of an epoch."""
    every = budget.given.get("val_check_interval")
    if isinstance(every, float):
        return every / candidate.epochs(1)
    return every


def eval_batches(budget: Budget, candidate: Candidate, times: Times) -> int:
    """Batches of each split in an evaluation: as many as given, or as cost little."""
    windows = candidate.tokenizer.val_tokens // candidate.config.context_length
    whole = max(1, windows // candidate.batch_size)
    if "limit_val_batches" in budget.given:
        given = budget.given["limit_val_batches"]
        if isinstance(given, int):
            return min(whole, given)
        return whole if given is None else int(given * whole)
    most = EVALUATED * budget.seconds / (2 * (EVALUATIONS + 1) * times.eval_batch)
    return max(1, min(MOST_EVAL_BATCHES, int(most), whole))


def final_evaluation(
    budget: Budget, candidate: Candidate, times: Times
) -> tuple[int | None, float]:
    """How many tokens it predicts (None: all), and its seconds."""
    per_token = times.eval_batch / (candidate.batch_size * candidate.config.context_length)
    tokens = candidate.tokenizer.val_tokens
    given = budget.given.get("max_tokens", None)
    if "max_tokens" in budget.given:
        return given, per_token * min(tokens, tokens if given is None else given)
    most = FINAL * budget.seconds / per_token if per_token < math.inf else 0
    if tokens <= most:
        return None, per_token * tokens
    rounded = int(float(f"{most:.1e}"))
    return rounded, per_token * rounded


def options_of(budget: Budget, plan: Plan) -> dict[str, Any]:
    """All options that are chosen, by plain name, given or not."""
    candidate = plan.candidate
    config = candidate.config
    optimizer = candidate.optimizer
    usual = recipe.learning_rate(config.d_model, optimizer)
    rate = budget.given.get("learning_rate", usual)
    repeats = (plan.epochs, candidate.own_weights_per_token)
    return {
        "tokenizer": candidate.tokenizer.name,
        "context_length": config.context_length,
        "batch_size": candidate.batch_size,
        "d_model": config.d_model,
        "num_blocks": config.num_blocks,
        "num_heads": config.num_heads,
        **recipe.FIXED,
        "spelling_rows": config.spelling_rows,
        "output_spelling_rows": config.output_spelling_rows,
        "softmax_cutoff": config.softmax_cutoff,
        "dropout": recipe.dropout(*repeats),
        "optimizer": optimizer,
        "learning_rate": rate,
        "weight_decay": recipe.weight_decay(*repeats, rate, 1 / candidate.epochs(1)),
        "warmup_steps": recipe.warmup_steps(plan.steps),
        "max_steps": plan.steps,
        "val_check_interval": max(1, -(-plan.steps // EVALUATIONS)),
        "limit_val_batches": plan.eval_batches,
        "max_tokens": plan.final_tokens,
        "threads": budget.threads,
    } | dict(budget.given)


def reasons_of(budget: Budget, plans: list[Plan], best: Plan, options: dict[str, Any]) -> list[str]:
    """Why, in at most ten lines."""
    given = budget.given
    config = best.candidate.config
    rate = options["learning_rate"]
    every = options["val_check_interval"]
    interval = f"{every:g} epochs" if isinstance(every, float) else f"{every:,} steps"
    return [
        f"Budget: {duration(budget.seconds)}, of which {duration(budget.spent)} are gone and "
        f"{duration(best.steps * best.times.step)} are for training",
        f"Tokenizer: {tokenizer_reason(given, plans, best)}",
        f"Model: {config.num_blocks} block{'s' if config.num_blocks > 1 else ''} of width "
        f"{config.d_model}, {best.candidate.weights:,} weights in them and "
        f"{best.candidate.vocabulary_weights:,} in the vocabulary's tables"
        f"{model_reason(given, plans, best)}",
        f"Batch: {best.candidate.batch_size} x {config.context_length} tokens"
        f"{marked(given, 'batch_size')}, {duration(best.times.step)} a step"
        f"{' on one thread, as more are hardly faster' if budget.threads == 1 else ''}"
        f"{', with an output layer in two steps' if config.cutoff else ''}",
        f"Steps: {best.steps:,}, {best.epochs:.2g} epochs{steps_reason(given, best)}",
        f"Dropout {options['dropout']:g}{marked(given, 'dropout')}, weight decay "
        f"{options['weight_decay']:g}{marked(given, 'weight_decay')}: "
        f"{repetition_reason(best)}",
        f"Learning rate: {rate:g}{marked(given, 'learning_rate')} for {options['optimizer']} at "
        f"this width, warm-up over {options['warmup_steps']:,} steps, then "
        f"{options['schedule']}",
        f"Evaluations: every {interval}, of "
        f"{best.eval_batches} batches; final loss over "
        f"{'the whole split' if best.final_tokens is None else f'{best.final_tokens:,} tokens'}",
    ]


def marked(given: Mapping[str, Any], name: str) -> str:
    return " (given)" if name in given else ""


def tokenizer_reason(given: Mapping[str, Any], plans: list[Plan], best: Plan) -> str:
    chosen = best.candidate.tokenizer
    text = f"{chosen.name}, {chosen.vocab_size:,} tokens, {chosen.bytes_per_token:.2f} bytes/token"
    others = [p for p in plans if p.candidate.tokenizer.name != chosen.name]
    if others:
        second = min(others, key=lambda plan: plan.bits_per_byte)
        name = second.candidate.tokenizer.name
        ours = min(p.bits_per_byte for p in plans if p.candidate.tokenizer.name == chosen.name)
        more = second.bits_per_byte - ours
        text += f"; {name} would end {more:.3f} bits per byte higher"
    return text + marked(given, "tokenizer")


def model_reason(given: Mapping[str, Any], plans: list[Plan], best: Plan) -> str:
    """What a larger or smaller model would reach in the time."""
    if "d_model" in given and "num_blocks" in given:
        return " (given)"
    size = best.candidate.weights
    same = [p for p in plans if p.candidate.tokenizer.name == best.candidate.tokenizer.name]
    parts = []
    for words, others in (
        ("half as many or fewer", [p for p in same if p.candidate.weights <= size / 2]),
        ("twice as many or more", [p for p in same if p.candidate.weights >= 2 * size]),
    ):
        if others:
            value = min(plan.bits_per_byte for plan in others)
            parts.append(f"with {words}: {value:.3f}")
    return f" (bits per byte {'; '.join(parts)})" if parts else ""


def repetition_reason(best: Plan) -> str:
    """Why dropout and weight decay are what they are."""
    if best.epochs <= 1:
        return "the text is read once"
    is_large = recipe.is_by_heart(best.epochs, best.candidate.own_weights_per_token)
    return f"the model is {'large enough' if is_large else 'too small'} to learn the text by heart"


def steps_reason(given: Mapping[str, Any], best: Plan) -> str:
    if "max_steps" in given:
        return " (given)"
    if best.steps == best.useful_steps:
        return ": more would not help, so the run ends before its time"
    return ""
