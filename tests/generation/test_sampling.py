"""Sampling, generate() with its cache, and text that is never broken."""

import codecs
import math
from collections.abc import Iterable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lit_gpt.errors import UserError
from lit_gpt.generation.rows import Rows
from lit_gpt.generation.sampling import Sampling, generate
from lit_gpt.model import GPT, GPTConfig, KVCache
from lit_gpt.text.tokenizer import Tokenizer
from lit_gpt.text.utf8 import stream_text
from lit_gpt.text.vocabularies import load_tokenizer
from tests.spelling import RandomSpelling

GREEDY = Sampling(temperature=0)
TEXT = "农夫山泉 天然水 550ml*24瓶\nOreo cookies 97 g, the quick brown fox 🦊\n"


@pytest.fixture(scope="module", params=["bytes", "cl100k_base, compact"])
def tokenizer(request) -> Tokenizer:
    if request.param == "bytes":
        return load_tokenizer("bytes")
    full = load_tokenizer("cl100k_base")
    return full.compact(full.encode(TEXT).tolist())[0]


def small_model(
    style: str = "classic", context_length: int = 8, vocab_size: int = 50, seed: int = 0, **choices
) -> GPT:
    """In eval mode, with weights large enough for the text before to decide what comes next."""
    torch.manual_seed(seed)
    sizes = {"context_length": context_length, "d_model": 16, "num_blocks": 2, "num_heads": 4}
    model = GPT(GPTConfig(vocab_size, style=style, **sizes, **choices)).eval()
    model.spell(RandomSpelling(vocab_size))
    for weight in model.parameters():
        if weight.ndim > 1:
            nn.init.normal_(weight, std=1.0 if weight is model.embedding.weight else 0.5)
    return model


def some_ids(*shape: int, vocab_size: int = 50) -> Tensor:
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(1))


def all_new(*args, **options) -> Tensor:
    """What generate() yields, as one tensor (B, max_new_tokens)."""
    return torch.stack(list(generate(*args, **options)), dim=1)


def draw(sampling: Sampling, logits: Iterable[float], seen: tuple = (), count: int = 1) -> Tensor:
    rows = torch.tensor(list(logits)).repeat(count, 1)
    seen_rows = torch.tensor(seen, dtype=torch.int64).repeat(count, 1)
    return sampling(rows, seen_rows, torch.Generator().manual_seed(1337))


def shares(sampling: Sampling, logits: Iterable[float], seen: tuple = ()) -> list[float]:
    """How often each token is drawn; 40,000 draws are within 0.01."""
    drawn = draw(sampling, logits, seen, count=40_000)
    return (torch.bincount(drawn, minlength=4) / len(drawn)).tolist()


# From logits to the next token

# Four tokens with the chances 0.15, 0.5, 0.1 and 0.25.
LOGITS = [math.log(chance) for chance in (0.15, 0.5, 0.1, 0.25)]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0.15, 0.5, 0.1, 0.25]),
        ({"top_k": 1}, [0, 1, 0, 0]),
        ({"top_k": 2}, [0, 2 / 3, 0, 1 / 3]),
        ({"top_k": 3}, [1 / 6, 5 / 9, 0, 5 / 18]),
        ({"top_k": 100}, [0.15, 0.5, 0.1, 0.25]),
        ({"top_p": 1e-9}, [0, 1, 0, 0]),
        ({"top_p": 0.49}, [0, 1, 0, 0]),
        ({"top_p": 0.51}, [0, 2 / 3, 0, 1 / 3]),
        ({"top_p": 0.74}, [0, 2 / 3, 0, 1 / 3]),
        ({"top_p": 0.76}, [1 / 6, 5 / 9, 0, 5 / 18]),
        ({"top_p": 0.91}, [0.15, 0.5, 0.1, 0.25]),
        ({"top_k": 3, "top_p": 0.8}, [0, 2 / 3, 0, 1 / 3]),  # 5/9 + 5/18 of the three is 0.83
        ({"min_p": 0.31}, [0, 2 / 3, 0, 1 / 3]),  # at least 0.155
        ({"min_p": 0.29}, [1 / 6, 5 / 9, 0, 5 / 18]),
        ({"min_p": 0.19}, [0.15, 0.5, 0.1, 0.25]),
        ({"min_p": 1.0}, [0, 1, 0, 0]),
        ({"min_p": 0.26, "temperature": 0.5}, [0, 1, 0, 0]),  # of 0.7246, after the temperature
        ({"min_p": 0.24, "temperature": 0.5}, [0, 0.8, 0, 0.2]),
        ({"min_p": 0.31, "top_p": 0.4}, [0, 1, 0, 0]),
        ({"temperature": 0}, [0, 1, 0, 0]),
        ({"temperature": 0.01}, [0, 1, 0, 0]),
        ({"temperature": 1e-40}, [0, 1, 0, 0]),
        ({"temperature": 0.5}, [0.0652, 0.7246, 0.0290, 0.1812]),  # the squares, of 0.345
        ({"temperature": 2}, [0.2027, 0.3701, 0.1655, 0.2617]),  # the roots, of 1.9106
        ({"temperature": 0.5, "top_p": 0.7}, [0, 1, 0, 0]),
        ({"temperature": 1e6}, [0.25, 0.25, 0.25, 0.25]),
        ({"top_p": 1e-50}, [0, 1, 0, 0]),  # 0 as float32
    ],
)
def test_tokens_are_drawn_with_these_probabilities(options, expected):
    sampling = Sampling(**{"temperature": 1, **options})
    assert shares(sampling, LOGITS) == pytest.approx(expected, abs=0.01)
    told = sampling.probabilities(torch.tensor([LOGITS]), torch.tensor([[0]]))[0]
    assert told.tolist() == pytest.approx(expected, abs=1e-4)


