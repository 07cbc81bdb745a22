"""The trial: rates from measured seconds, and what is measured."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lit_gpt.budget import trial as trial_module
from lit_gpt.budget.candidates import Candidate
from lit_gpt.budget.text_facts import TokenizerFacts
from lit_gpt.budget.trial import Rates, Times, Trial, features, fit_rates
from lit_gpt.model import GPT, GPTConfig
from lit_gpt.module import next_token_loss

MODERN = {"style": "modern", "tie_embeddings": False}


def make(vocab: int, width: int, blocks: int, context: int = 64, batch: int = 4, **more):
    config = GPTConfig(vocab, context, width, blocks, max(1, width // 32), **(MODERN | more))
    return Candidate(TokenizerFacts("bytes", vocab, 1.0, 10_000, 1_000, 8.0, 8.0), config, batch)


def test_counted_weights_are_those_of_the_model():
    for more in ({}, {"style": "classic", "bias": False}, {"num_kv_heads": 1}):
        candidate = make(300, 64, 3, **more)
        model = GPT(candidate.config)
        blocks = sum(p.numel() for p in model.blocks.parameters() if p.ndim > 1)
        assert candidate.weights == blocks
        assert candidate.vocabulary_weights == 2 * 64 * 300
    assert make(300, 64, 3, tie_embeddings=True).vocabulary_weights == 64 * 300
    assert make(300, 64, 3, bigram_rows=50).vocabulary_weights == 64 * 650
    assert make(300, 64, 3, spelling_rows=50).vocabulary_weights == 64 * 650
    assert make(300, 64, 3, output_spelling_rows=40).vocabulary_weights == 64 * 640
    assert make(300, 64, 3, softmax_cutoff=0.2).vocabulary_weights == 64 * 601


def test_probes_have_the_given_choices():
    fixed = {"style": "fast", "smear": False, "bigram_rows": 7, "qk_norm": False}
    config = Trial(torch.device("cpu"), fixed=fixed).probe(256, 32, 2, 64, 4).config
    assert {name: getattr(config, name) for name in fixed} == fixed


def test_arithmetic_of_a_step_is_counted_as_torch_counts_it():
    candidate = make(300, 64, 2)
    model = GPT(candidate.config)
    ids = torch.zeros(4, 64, dtype=torch.long)
    # torch counts no products inside a fused attention.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(ids).sum().backward()
    counted = candidate.flops - candidate.muon_flops
    assert counted == pytest.approx(counter.get_total_flops(), rel=0.05)


def test_an_output_layer_in_two_steps_computes_the_second_for_rare_targets_alone():
    """Of 300 tokens, 105 are decided first; of the targets, a quarter are others."""
    plain, adaptive = make(300, 64, 2), make(300, 64, 2, softmax_cutoff=0.35)
    adaptive = replace(adaptive, tokenizer=replace(adaptive.tokenizer, frequent=0.75))
    saved = 300 - 105 - 195 / 4
    assert plain.flops - adaptive.flops == pytest.approx(6 * 4 * 64 * 64 * saved)
    moved = plain.bytes_moved - adaptive.bytes_moved
    assert moved == pytest.approx(20 * 4 * 64 * saved - 28 * 64)
    squared = replace(adaptive, config=replace(adaptive.config, softmax_cutoff=0.35**2))
    assert squared.frequent == pytest.approx(0.75**2)
    other = replace(adaptive, tokenizer=replace(adaptive.tokenizer, frequent=0.5))
    assert adaptive.key != other.key


def test_a_trial_has_as_many_frequent_tokens_as_the_text(quick, monkeypatch):
    seen = []

    def loss(model, x, y):
        seen.append(y)
        return next_token_loss(model, x, y)

    monkeypatch.setattr(trial_module, "next_token_loss", loss)
    quick.time(make(1000, 32, 1, 64, 64, softmax_cutoff=0.35))
    assert (seen[0] < 350).float().mean() == pytest.approx(0.7, abs=0.03)
    assert seen[0].max() > 900


def test_muon_multiplies_each_matrix_five_times_with_itself():
    def once(rows, columns):
        """X X^T, the square of that, and X times both, of the smaller side."""
        return 2 * rows * columns * rows + 2 * rows**3 + 2 * rows * rows * columns

    # Queries, keys and values; their output; gate and up; down, of width 8 * 11 = 88.
    sides = [(32, 96), (32, 32), (32, 176), (32, 88)]
    assert make(300, 32, 1).muon_flops == 5 * sum(once(*pair) for pair in sides)
    assert make(300, 32, 3).muon_flops == 15 * sum(once(*pair) for pair in sides)


def test_rates_are_found_from_what_they_lead_to():
    real = Rates((2e-3, 1e-3, 2e-11, 5e-10))
    probes = [make(256, 32, 2), make(256, 64, 8), make(8192, 64, 2), make(256, 128, 4, batch=8)]
    found = fit_rates([(c, real(c).step) for c in [*probes, make(4096, 256, 6, 128, 8)]])
    assert found.seconds == pytest.approx(real.seconds, rel=1e-6)
    other = make(2000, 96, 3, 128, 16)
    assert found(other).step == pytest.approx(real(other).step)


def test_no_rate_is_negative():
    """A noisy measurement must not make a larger model faster."""
    real = Rates((2e-3, 1e-3, 2e-11, 0.0))
    probes = [make(256, 32, 2), make(256, 64, 8), make(8192, 64, 2), make(256, 128, 4, batch=8)]
    seconds = [real(c).step * factor for c, factor in zip(probes, (1, 1, 0.7, 1), strict=True)]
    found = fit_rates(list(zip(probes, seconds, strict=True)))
    assert min(found.seconds) >= 0
    for candidate, taken in zip(probes, seconds, strict=True):
        assert found(candidate).step == pytest.approx(taken, rel=0.4)


def test_each_batch_of_a_step_counts():
    one = make(256, 64, 2)
    three = Candidate(one.tokenizer, one.config, one.batch_size, "muon", 3)
    assert features(three)[:2] == (3, 6)
    assert three.flops - three.muon_flops == 3 * (one.flops - one.muon_flops)
    assert three.step_tokens == 3 * one.step_tokens


@pytest.fixture
def quick(monkeypatch):
    """A trial that stops as soon as it may."""
    monkeypatch.setattr(trial_module, "ENOUGH", (0.0, 0.0))
    return Trial(torch.device("cpu"), fixed=dict(MODERN))


def test_a_trial_ends_when_its_time_is_over(quick, monkeypatch):
    monkeypatch.setattr(trial_module, "WHOLE", (0.0, 0.0, 0.0))
    monkeypatch.setattr(trial_module, "PROBES", 7 * [(64, 16, 1, 16, 1)])
    timed = []
    monkeypatch.setattr(quick, "time", lambda c: timed.append(c) or Times(0.1, 0.03, 0.01))
    quick.rates()
    assert len(timed) == trial_module.LEAST_FEATURES


def test_a_probe_that_would_end_too_late_is_left_out(quick, monkeypatch):
    """After one second of two, three steps of 0.4 seconds would take too long."""
    clock = iter(range(100))
    monkeypatch.setattr(trial_module.time, "perf_counter", lambda: 0.5 * next(clock))
    sizes = [(64, 16, 1, 16, windows) for windows in (1, 1, 1, 1, 2, 8)]
    monkeypatch.setattr(trial_module, "PROBES", sizes)
    timed = []
    monkeypatch.setattr(quick, "time", lambda c: timed.append(c) or Times(0.1, 0.03, 0.01))
    quick.budget = 20.0  # of which the trial takes two seconds
    quick.optimizer = "adamw"  # its operations grow with the windows
    quick.rates()
    assert [c.batch_size for c in timed] == [1, 1, 1, 1, 2]


@pytest.mark.parametrize(("budget", "seconds"), [(60, 0.1), (150, 0.25), (3600, 0.25)])
def test_in_a_short_budget_candidates_are_timed_for_less_long(budget, seconds):
    trial = Trial(torch.device("cpu"), budget=budget)
    assert trial.enough == pytest.approx(seconds)


def test_a_step_an_evaluation_and_a_token_are_timed(quick):
    times = quick.time(make(100, 16, 1, 16, 2))
    assert times.token > 0
    assert times.eval_batch > 0
    assert times.step > 0


@pytest.mark.filterwarnings("ignore:Mismatch dtype")
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true", "64-true"])
def test_a_trial_computes_in_the_precision_of_the_run(precision, quick, monkeypatch):
    seen = set()

    def loss(model, x, y):
        seen.add((model.embedding.weight.dtype, model.head(model.hidden_states(x)).dtype))
        return model.head(model.hidden_states(x)).float().mean()

    monkeypatch.setattr(trial_module, "next_token_loss", loss)
    quick.precision = precision
    quick.time(make(100, 16, 1, 16, 2))
    weights = {"bf16-true": torch.bfloat16, "64-true": torch.float64}.get(precision, torch.float32)
    results = torch.bfloat16 if precision == "bf16-mixed" else weights
    assert seen == {(weights, results)}


def test_a_model_that_does_not_fit_takes_for_ever(quick, monkeypatch):
    def no_memory(*args):
        raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr(trial_module, "GPT", no_memory)
    assert quick.time(make(100, 16, 1, 16, 2)).step == math.inf


def test_a_mistake_is_not_taken_for_a_lack_of_memory(quick, monkeypatch):
    def mistake(*args):
        raise RuntimeError("shapes don't match")

    monkeypatch.setattr(trial_module, "GPT", mistake)
    with pytest.raises(RuntimeError, match="shapes"):
        quick.time(make(100, 16, 1, 16, 2))


@pytest.fixture
def two_threads():
    """PyTorch on two threads, as a laptop has it."""
    usual = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(usual)


@pytest.mark.parametrize(
    ("one", "two", "threads"), [(0.9, 1.0, 1), (1.15, 1.0, 1), (1.25, 1.0, None)]
)
def test_more_threads_are_used_where_they_are_clearly_faster(
    one, two, threads, two_threads, monkeypatch
):
    """On a busy machine they wait for each other: 31 ms became 190 ms a step."""
    steps = []

    def measure(step, limit):
        steps.append(step())
        assert torch.get_num_threads() == 2  # PyTorch's number, which is compared with 1
        return {2: two, 1: one}

    monkeypatch.setattr(trial_module, "thread_times", measure)
    trial = Trial(torch.device("cpu"), fixed=dict(MODERN))
    torch.set_num_threads(1)  # by an earlier candidate
    trial.set_threads(make(100, 16, 1, 16, 2))
    assert (trial.threads, torch.get_num_threads()) == (threads, threads or 2)
    assert steps == [None]  # of the candidate
    trial.set_threads(make(100, 16, 1, 16, 4))  # nearly alike
    assert len(steps) == 1
    trial.set_threads(make(100, 16, 1, 16, 64))
    assert len(steps) == 2


def test_a_given_number_of_threads_is_kept(two_threads, monkeypatch):
    monkeypatch.setattr(trial_module, "thread_times", None)
    trial = Trial(torch.device("cpu"), fixed=dict(MODERN), are_threads_given=True)
    trial.set_threads(make(100, 16, 1, 16, 2))
    assert (trial.threads, torch.get_num_threads()) == (None, 2)
