"""Why a budget chooses what it chooses, with made-up texts and machines: nothing is timed."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from lit_gpt.budget import choice, law, recipe
from lit_gpt.budget.candidates import ASPECT, WIDTHS, Candidate, num_heads
from lit_gpt.budget.choice import CHOSEN, Budget, Choice, choose
from lit_gpt.budget.text_facts import TextFacts, TokenizerFacts
from lit_gpt.budget.trial import Rates, Times
from lit_gpt.errors import UserError
from lit_gpt.model import GPTConfig

MODERN = {"style": "modern", "tie_embeddings": False}
LAPTOP = Rates((1e-3, 1e-3, 1.5e-11, 3e-10))  # 67 GFLOP/s
SLOWER = Rates(tuple(10 * rate for rate in LAPTOP.seconds))


def text(train_bytes: int, **tokenizers: tuple[float, ...]) -> TextFacts:
    """`bpe_512=(512, 2.3, 2.7)`: vocabulary size, bytes per token, bits per byte by pairs.

    A ninth as much validates.
    """
    text_bits = min(bigram for *_, bigram in tokenizers.values())
    found = [
        TokenizerFacts(
            name.replace("bpe_", "bpe:"),
            int(vocab_size),
            per_token,
            int(train_bytes / per_token),
            int(train_bytes / 9 / per_token),
            bigram,
            text_bits,
        )
        for name, (vocab_size, per_token, bigram) in tokenizers.items()
    ]
    return TextFacts(train_bytes, tuple(found))


ENGLISH = text(  # as ten novels
    9_000_000,
    bytes=(256, 1.0, 3.52),
    cl100k_base=(39_500, 4.66, 2.18),
    bpe_512=(512, 2.14, 2.65),
    bpe_1024=(1024, 2.66, 2.43),
    bpe_2048=(2048, 3.05, 2.34),
    bpe_4096=(4096, 3.47, 2.31),
)
CHINESE = text(  # as Tang poems
    1_440_000,
    bytes=(256, 1.0, 4.23),
    cl100k_base=(1033, 1.82, 3.37),
    bpe_512=(512, 1.72, 3.48),
    bpe_1024=(1024, 2.24, 3.29),
    bpe_2048=(2048, 2.73, 3.15),
    bpe_4096=(4096, 3.15, 3.04),
)
LONG = replace(
    ENGLISH, tokenizers=(TokenizerFacts("bpe:4096", 4096, 4.0, 200_000_000, 20_000_000, 2.2, 2.2),)
)
SHORT = text(80_000, bpe_1024=(1024, 2.9, 2.45))


def choose_in(seconds: float, facts: TextFacts, spent: float = 10.0, rates=LAPTOP, **given):
    names = (*MODERN, "spelling_rows", "output_spelling_rows", "softmax_cutoff")
    fixed = MODERN | {n: given[n] for n in names if n in given}
    return choose(Budget(seconds, spent, given, fixed), facts, rates)


def size(found: Choice) -> int:
    return found.plan.candidate.weights


def tokens(found: Choice) -> int:
    return found.plan.steps * found.plan.candidate.step_tokens


def test_english_takes_the_words_of_cl100k_where_there_is_time_for_them():
    assert choose_in(1800, ENGLISH).options["tokenizer"] == "cl100k_base"


def test_in_minutes_a_large_vocabulary_leaves_time_for_too_few_steps():
    for seconds in (60, 300):
        assert choose_in(seconds, ENGLISH).options["tokenizer"] == "bpe:2048"


def test_chinese_takes_a_vocabulary_of_its_own():
    """To cl100k, most characters are two or three bytes."""
    assert choose_in(60, CHINESE).options["tokenizer"].startswith("bpe:")


def test_more_time_takes_a_larger_model_and_more_tokens():
    """Hoffmann et al. 2022: both grow with the arithmetic there is."""
    short, long = choose_in(60, LONG), choose_in(3600, LONG)
    assert size(long) > 1.5 * size(short)
    assert tokens(long) > 1.5 * tokens(short)
    assert long.bits_per_byte[0] < short.bits_per_byte[0]


def test_the_frequent_tokens_are_decided_first_where_that_leaves_time_for_more_steps():
    """With one softmax, it ends 0.2 % lower after as many steps: better where the text is short."""
    fast = {"style": "fast"}
    assert choose_in(60, LONG, **fast).options["softmax_cutoff"] == 0.35
    short = choose_in(600, SHORT, **fast).plan
    assert short.steps == short.useful_steps
    assert short.candidate.config.softmax_cutoff == 0.0
    assert choose_in(60, LONG).options["softmax_cutoff"] == 0.0  # of another style
    small = text(1_000_000, bytes=(256, 1.0, 4.2))
    assert choose_in(60, small, **fast).options["softmax_cutoff"] == 0.0


def test_of_sizes_that_end_alike_it_takes_the_smallest():
    """The law is off by more than half a percent, and large models learn texts by heart."""
    for seconds in (120, 600):
        found = choose_in(seconds, LONG).plan
        limits = [dict.fromkeys(("d_model",), width) for width in (64, 80, 96, 128, 160, 192, 256)]
        others = [choose_in(seconds, LONG, **limit).plan for limit in limits]
        best = min(plan.bits_per_byte for plan in others)
        assert found.bits_per_byte <= 1.005 * best
        for plan in others:
            if plan.candidate.weights < found.candidate.weights:
                is_worse = plan.bits_per_byte > 1.005 * best
                assert is_worse or plan.seconds < 0.9 * seconds


def test_a_slower_machine_takes_a_smaller_model():
    fast, slow = choose_in(3600, LONG), choose_in(3600, LONG, rates=SLOWER)
    assert size(slow) < size(fast)
    assert slow.bits_per_byte[0] > fast.bits_per_byte[0]


def test_time_that_is_gone_is_not_planned_again():
    early, late = choose_in(120, LONG, spent=5.0), choose_in(120, LONG, spent=65.0)
    assert tokens(late) < tokens(early)


def test_time_for_encoding_is_not_planned_again():
    slow = replace(LONG, tokenizers=(replace(LONG.tokenizers[0], encoding=60.0),))
    assert tokens(choose_in(120, slow)) < tokens(choose_in(120, LONG))


def test_all_parts_of_the_run_fit_into_the_budget():
    """Recomputed from the options alone, each part by its own rate."""
    for seconds in (60, 300, 3600):
        found = choose_in(seconds, ENGLISH)
        o = found.options
        times = LAPTOP(found.plan.candidate)
        facts = found.plan.candidate.tokenizer
        evaluations = 1 + math.ceil(o["max_steps"] / o["val_check_interval"])
        assert evaluations == choice.EVALUATIONS + 1
        batches = 2 * evaluations * o["limit_val_batches"]
        windows = (o["max_tokens"] or facts.val_tokens) / o["context_length"]
        whole = 10 + o["max_steps"] * times.step + batches * times.eval_batch
        whole += windows / o["batch_size"] * times.eval_batch
        assert 0.75 * seconds < whole < 0.98 * seconds
        assert batches * times.eval_batch < 0.05 * seconds


def test_the_final_loss_covers_the_whole_split_only_where_that_is_quick():
    assert choose_in(3600, ENGLISH).options["max_tokens"] is None
    found = choose_in(60, LONG)
    times = found.plan.times
    windows = found.options["max_tokens"] / found.options["context_length"]
    assert windows / found.options["batch_size"] * times.eval_batch < 0.055 * 60


def test_a_new_text_needs_no_dropout():
    found = choose_in(60, LONG)
    assert found.plan.epochs < 1
    assert found.options["dropout"] == 0
    assert found.options["weight_decay"] == 0.1


@pytest.mark.parametrize("width", [32, 256])
def test_the_steps_end_where_more_passes_would_learn_the_text_by_heart(width):
    """As trying every number of steps finds."""
    sizes = {"vocab_size": 1024, "context_length": 128, "d_model": width, "num_blocks": 1}
    candidate = Candidate(SHORT.tokenizers[0], GPTConfig(**sizes, **MODERN), 4)
    best = min(range(1, 2000), key=lambda steps: law.expected(candidate, steps))
    assert law.useful_steps(candidate, 2000) == pytest.approx(best, rel=0.1)
    assert law.useful_steps(candidate, best // 2) == best // 2


MEASURED = {  # `repetition`: passes that the weights averaged over, and the bits per byte reached
    9: {3.0: 2.205, 1.0: 2.210},
    18: {6.9: 2.101, 2.3: 2.091},
    31: {3.5: 1.612, 1.2: 1.608},
    61: {2.3: 2.064, 0.7: 2.073},
    69: {3.6: 2.172, 1.2: 2.129, 0.4: 2.166},
    122: {1.0: 2.035, 0.7: 2.020, 0.3: 2.043},
    177: {2.7: 2.079, 0.8: 2.038},
    216: {1.5: 2.030, 0.9: 1.999, 0.7: 1.997},
}


@pytest.mark.parametrize("epoch_steps", [200, 400])
@pytest.mark.parametrize(("repetition", "reached"), MEASURED.items())
def test_the_weight_decay_is_close_to_the_best_that_was_measured(repetition, reached, epoch_steps):
    """Its reach in passes, however many steps a pass has."""
    rate = 1 / epoch_steps  # so that a decay of 1 reaches back one pass
    passes = 1 / recipe.weight_decay(2, repetition / 2, rate, epoch_steps)
    nearest = min(reached, key=lambda measured: abs(math.log(measured / passes)))
    assert reached[nearest] < 1.003 * min(reached.values())


def test_a_large_model_that_repeats_its_text_takes_more_weight_decay():
    """One that could hold it by heart (Kim et al. 2025)."""
    sizes = {"d_model": 256, "num_blocks": 8, "batch_size": 8, "max_steps": 800}
    small = {"d_model": 16, "num_blocks": 1, "max_steps": 40}
    for changed, decay, reason in (
        ({}, 1.3, "the model is large enough to learn the text by heart"),
        ({"learning_rate": 0.1}, 0.57, "the model is large enough to learn the text by heart"),
        ({"max_steps": 10}, 0.1, "the text is read once"),
        (small, 0.1, "the model is too small to learn the text by heart"),
    ):
        found = choose_in(3600, SHORT, **sizes | changed)
        assert found.options["weight_decay"] == decay
        assert found.options["dropout"] == (0.1 if decay > 0.1 else 0.0)  # of 30 passes
        assert any(told.endswith(f"weight decay {decay:g}: {reason}") for told in found.reasons)
    (told,) = (told for told in found.reasons if told.startswith("Model: "))
    assert told.startswith("Model: 1 block of width 16, ")


def test_a_short_text_and_a_long_time_end_early():
    """The steps that more than a few epochs would take are left out, and said so."""
    found = choose_in(3600, SHORT, d_model=64, num_blocks=2)
    assert 1 < found.plan.epochs <= recipe.MOST_EPOCHS + 0.1
    assert found.options["dropout"] == 0
    assert found.plan.steps == found.plan.useful_steps
    assert found.plan.seconds < 1800
    assert any("would not help" in reason for reason in found.reasons)


def test_more_time_never_ends_higher():
    for facts in (ENGLISH, CHINESE, LONG, SHORT):
        ends = [choose_in(s, facts).bits_per_byte[0] for s in (45, 60, 120, 300, 600, 3600)]
        assert ends == pytest.approx(sorted(ends, reverse=True), rel=choice.ALIKE - 1)


GIVEN = {
    "tokenizer": "bpe:1024",
    "context_length": 64,
    "batch_size": 3,
    "d_model": 72,
    "num_blocks": 5,
    "num_heads": 6,
    "order": "random",
    "style": "classic",
    "tie_embeddings": True,
    "spelling_rows": 50,
    "output_spelling_rows": 50,
    "softmax_cutoff": 0.1,
    "dropout": 0.25,
    "optimizer": "adamw",
    "learning_rate": 2e-3,
    "table_rate": 2.0,
    "table_eps": 1e-6,
    "weight_decay": 0.02,
    "schedule": "cosine",
    "warmup_steps": 7,
    "max_steps": 90,
    "val_check_interval": 30,
    "limit_val_batches": 4,
    "max_tokens": 5000,
    "threads": 1,
}


def test_every_option_that_is_chosen_can_be_given():
    assert sorted(GIVEN) == sorted(CHOSEN)
    assert sorted(choose_in(60, ENGLISH).options) == sorted(CHOSEN)


@pytest.mark.parametrize("name", GIVEN)
def test_an_option_that_is_given_is_kept(name):
    """It is not among those that are chosen, and the others suit it."""
    facts = ENGLISH
    if name == "tokenizer":  # the text is encoded by it, and by no other
        facts = replace(ENGLISH, tokenizers=ENGLISH.tokenizers[3:4])
    found = choose_in(60, facts, **{name: GIVEN[name]})
    assert sorted(found.options) == sorted(set(CHOSEN) - {name})
    candidate = found.plan.candidate
    config = candidate.config
    if name in (
        "d_model",
        "num_blocks",
        "num_heads",
        "context_length",
        "tie_embeddings",
        "spelling_rows",
        "output_spelling_rows",
        "softmax_cutoff",
    ):
        assert getattr(config, name) == GIVEN[name]
    in_use = {
        "batch_size": candidate.batch_size,
        "optimizer": candidate.optimizer,
        "max_steps": found.plan.steps,
        "limit_val_batches": found.plan.eval_batches,
        "max_tokens": found.plan.final_tokens,
        "style": config.style,
    }
    assert in_use.get(name, GIVEN[name]) == GIVEN[name]


def test_all_options_may_be_given():
    facts = replace(ENGLISH, tokenizers=ENGLISH.tokenizers[3:4])
    assert choose_in(60, facts, **GIVEN).options == {}


def test_a_given_number_of_steps_takes_the_best_model_for_which_they_fit():
    few, many = (choose_in(120, LONG, max_steps=steps) for steps in (100, 2000))
    assert (few.plan.steps, many.plan.steps) == (100, 2000)
    assert size(few) > size(many)
    assert few.plan.useful_steps == 100  # the clock must not add any


def test_more_steps_than_help_must_fit_too():
    """The text is short: two million steps are far more than its passes that help."""
    with pytest.raises(UserError, match="leaves no time for 2,000,000 steps: 10 s are gone"):
        choose_in(60, SHORT, max_steps=2_000_000)


@pytest.mark.parametrize("interval", [5, 0.01])
def test_evaluations_that_are_given_are_counted(interval):
    """By hand: steps and evaluations, every 5 steps or hundredth of an epoch, fill the time."""
    sizes = {"d_model": 64, "num_blocks": 2, "batch_size": 8, "context_length": 128}
    given = {"limit_val_batches": 10, "max_tokens": 0}
    facts = replace(LONG, tokenizers=(replace(LONG.tokenizers[0], train_tokens=1_000_000),))
    plan = choose_in(120, facts, val_check_interval=interval, **sizes, **given).plan
    every = interval if interval == 5 else 1_000_000 / 100 / (8 * 128)
    weights = plan.candidate.weights + plan.candidate.vocabulary_weights
    evaluation = 20 * plan.times.eval_batch + choice.SAMPLES * plan.times.token
    evaluation += 2 * (0.05 + 12 * weights / 150e6)  # two checkpoints
    others = choice.START + choice.END + evaluation
    taken = plan.steps * (plan.times.step + evaluation / every)
    assert plan.seconds == pytest.approx(taken + others)
    assert 10 + plan.seconds == pytest.approx(0.98 * 120, abs=plan.times.step + evaluation / every)


def test_no_step_takes_so_long_that_its_trial_would_cost_too_much():
    found = choose_in(600, LONG, max_steps=4)
    assert found.plan.times.step < 0.02 * 600
    assert choose_in(3600, LONG, max_steps=4).plan.times.step > 0.02 * 600


def test_a_learning_rate_is_that_of_the_width_and_the_optimizer():
    narrow, wide = (choose_in(60, ENGLISH, d_model=width, num_blocks=2) for width in (80, 320))
    assert narrow.options["learning_rate"] == 6e-3  # configs/modern.yaml
    assert wide.options["learning_rate"] == 3e-3  # with the root of the width
    adamw = choose_in(60, ENGLISH, d_model=80, num_blocks=2, optimizer="adamw")
    assert adamw.options["learning_rate"] == 3e-3


@pytest.mark.parametrize("width", [50, 100, 112, 150, 250, 300, 500, 720, 1000])
def test_a_width_that_is_given_has_heads_that_divide_it(width):
    """Of at least 32 channels, and an even number of them for rotary positions."""
    config = choose_in(3600, ENGLISH, d_model=width, num_blocks=1).plan.candidate.config
    assert config.num_heads * config.head_size == width
    assert config.head_size % 2 == 0
    assert config.head_size >= 32 or config.num_heads == 1


def test_widths_that_are_chosen_have_heads_of_32_or_64_channels():
    for width in WIDTHS:
        assert num_heads(width) == max(1, width // (32 if width <= 256 else 64))


@pytest.mark.parametrize(("given", "batches"), [(0, 0), (3, 3), (0.5, 976), (None, 1953)])
def test_batches_of_an_evaluation_that_are_given_are_counted(given, batches):
    """As the Trainer counts them, of 1,953 batches: a share, or with none all."""
    facts = replace(ENGLISH, tokenizers=ENGLISH.tokenizers[:1])
    sizes = {"batch_size": 4, "context_length": 128, "d_model": 32, "num_blocks": 1}
    found = choose_in(3600, facts, limit_val_batches=given, **sizes)
    assert found.plan.eval_batches == batches
    assert any(f", of {batches} batches; " in reason for reason in found.reasons)


def test_models_are_neither_thin_nor_flat():
    least, most = ASPECT
    for seconds in (45, 600, 36_000):
        config = choose_in(seconds, LONG).plan.candidate.config
        assert least <= config.d_model / config.num_blocks <= most


def test_the_reasons_are_ten_lines_at_most_with_their_numbers():
    found = choose_in(1800, ENGLISH)
    assert len(found.reasons) <= 10
    plan = found.plan
    told = "\n".join(found.reasons)
    config = plan.candidate.config
    for text in (
        "Budget: 30 min 0 s, of which 10 s are gone",
        "cl100k_base, 39,500 tokens, 4.66 bytes/token; bpe:4096 would end",
        f"{config.num_blocks} blocks of width {config.d_model}, {plan.candidate.weights:,} weights",
        f"{plan.candidate.batch_size} x {config.context_length} tokens",
        f"{plan.steps:,}, {plan.epochs:.2g} epochs",
        f"Dropout {found.options['dropout']:g}, weight decay",
        f"{found.options['learning_rate']:g} for muon",
        f"every {found.options['val_check_interval']:,} steps",
    ):
        assert text in told


def test_what_was_given_is_marked():
    facts = replace(ENGLISH, tokenizers=ENGLISH.tokenizers[3:4])
    told = choose_in(60, facts, **GIVEN).reasons
    assert all("(given)" in line for line in told if not line.startswith(("Budget", "Eval")))


def test_one_thread_is_chosen_where_more_are_hardly_faster():
    one = choose(Budget(60, 10.0, {}, MODERN, threads=1), ENGLISH, LAPTOP)
    assert one.options["threads"] == 1
    assert any("on one thread, as more are hardly faster" in reason for reason in one.reasons)
    assert choose_in(60, ENGLISH).options["threads"] is None
    given = choose_in(60, ENGLISH, threads=1)  # which was not measured
    assert not any("on one thread" in reason for reason in given.reasons)


def test_a_share_of_an_epoch_is_named_as_one():
    (told,) = (r for r in choose_in(60, LONG, val_check_interval=0.25).reasons if "Eval" in r)
    assert told.startswith("Evaluations: every 0.25 epochs, of ")


def test_too_little_time_is_one_line():
    with pytest.raises(UserError, match="leaves no time for 20 steps: 29 s are gone already"):
        choose_in(30, ENGLISH, spent=29.0)


def test_a_given_size_for_which_there_is_no_time_is_one_line():
    with pytest.raises(UserError, match="leaves no time"):
        choose_in(60, ENGLISH, d_model=4096, num_blocks=48)


def test_given_sizes_that_do_not_fit_together_are_one_line():
    with pytest.raises(UserError, match="must be divisible"):
        choose_in(60, ENGLISH, d_model=80, num_heads=3)


def test_a_text_shorter_than_every_window_is_one_line():
    with pytest.raises(UserError, match=r"too short for a window .* a smaller context_length"):
        choose_in(60, text(300, bytes=(256, 1.0, 4.0)))


def test_a_model_that_does_not_fit_into_memory_is_not_chosen():
    def times(candidate):
        fits = candidate.weights < 100_000
        return LAPTOP(candidate) if fits else Times(math.inf, math.inf, math.inf)

    found = choose(Budget(3600, 10.0, {}, MODERN), LONG, times)
    assert found.plan.candidate.weights < 100_000