def test_each_row_is_drawn_from_its_own_logits():
    logits, seen = torch.tensor([[0.0, 9.0], [9.0, 0.0]]), torch.tensor([[0], [0]])
    for options in ({"temperature": 0}, {"temperature": 0.1}, {"top_k": 1}, {"top_p": 0.5}):
        assert Sampling(**options)(logits, seen, torch.Generator()).tolist() == [1, 0]


@given(
    logits=st.lists(st.floats(-50, 50, width=32), min_size=2, max_size=20, unique=True),
    top_k=st.none() | st.integers(1, 30),
    top_p=st.floats(1e-6, 1),
    min_p=st.floats(0, 1),
    temperature=st.floats(0.05, 10),
)
@settings(deadline=None, max_examples=100)
def test_any_options_leave_a_token_to_draw(logits, top_k, top_p, min_p, temperature):
    """What is drawn is always a token, one of the top_k likeliest."""
    (drawn,) = draw(Sampling(temperature, top_k, top_p, min_p=min_p), logits).tolist()
    assert drawn in sorted(range(len(logits)), key=lambda i: -logits[i])[:top_k]


@pytest.mark.parametrize(
    ("penalty", "expected"),
    [
        (1.0, [8 / 11, 1 / 11, 2 / 11]),  # of weights 4, 1/2 and 1
        (2.0, [8 / 13, 1 / 13, 4 / 13]),  # 2, 1/4, 1: a positive logit halves, a negative doubles
        (0.5, [16 / 17.7071, 0.7071 / 17.7071, 1 / 17.7071]),  # 16, sqrt(1/2), 1: repeats more
    ],
)
def test_repetition_penalty_makes_seen_tokens_less_likely(penalty, expected):
    """The logits are ln 4, -ln 2 and 0; the first two tokens were seen, one of them twice."""
    sampling = Sampling(temperature=1, repetition_penalty=penalty)
    found = shares(sampling, [math.log(4), -math.log(2), 0.0], seen=(0, 1, 0))
    assert found == pytest.approx([*expected, 0], abs=0.01)


@pytest.mark.parametrize(
    ("logits", "seen", "expected"),
    [
        ([2.0, 1.5, -1.0], (), 0),
        ([2.0, 1.5, -1.0], (0,), 1),
        ([2.0, 1.5, -1.0], (0, 1), 0),
        ([2.0, 1.5, -1.0], (2, 2), 0),
        ([-1.0, -1.5, -3.0], (0,), 1),
    ],
)
def test_repetition_penalty_holds_for_the_likeliest_token_too(logits, seen, expected):
    assert draw(Sampling(0, repetition_penalty=2.0), logits, seen).tolist() == [expected]


