"""Rows: texts of any lengths that share the model's calls, and come and go."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from lit_gpt.generation.rows import MAX_READ, Rows, fill_gaps
from lit_gpt.model import GPT, KVCache
from tests.generation.test_sampling import small_model, some_ids

ARCHITECTURES = [
    ("classic", {}),
    ("classic", {"position": "learned"}),
    ("modern", {"num_kv_heads": 2}),
    ("fast", {"bigram_rows": 50, "spelling_rows": 20, "softmax_cutoff": 0.3}),
    ("fast", {"output_spelling_rows": 20, "softmax_cutoff": 0.3}),
    ("modern", {"sliding_window": 3}),
    ("classic", {"position": "rotary", "rotary_fraction": 0.5, "parallel_residual": True}),
]


def window(model: GPT, text: list[int], num_prompt: int) -> list[int]:
    """What the model sees of a text: its end, of which the earlier half goes when it is full."""
    context = model.config.context_length
    seen = text[:num_prompt][-context:]
    for token in text[num_prompt:]:
        seen = [*seen, token]
        if len(seen) > context:
            seen = seen[-max(1, context // 2) :]
    return seen


def calls(model: GPT) -> list[tuple[int, ...]]:
    """Grows by the shape (B, T) of the ids at each call of the model."""
    shapes: list[tuple[int, ...]] = []
    model.embedding.register_forward_pre_hook(lambda _, args: shapes.append(tuple(args[0].shape)))
    return shapes


@torch.inference_mode()
@pytest.mark.parametrize(("style", "choices"), ARCHITECTURES)
@pytest.mark.parametrize("context_length", [1, 8, 9])
def test_rows_that_come_and_go_get_the_logits_of_each_alone(style, choices, context_length):
    """For 40 steps; the texts are random, as is when they begin and end."""
    model = small_model(style, context_length, **choices).double()
    rows, dice = Rows(model), random.Random(context_length)
    texts: list[list[int]] = []
    prompts: list[int] = []
    compared = 0
    for _ in range(40):
        for _ in range(dice.choice([0, 0, 1, 3]) if texts else 1):
            texts.append([dice.randrange(50) for _ in range(dice.randrange(1, 14))])
            prompts.append(len(texts[-1]))
            rows.add(texts[-1])
        ready, logits = rows.logits()
        for row, found in zip(ready, logits, strict=True):
            seen = window(model, texts[row], prompts[row])
            expected = model(torch.tensor([seen]))[0, -1].float()
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
            assert set(rows.seen([row])[0].tolist()) == set(seen)
            compared += 1
        new = [dice.randrange(50) for _ in ready]
        rows.append(ready, torch.tensor(new))
        for row, token in zip(ready, new, strict=True):
            texts[row].append(token)
        kept = fill_gaps([row for row in range(len(texts)) if dice.random() < 0.93])
        rows.keep(kept)
        texts = [texts[row] for row in kept]
        prompts = [prompts[row] for row in kept]
    assert compared > 100


@torch.inference_mode()
@pytest.mark.parametrize("style", ["classic", "modern", "fast"])
def test_texts_of_one_length_get_the_logits_of_the_plain_cache_to_the_bit(style):
    model, texts = small_model(style), some_ids(3, 8)
    rows, cache = Rows(model), KVCache(model.config, 3, model.embedding.weight)
    for text in texts.tolist():
        rows.add(text[:4])
    new = texts[:, :4]
    for place in range(4, 8):
        ready, logits = rows.logits()
        assert ready == [0, 1, 2]
        assert torch.equal(logits, model.head(model.hidden_states(new, cache)[:, -1]))
        new = texts[:, place : place + 1]
        rows.append(ready, new[:, 0])


def step(rows: Rows, token: int = 7) -> list[int]:
    """Writes the same token everywhere; returns the rows that took it."""
    ready, _ = rows.logits()
    rows.append(ready, torch.full((len(ready),), token))
    return ready


@torch.inference_mode()
def test_a_new_prompt_is_read_beside_the_next_token_of_the_others():
    model = small_model()
    rows, shapes = Rows(model), calls(model)
    rows.add([1, 2, 3])
    assert step(rows) == [0]
    rows.add([4, 5])
    rows.add([6, 7, 8, 9])
    assert step(rows) == [1, 2, 0]
    assert step(rows) == [0, 1, 2]
    assert shapes == [(1, 3), (2, 4), (1, 1), (3, 1)]


@torch.inference_mode()
def test_a_long_prompt_does_not_hold_up_the_others():
    """It is read in parts, and one that comes later waits for it."""
    model = small_model(context_length=1000)
    rows, shapes = Rows(model), calls(model)
    rows.add([1])
    step(rows)
    rows.add([2] * (2 * MAX_READ + 5))
    rows.add([3, 3])
    assert [step(rows) for _ in range(5)] == [[0], [0], [1, 0], [2, 0, 1], [0, 1, 2]]
    whole, pair = (1, 1), (1, 2)
    assert shapes == [
        whole, (1, MAX_READ), whole, (1, MAX_READ), whole, (1, 5), whole, pair, (2, 1), (3, 1),
    ]  # fmt: skip


@torch.inference_mode()
def test_a_long_prompt_that_holds_up_nobody_is_read_at_once():
    model = small_model(context_length=1000)
    rows, shapes = Rows(model), calls(model)
    for _ in range(2):
        rows.add([2] * 900)
    rows.add([3] * 10)
    assert step(rows) == [0, 1]
    assert step(rows) == [2, 0, 1]
    assert shapes == [(2, 900), (1, 10), (2, 1)]
    rows.keep([1])
    rows.add([4] * 600)
    step(rows)  # reads a part of it
    rows.keep([1])
    assert step(rows) == [0]
    assert shapes[-1] == (1, 600 - MAX_READ)


@torch.inference_mode()
def test_prompts_are_read_together_as_far_as_little_is_padded():
    model = small_model(context_length=1000)
    rows, shapes = Rows(model), calls(model)
    rows.add([1])
    step(rows)
    for length in (MAX_READ // 4, 3, MAX_READ // 3, MAX_READ, 3):
        rows.add([2] * length)
    assert [step(rows) for _ in range(3)] == [[1, 2, 3, 0], [4, 0, 1, 2, 3], [5, 0, 1, 2, 3, 4]]
    assert shapes[1::2] == [(3, MAX_READ // 3), (1, MAX_READ), (1, 3)]


@torch.inference_mode()
def test_the_oldest_prompt_is_read_first_even_if_a_later_one_moved_before_it():
    model = small_model(context_length=1000)
    rows = Rows(model)
    for _ in range(2):
        rows.add([1])
    step(rows)
    rows.add([2] * MAX_READ)
    rows.add([3] * MAX_READ)
    rows.keep(fill_gaps([0, 2, 3]))  # the last takes the place of the second
    assert step(rows) == [2, 0]
    assert step(rows) == [1, 0, 2]


def test_the_last_rows_fill_the_gaps():
    assert fill_gaps([0, 1, 2]) == [0, 1, 2]
    assert fill_gaps([0, 2, 3]) == [0, 3, 2]
    assert fill_gaps([1, 4, 5]) == [5, 1, 4]
    assert fill_gaps([]) == []


@torch.inference_mode()
def test_a_cache_grows_by_doubling_and_is_gone_with_the_last_row():
    model = small_model()
    rows, sizes = Rows(model), []
    for _ in range(5):
        rows.add([1])
        step(rows)
        sizes.append(rows.cache.keys.size(1))
    assert sizes == [1, 2, 4, 4, 8]
    rows.keep([])
    assert rows.cache.keys.untyped_storage().nbytes() == 0


@torch.inference_mode()
def test_a_call_that_fails_changes_nothing_for_the_other_rows():
    model = small_model().double()
    rows = Rows(model)
    rows.add([1, 2])
    step(rows)
    rows.add([3] * 5)

    def too_long(_: object, args: tuple[Tensor]) -> None:
        if args[0].size(1) == 5:
            raise torch.OutOfMemoryError

    model.embedding.register_forward_pre_hook(too_long)
    with pytest.raises(torch.OutOfMemoryError):
        rows.logits()
    assert rows.at_work == [1]
    rows.keep([0])
    _, logits = rows.logits()
    expected = model(torch.tensor([[1, 2, 7]]))[:, -1].float()
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-6)


@pytest.mark.filterwarnings("ignore:Mismatch dtype")
@torch.inference_mode()
def test_rows_of_several_lengths_are_read_under_autocast():
    model = small_model("modern")
    texts = [[1, 2], [3, 4, 5, 6]]
    with torch.autocast("cpu", torch.bfloat16):
        rows = Rows(model)
        for text in texts:
            rows.add(text)
        step(rows)
        _, logits = rows.logits()
        for text, found in zip(texts, logits, strict=True):
            expected = model(torch.tensor([[*text, 7]]))[0, -1].float()
            torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05 * expected.abs().max())