@pytest.mark.parametrize(
    ("frequency", "presence", "expected"),
    [
        (0.0, 0.0, [4 / 7, 2 / 7, 1 / 7]),
        (math.log(2), 0.0, [1 / 3, 1 / 3, 1 / 3]),  # written twice, once, never: 4 / 4, 2 / 2, 1
        (0.0, math.log(2), [2 / 4, 1 / 4, 1 / 4]),  # 4 / 2, 2 / 2, 1
        (-math.log(2), math.log(2), [8 / 11, 2 / 11, 1 / 11]),  # 4 * 4 / 2, 2 * 2 / 2, 1
    ],
)
def test_openais_penalties_count_what_was_written(frequency, presence, expected):
    """The logits are ln 4, ln 2 and 0; what was only read does not count."""
    sampling = Sampling(1, frequency_penalty=frequency, presence_penalty=presence)
    logits = torch.tensor([[math.log(4), math.log(2), 0.0]])
    seen = torch.tensor([[2, 2, 0, 1, 0]])
    assert sampling.probabilities(logits, seen, [[0, 1, 0]])[0].tolist() == pytest.approx(expected)


def test_generate_counts_what_it_writes():
    """A presence that outweighs all logits: no token twice, but those of the prompt once more."""
    logits_differ_by = 2e-3  # less than the penalty, so that the order of the tokens is kept
    model = small_model(vocab_size=8)
    model.head.weight.data *= logits_differ_by / 20
    (new,) = all_new(model, torch.arange(8)[None], 8, Sampling(0, presence_penalty=2.0))
    assert sorted(new.tolist()) == list(range(8))


@pytest.mark.parametrize("style", ["classic", "modern", "fast"])
def test_a_high_penalty_repeats_nothing_the_model_sees(style):
    new = all_new(small_model(style), some_ids(1, 1), 7, Sampling(0, repetition_penalty=100))[0]
    assert len({*some_ids(1, 1)[0].tolist(), *new.tolist()}) == 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, "temperature -0.1: must be in [0, 1e6]"),
        ({"temperature": 1e39}, "temperature 1e+39: must be in [0, 1e6]"),  # infinite as float32
        ({"temperature": math.inf}, "temperature inf: must be in [0, 1e6]"),
        ({"temperature": math.nan}, "temperature nan: must be in [0, 1e6]"),
        ({"top_k": 0}, "top_k 0: must be at least 1"),
        ({"top_k": -1}, "top_k -1: must be at least 1"),
        ({"top_p": 0.0}, "top_p 0.0: must be in (0, 1]"),
        ({"top_p": 1.1}, "top_p 1.1: must be in (0, 1]"),
        ({"top_p": math.nan}, "top_p nan: must be in (0, 1]"),
        ({"min_p": -0.1}, "min_p -0.1: must be in [0, 1]"),
        ({"min_p": 1.1}, "min_p 1.1: must be in [0, 1]"),
        ({"min_p": math.nan}, "min_p nan: must be in [0, 1]"),
        ({"frequency_penalty": 2.1}, "frequency_penalty 2.1: must be in [-2, 2]"),
        ({"presence_penalty": math.nan}, "presence_penalty nan: must be in [-2, 2]"),
        ({"repetition_penalty": 0.0}, "repetition_penalty 0.0: must be in [0.01, 100]"),
        ({"repetition_penalty": -1.0}, "repetition_penalty -1.0: must be in [0.01, 100]"),
        ({"repetition_penalty": math.nan}, "repetition_penalty nan: must be in [0.01, 100]"),
    ],
)
def test_values_out_of_range_are_a_user_error(options, message):
    with pytest.raises(UserError) as error:
        Sampling(**options)
    assert str(error.value) == message
    assert error.value.field in options


# generate()


def greedy_by_hand(model: GPT, ids: Tensor, max_new_tokens: int) -> Tensor:
    """The likeliest token after the window, again and again; a full window keeps its later half."""
    context = model.config.context_length
    window, new = ids[:, -context:], []
    for _ in range(max_new_tokens):
        if window.size(1) > context:
            window = window[:, -max(1, context // 2) :]
        new.append(model(window)[:, -1].argmax(-1))
        window = torch.cat([window, new[-1][:, None]], dim=1)
    return torch.stack(new, dim=1)


@torch.no_grad()
@pytest.mark.parametrize("style", ["classic", "modern", "fast"])
@pytest.mark.parametrize("context_length", [1, 2, 3, 7, 8])
@pytest.mark.parametrize("prompt_length", [1, 4, 8, 20])
def test_greedy_text_is_the_same_as_without_a_cache(style, context_length, prompt_length):
    """Within the context length and beyond it, for a batch of three texts."""
    model = small_model(style, context_length).double()  # so that no rounding decides a tie
    ids = some_ids(3, prompt_length)
    expected = greedy_by_hand(model, ids, 30)
    assert torch.equal(all_new(model, ids, 30, GREEDY), expected)
    assert len(expected.unique()) > 2  # not one token again and again


@pytest.mark.parametrize("num_kv_heads", [1, 2])
def test_the_cache_holds_grouped_keys_and_values(num_kv_heads):
    model = small_model("modern", num_kv_heads=num_kv_heads).double()
    ids = some_ids(3, 4)
    assert torch.equal(all_new(model, ids, 30, GREEDY), greedy_by_hand(model, ids, 30))
    assert KVCache(model.config, 3, model.embedding.weight).keys.shape == (2, 3, num_kv_heads, 8, 4)


@torch.no_grad()
@pytest.mark.parametrize("prompt_length", [1, 5, 8])
@pytest.mark.parametrize(
    ("style", "choices"),
    [
        ("classic", {}),
        ("classic", {"position": "learned"}),
        ("classic", {"num_kv_heads": 2}),
        ("modern", {}),
        ("modern", {"num_kv_heads": 1}),
        ("fast", {}),
        ("fast", {"bigram_rows": 50}),
        ("fast", {"bigram_rows": 50, "smear": False}),
        ("fast", {"spelling_rows": 20}),
        ("fast", {"output_spelling_rows": 20}),
        ("fast", {"softmax_cutoff": 0.3}),
        ("classic", {"bigram_rows": 50}),
        ("classic", {"sliding_window": 3}),
        ("modern", {"sliding_window": 4, "num_kv_heads": 1}),
        ("modern", {"parallel_residual": True, "rotary_fraction": 0.5}),
    ],
)
def test_cached_logits_are_those_of_the_whole_text(style, choices, prompt_length):
    model, ids = small_model(style, **choices).double(), some_ids(3, 8)
    cache = KVCache(model.config, 3, model.embedding.weight)
    steps = [model(ids[:, :prompt_length], cache)]
    steps += [model(ids[:, t : t + 1], cache) for t in range(prompt_length, 8)]
    torch.testing.assert_close(torch.cat(steps, dim=1), model(ids), rtol=0, atol=1e-9)
    assert cache.length == 8


@torch.no_grad()
@pytest.mark.parametrize("style", ["classic", "modern", "fast"])
def test_rows_that_are_kept_go_on_as_if_the_others_had_never_been(style):
    """In another order, before and after the window of 8 has slid to its later 4."""
    model, texts = small_model(style).double(), some_ids(4, 11)
    rows, lengths = Rows(model), []
    for text in texts[:, :5].tolist():
        rows.add(text)
    for place, kept in enumerate(([0, 1, 2, 3], [3, 1, 0], [2, 0], [0, 1], [1], [0]), start=5):
        rows.keep(kept)
        texts = texts[kept]
        every, logits = rows.logits()
        assert every == list(range(len(kept)))
        seen = rows.seen(every)
        lengths.append(seen.size(1))
        window = texts[:, place - lengths[-1] : place]
        assert torch.equal(seen, window)
        expected = model(window)[:, -1].float()
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-6)
        rows.append(every, texts[:, place])
    assert lengths == [5, 6, 7, 8, 4, 5]


def test_several_tokens_on_a_cache_that_holds_some_are_refused():
    model = small_model()
    cache = KVCache(model.config, 1, model.embedding.weight)
    model(some_ids(1, 2), cache)
    with pytest.raises(AssertionError):
        model(some_ids(1, 2), cache)


@pytest.mark.parametrize(
    ("context_length", "expected"),
    [
        (4, [4, 2, 1, 1, 2, 1, 1, 2]),
        (5, [5, 2, 1, 1, 1, 2, 1, 1]),
        (1, [1, 1, 1, 1, 1, 1, 1, 1]),
    ],
)
def test_the_window_slides_to_its_later_half_when_it_is_full(context_length, expected):
    """How many tokens the model reads at each step, after a prompt longer than the context."""
    model, lengths = small_model(context_length=context_length), []
    model.embedding.register_forward_pre_hook(lambda _, args: lengths.append(args[0].size(1)))
    all_new(model, some_ids(1, 6), 8, GREEDY)
    assert lengths == expected


def test_only_the_end_of_a_long_prompt_is_used():
    model, ids = small_model(), some_ids(1, 30)
    assert torch.equal(all_new(model, ids, 20), all_new(model, ids[:, -8:], 20))


def test_a_seed_decides_the_text():
    model, ids, sampling = small_model(), some_ids(3, 4), Sampling(temperature=1)
    first, again, other = (all_new(model, ids, 20, sampling, seed) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_generating_leaves_the_global_random_state_alone():
    before = torch.get_rng_state()
    model = small_model()  # seeds it with 0
    expected = torch.get_rng_state()
    all_new(model, some_ids(1, 4), 5)
    assert torch.equal(torch.get_rng_state(), expected)
    torch.set_rng_state(before)


def test_ids_come_one_at_a_time_up_to_max_new_tokens():
    new = generate(small_model(), some_ids(3, 4), 2)
    assert next(new).shape == (3,)
    assert next(new).shape == (3,)
    assert next(new, None) is None


# Text that is never broken


def broken_bytes(data: bytes) -> bytes:
    """The part of `data` that is not UTF-8; an unfinished last character is fine."""
    try:
        codecs.getincrementaldecoder("utf-8")("strict").decode(data)
    except UnicodeDecodeError as error:
        return data[error.start : error.end]
    return b""


def prompt_ids(tokenizer: Tokenizer, text: str, batch_size: int = 1) -> Tensor:
    return torch.from_numpy(tokenizer.encode(text).astype("int64")).repeat(batch_size, 1)


@given(text=st.text())
@settings(deadline=None, max_examples=200)
def test_streamed_text_is_the_text_and_never_broken(tokenizer, text):
    ids = tokenizer.encode(text).tolist()
    pieces = list(stream_text(tokenizer, ids))
    assert "".join(pieces) == tokenizer.decode(ids) == text
    assert "" not in pieces


def test_a_character_appears_once_it_is_whole():
    """水 is the three bytes e6 b0 b4."""
    arrived: list[int] = []

    def ids() -> Iterator[int]:
        for i in "a水b".encode():
            arrived.append(i)
            yield i

    found = [(len(arrived), text) for text in stream_text(load_tokenizer("bytes"), ids())]
    assert found == [(1, "a"), (4, "水"), (5, "b")]


@pytest.mark.parametrize("length", [1, 2])
def test_an_unfinished_character_does_not_appear(length):
    ids = "a水".encode()[: 1 + length]
    assert list(stream_text(load_tokenizer("bytes"), ids)) == ["a"]


@pytest.mark.parametrize("style", ["classic", "modern"])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    "sampling",
    [GREEDY, Sampling(1), Sampling(5), Sampling(1, top_k=1), Sampling(2, 20, 0.5, 1.3)],
    ids=["greedy", "1", "5", "top_k 1", "all options"],
)
def test_untrained_models_write_only_valid_text(tokenizer, style, seed, sampling):
    model = small_model(style, vocab_size=tokenizer.vocab_size, seed=seed)
    new = all_new(model, prompt_ids(tokenizer, "水 a", 3), 40, sampling, seed, tokenizer)
    for row in new.tolist():
        assert not broken_bytes(tokenizer.decode_bytes(row))
        assert "\ufffd" not in "".join(stream_text(tokenizer, row))


def test_without_a_tokenizer_untrained_models_do_write_broken_text():
    """So the test above can fail."""
    tokenizer, model = load_tokenizer("bytes"), small_model(vocab_size=256)
    (row,) = all_new(model, some_ids(1, 4, vocab_size=128), 40, Sampling(1)).tolist()
    assert broken_bytes(tokenizer.decode_bytes(row))


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(1)], ids=["greedy", "1"])
def test_a_character_that_the_prompt_begins_is_completed(tokenizer, sampling):
    """As tokens of a corpus may end anywhere: the prompts of the samples while training do."""
    prompts = [b"abc\xe6", b"ab\xe6\xb0", b"a\xf0\x9f\xa6", b"\xe6\xb0\xb4a"]  # 水, 🦊
    ids = torch.tensor([[tokenizer.ranks[bytes([byte])] for byte in text] for text in prompts])
    model = small_model(vocab_size=tokenizer.vocab_size)
    new = all_new(model, ids, 20, sampling, tokenizer=tokenizer)
    for prompt, row in zip(prompts, new.tolist(), strict=True):
        assert not broken_bytes(prompt + tokenizer.decode_bytes(row))


@pytest.mark.parametrize("prompt", ["𠮷野家🦊", "Ünïcödé", "\x00\t\r\n", "<|endoftext|>", "\ufeff"])
def test_any_prompt_works_even_with_unseen_characters(tokenizer, prompt):
    ids = prompt_ids(tokenizer, prompt)
    model = small_model(vocab_size=tokenizer.vocab_size)
    new = all_new(model, ids, 20, Sampling(1), tokenizer=tokenizer)
    written = "".join(stream_text(tokenizer, [*ids[0].tolist(), *new[0].tolist()]))
    assert written.startswith(prompt)
    assert "\ufffd" not in written
    assert len(written) > len(prompt)
