"""GPTConfig and GPT: every choice, causality, each formula by hand, the classic loop as oracle."""

import importlib.util
import math
from dataclasses import asdict
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lit_gpt.errors import UserError
from lit_gpt.model import (
    GPT,
    Attention,
    FeedForward,
    GPTConfig,
    make_norm,
    rotary_rates,
    rotary_table,
    rotate,
    sinusoids,
)
from lit_gpt.module import next_token_loss
from lit_gpt.optim import build_optimizer
from tests.spelling import RandomSpelling

TINY = {"context_length": 8, "d_model": 16, "num_blocks": 2, "num_heads": 4, "dropout": 0.0}

CLASSIC = {
    "position": "sinusoidal",
    "norm": "layer",
    "activation": "relu",
    "bias": True,
    "tie_embeddings": False,
    "num_kv_heads": 4,
    "qk_norm": False,
    "smear": False,
    "bigram_rows": 0,
    "head_size": 4,
    "rotary_base": 10_000,
    "rotary_fraction": 1.0,
    "rope_scaling": None,
    "parallel_residual": False,
    "sliding_window": None,
}
MODERN = {
    "position": "rotary",
    "norm": "rms",
    "activation": "swiglu",
    "bias": False,
    "tie_embeddings": True,
    "num_kv_heads": 4,
    "qk_norm": True,
    "smear": False,
    "bigram_rows": 0,
    "head_size": 4,
    "rotary_base": 10_000,
    "rotary_fraction": 1.0,
    "rope_scaling": None,
    "parallel_residual": False,
    "sliding_window": None,
}
FAST = MODERN | {"tie_embeddings": False, "smear": True}
STYLES = {"classic": CLASSIC, "modern": MODERN, "fast": FAST}

# Each choice, and how many parameters it adds to the tiny model (11 tokens) of that style.
OVERRIDES = [
    ("classic", "position", "learned", 8 * 16),
    ("classic", "position", "rotary", 0),
    ("classic", "norm", "rms", -5 * 16),  # no bias in any of the 5 norms
    ("classic", "activation", "gelu", 0),
    ("classic", "activation", "gelu_tanh", 0),
    ("classic", "activation", "swiglu", 2 * (16 * 96 + 96 + 48 * 16 + 16 - 16 * 64 * 2 - 64 - 16)),
    ("classic", "bias", False, -2 * (48 + 16 + 64 + 16) - 5 * 16),
    ("classic", "tie_embeddings", True, -11 * 16),
    ("classic", "num_kv_heads", 1, -2 * 2 * 3 * 4 * (16 + 1)),  # 3 heads of 4 less, twice a block
    ("classic", "num_kv_heads", 2, -2 * 2 * 2 * 4 * (16 + 1)),
    ("classic", "qk_norm", True, 2 * 2 * 4),
    ("classic", "head_size", 3, -2 * (3 * 4 * (16 + 1) + 4 * 16)),  # 4 heads, each 1 less
    ("classic", "smear", True, 16),
    ("classic", "bigram_rows", 50, 50 * 16),
    ("modern", "position", "learned", 8 * 16),
    ("modern", "position", "sinusoidal", 0),
    ("modern", "norm", "layer", 0),
    ("modern", "activation", "relu", 2 * (16 * 64 * 2 - 16 * 96 - 48 * 16)),
    ("modern", "activation", "gelu", 2 * (16 * 64 * 2 - 16 * 96 - 48 * 16)),
    ("modern", "bias", True, 2 * (48 + 16 + 96 + 16)),
    ("modern", "tie_embeddings", False, 11 * 16),
    ("modern", "num_kv_heads", 1, -2 * 2 * 3 * 4 * 16),
    ("modern", "num_kv_heads", 2, -2 * 2 * 2 * 4 * 16),
    ("modern", "qk_norm", False, -2 * 2 * 4),
    ("modern", "head_size", 6, 2 * (3 * 4 * 2 * 16 + 4 * 2 * 16 + 2 * 2)),
    ("modern", "rotary_base", 100.0, 0),
    ("classic", "qkv_bias", False, -2 * 48),
    ("classic", "mlp_bias", False, -2 * (64 + 16)),
    ("modern", "qkv_bias", True, 2 * 48),
    ("modern", "mlp_bias", True, 2 * (96 + 16)),
    ("classic", "norm_eps", 0.1, 0),
    ("modern", "norm_eps", 0.1, 0),
    ("modern", "rotary_fraction", 0.5, 0),
    ("classic", "parallel_residual", True, 0),
    ("classic", "sliding_window", 5, 0),  # through two blocks, 8 tokens back
    ("modern", "sliding_window", 7, 0),
    ("modern", "smear", True, 16),
    ("modern", "bigram_rows", 1, 16),
    ("fast", "smear", False, -16),
    ("fast", "bigram_rows", 8191, 8191 * 16),
    ("fast", "spelling_rows", 50, 50 * 16),
    ("classic", "spelling_rows", 1, 16),
    ("modern", "spelling_rows", 50, 50 * 16),
    ("fast", "output_spelling_rows", 50, 50 * 16),
    ("classic", "output_spelling_rows", 2, 2 * 16),
    ("modern", "output_spelling_rows", 50, 50 * 16),
    ("fast", "softmax_cutoff", 0.3, 16),
    ("classic", "softmax_cutoff", 0.99, 16),
    ("fast", "tie_embeddings", True, -11 * 16),
    ("fast", "position", "learned", 8 * 16),
]
VARIANTS = [(style, {}) for style in STYLES] + [(s, {c: v}) for s, c, v, _ in OVERRIDES]


def tiny(style: str = "classic", **choices) -> GPT:
    """A small model in eval mode, its weights large enough for every token to matter."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(11, style=style, **{**TINY, **choices})).eval()
    model.spell(RandomSpelling(11))
    for name, weight in model.named_parameters():
        nn.init.normal_(weight, 1.0 if name.endswith("norm.weight") else 0.0, 0.3)
    return model


def some_ids(*shape: int, vocab_size: int = 11) -> Tensor:
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(1))


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x).flatten(0, 1), y.flatten())


def choices_of(config: GPTConfig) -> dict:
    return {name: asdict(config)[name] for name in CLASSIC}


# The choices


@pytest.mark.parametrize("style", STYLES)
def test_a_style_is_its_table_of_choices(style):
    assert choices_of(GPTConfig(11, style=style, **TINY)) == STYLES[style]


@pytest.mark.parametrize(("style", "choice", "value", "_"), OVERRIDES)
def test_one_choice_overridden_leaves_the_style_s_others(style, choice, value, _):
    config = GPTConfig(11, style=style, **TINY, **{choice: value})
    assert choices_of(config) == {
        n: v for n, v in {**STYLES[style], choice: value}.items() if n in CLASSIC
    }
    assert getattr(config, choice) == value


@pytest.mark.parametrize(("style", "choice", "value", "added"), OVERRIDES)
def test_every_choice_changes_the_model(style, choice, value, added):
    """Its number of parameters by just as many or, with the same weights, its logits."""
    plain, other = tiny(style), tiny(style, **{choice: value})
    assert sum(other.num_parameters()) - sum(plain.num_parameters()) == added
    if added == 0:
        other.load_state_dict(plain.state_dict())
        ids = some_ids(1, 8)
        assert (other(ids) - plain(ids)).abs().max() > 0.01


@pytest.mark.parametrize(("style", "choices"), VARIANTS)
def test_no_parameter_is_idle(style, choices):
    model = tiny(style, **choices)
    loss_of(model, some_ids(4, 8), some_ids(4, 8).roll(1)).backward()
    assert [n for n, p in model.named_parameters() if p.grad.abs().max() < 1e-6] == []


@pytest.mark.parametrize(("style", "choices"), VARIANTS)
def test_a_token_changes_its_own_and_later_logits_only(style, choices):
    model, ids = tiny(style, **choices), some_ids(1, 8)
    changed = ids.repeat(8, 1)
    changed.diagonal().copy_((ids[0] + 1) % 11)  # row t: another token at place t
    differs = (model(changed) - model(ids)).abs().amax(-1) > 1e-5  # (t, place)
    assert torch.equal(differs, torch.ones(8, 8).triu().bool())


@pytest.mark.parametrize(("style", "choices"), VARIANTS)
@pytest.mark.parametrize("length", [1, 3, 8])
def test_logits_have_a_row_of_vocab_size_for_each_token(style, choices, length):
    assert tiny(style, **choices)(some_ids(2, length)).shape == (2, length, 11)


@pytest.mark.parametrize("style", STYLES)
def test_each_text_of_a_batch_is_read_alone(style):
    model, ids = tiny(style), some_ids(3, 8)
    alone = torch.cat([model(row[None]) for row in ids])
    torch.testing.assert_close(model(ids), alone, rtol=1e-5, atol=1e-5)


def test_more_tokens_than_context_length_are_refused():
    with pytest.raises(AssertionError, match="9 tokens > 8"):
        tiny()(some_ids(1, 9))


# Its size and its start


def test_the_default_model_has_as_many_parameters_as_the_formula_says():
    C, V, blocks = 80, 1000, 6
    attention = C * 3 * C + 3 * C + C * C + C  # query, key and value; output
    feed_forward = C * 4 * C + 4 * C + 4 * C * C + C
    norms = 2 * 2 * C
    rest = blocks * (attention + feed_forward + norms) + 2 * C
    assert rest == 467_200
    assert GPT(GPTConfig(V)).num_parameters() == (2 * V * C, rest)


def test_tied_embeddings_are_one_matrix_and_counted_once():
    model = GPT(GPTConfig(1000, tie_embeddings=True))
    assert model.head.weight is model.embedding.weight
    assert model.num_parameters() == (80_000, 467_200)


@pytest.mark.parametrize(("style", "choices"), VARIANTS)
def test_least_weights_is_a_close_lower_bound(style, choices):
    sizes = {"d_model": 96, "num_blocks": 3, "context_length": 8} | choices
    config = GPTConfig(11, style=style, **sizes)
    assert 0.95 < config.least_weights() / sum(GPT(config).num_parameters()) <= 1


@pytest.mark.parametrize("vocab_size", [65, 256, 1000, 6153, 20_000])
@pytest.mark.parametrize("style", STYLES)
def test_an_untrained_model_gives_every_token_about_the_same_chance(style, vocab_size):
    torch.manual_seed(1337)
    model = GPT(GPTConfig(vocab_size, style=style)).eval()
    ids = some_ids(4, 129, vocab_size=vocab_size)
    with torch.no_grad():
        loss = loss_of(model, ids[:, :-1], ids[:, 1:]).item()
    assert loss == pytest.approx(math.log(vocab_size), abs=0.1)


# The parts, by hand


@pytest.mark.parametrize("size", [2, 7, 80])
def test_sinusoids_are_the_paper_s(size):
    """PE(pos, 2i) = sin(pos / 10000^(2i/C)), PE(pos, 2i+1) = cos of the same."""
    table = sinusoids(50, size)
    for pos in range(50):
        for j in range(size):
            angle = pos / 10_000 ** ((j - j % 2) / size)
            value = math.cos(angle) if j % 2 else math.sin(angle)
            assert table[pos, j].item() == pytest.approx(value, abs=1e-4)


def input_of_blocks(model: GPT, ids: Tensor) -> Tensor:
    seen = []
    model.blocks[0].register_forward_pre_hook(lambda block, args: seen.append(args[0]))
    model(ids)
    return seen[0]


@pytest.mark.parametrize("choice", ["sinusoidal", "learned"])
def test_positions_are_added_to_the_embedding(choice):
    model, ids = tiny(position=choice), some_ids(1, 8)
    positions = sinusoids(8, 16) if choice == "sinusoidal" else model.position
    expected = model.embedding.weight[ids[0]] + positions
    torch.testing.assert_close(input_of_blocks(model, ids)[0], expected)


@torch.no_grad()
@pytest.mark.parametrize("smear", [True, False])
def test_the_rows_of_its_parts_are_added_to_a_token_s_embedding(smear):
    """Also to that of the token before, of which smear takes a share.

    The output layer has a table of its own, which adds to what it is tied to.
    """
    for style, cutoff in product(STYLES, (0.0, 0.4)):
        choices = {"smear": smear, "softmax_cutoff": cutoff}
        model = tiny(style, spelling_rows=5, output_spelling_rows=7, **choices)
        plain = tiny(style, **choices)
        weights = {n: w for n, w in model.state_dict().items() if "parts" not in n}
        plain.load_state_dict(weights)
        if model.config.tie_embeddings:  # apart, as their parts differ
            plain.head.weight = nn.Parameter(plain.head.weight.clone())
        for name, size in (("embedding", 5), ("head", 7)):
            table = model.state_dict()[f"{name}.parts.weight"]
            for token, rows in enumerate(RandomSpelling(11).spelling_rows(size)):
                for row in rows:
                    plain.state_dict()[f"{name}.weight"][token] += table[row]
        x, y = some_ids(3, 8), some_ids(3, 8)
        torch.testing.assert_close(model(x), plain(x))
        torch.testing.assert_close(next_token_loss(model, x, y), next_token_loss(plain, x, y))


@pytest.mark.parametrize("cutoff", [0.0, 0.4])
def test_the_gradients_of_spelling_are_those_of_the_logits(cutoff):
    """The loss adds up the rows of all tokens, and its gradient takes a way of its own."""
    model = tiny("fast", output_spelling_rows=7, softmax_cutoff=cutoff).double()
    x, y = some_ids(3, 8), some_ids(3, 8)
    weights = (model.head.parts.weight, model.head.weight)
    found = torch.autograd.grad(next_token_loss(model, x, y), weights)
    loss = nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten())
    torch.testing.assert_close(found, torch.autograd.grad(loss, weights))


@torch.no_grad()
@pytest.mark.parametrize("cutoff", [1, 4, 10])
def test_an_adaptive_output_layer_decides_in_two_steps(cutoff):
    """A rare token's probability is that of a rare one, times its own among these."""
    model = tiny("fast", softmax_cutoff=(cutoff + 0.5) / 11).double()
    hidden_states = model.hidden_states(some_ids(1, 8))[0]
    scores = hidden_states @ model.head.weight.T
    others = hidden_states @ model.head.others[0]
    for place, found in enumerate(model(some_ids(1, 8))[0].softmax(-1).tolist()):
        first = [math.exp(score) for score in [*scores[place, :cutoff], others[place]]]
        second = [math.exp(score) for score in scores[place, cutoff:]]
        expected = [share / sum(first) for share in first[:-1]]
        expected += [first[-1] / sum(first) * share / sum(second) for share in second]
        assert found == pytest.approx(expected)
        assert sum(found) == pytest.approx(1)


def test_a_model_that_knows_no_spelling_yet_fails():
    for name in ("spelling_rows", "output_spelling_rows"):
        model = GPT(GPTConfig(11, **{name: 5}, **TINY))
        with pytest.raises(RuntimeError, match="value -1"):
            model(some_ids(1, 8))


@torch.no_grad()
@pytest.mark.parametrize("smear", [True, False])
@pytest.mark.parametrize("rows", [0, 7, 8191])
@pytest.mark.parametrize("vocab_size", [11, 200_000])  # where 32 bits don't hold the hash
def test_the_token_before_adds_a_share_of_its_embedding_and_the_row_of_the_pair(
    smear, rows, vocab_size
):
    torch.manual_seed(0)
    config = GPTConfig(vocab_size, style="fast", smear=smear, bigram_rows=rows, **TINY)
    model = GPT(config).eval()
    ids = some_ids(3, 8, vocab_size=vocab_size)
    ids[0, 1] = vocab_size - 1
    weights = dict(model.named_parameters())
    share, table = weights.get("pairs.share"), weights.get("pairs.table.weight")
    assert (share is not None, table is not None) == (smear, rows > 0)
    for weight in (share, table):
        if weight is not None:
            nn.init.normal_(weight)
    found = input_of_blocks(model, ids)
    for b in range(3):
        for t in range(8):
            token = int(ids[b, t])
            before = int(ids[b, t - 1]) if t else token  # the first precedes itself
            expected = weights["embedding.weight"][token].clone()
            if smear:
                expected += share * weights["embedding.weight"][before]
            if rows:
                expected += table[((36_313 * token) ^ (27_191 * before)) % rows]
            torch.testing.assert_close(found[b, t], expected)


def test_few_pairs_share_a_row():
    """1,000 x 1,000 pairs fall on the rows as if by chance: 122 each, within six deviations."""
    sizes = {"d_model": 2, "num_blocks": 1, "num_heads": 1}
    config = GPTConfig(1000, 1, style="fast", bigram_rows=8191, **sizes)
    model, rows = GPT(config), []
    model.pairs.table.register_forward_pre_hook(lambda table, args: rows.append(args[0]))
    every = torch.arange(1000)
    first, ids = torch.cartesian_prod(every, every).split(1, dim=1)  # (1,000,000, 1) each
    model.pairs(ids, first, model.embedding)
    hits = torch.bincount(rows[0].flatten(), minlength=8191)
    assert hits.sum() == 1_000_000
    assert (hits - 1_000_000 / 8191).abs().max() < 6 * math.sqrt(1_000_000 / 8191)


def test_the_pairs_start_with_a_share_of_0_3_and_an_empty_table():
    torch.manual_seed(0)
    model = GPT(GPTConfig(11, style="fast", bigram_rows=50, **TINY)).eval()
    weights = dict(model.named_parameters())
    assert torch.equal(weights["pairs.share"], torch.full((16,), 0.3))
    assert torch.equal(weights["pairs.table.weight"], torch.zeros(50, 16))
    assert weights["embedding.weight"].std().item() == pytest.approx(0.1, abs=0.02)


@pytest.mark.parametrize("style", STYLES)
def test_the_other_styles_have_no_pairs(style):
    assert (tiny(style).pairs is not None) == (style == "fast")


def test_the_tables_of_the_fast_style_are_counted_with_the_embedding():
    C, V, rows = 80, 1000, 500
    block = 3 * C * C + C * C + 3 * 216 * C + 2 * C + 2 * 20  # QK norms over heads of 20
    tables = 2 * V * C + rows * C + C
    assert GPT(GPTConfig(V, style="fast", bigram_rows=rows)).num_parameters() == (
        tables,
        6 * block + C,
    )


@pytest.mark.parametrize("base", [10_000, 1e6])
def test_rotary_turns_each_pair_by_its_own_angle(base):
    """The pair (i, i + D/2), as a complex number, by position * base^(-2i/D)."""
    x = torch.randn(1, 1, 20, 6)
    rates = rotary_rates(GPTConfig(11, head_size=6, rotary_base=base))
    turned = rotate(x, rotary_table(20, rates))[0, 0]
    for pos in range(20):
        for i in range(3):
            angle = pos * base ** (-2 * i / 6)
            pair = complex(x[0, 0, pos, i], x[0, 0, pos, i + 3])
            pair *= complex(math.cos(angle), math.sin(angle))
            assert turned[pos, i].item() == pytest.approx(pair.real, abs=1e-5)
            assert turned[pos, i + 3].item() == pytest.approx(pair.imag, abs=1e-5)


def test_rotary_scores_depend_only_on_relative_position():
    q, k = torch.randn(8), torch.randn(8)
    table = rotary_table(100, rotary_rates(GPTConfig(11, head_size=8)))

    def score(q_place: int, k_place: int) -> float:
        turned_q = rotate(q.view(1, 1, 1, 8), table[:, q_place, None])
        turned_k = rotate(k.view(1, 1, 1, 8), table[:, k_place, None])
        return (turned_q * turned_k).sum().item()

    for distance in (0, 1, 7):
        expected = score(distance, 0)
        for place in (1, 10, 90):
            assert score(place + distance, place) == pytest.approx(expected, abs=1e-4)
    assert abs(score(7, 0) - score(0, 0)) > 0.01


def attention_by_hand(layer: Attention, x: Tensor) -> Tensor:
    """softmax(QK^T / sqrt(D)) V over the tokens up to each one, a head and a token at a time."""
    B, T, _ = x.shape
    H, K = layer.config.num_heads, layer.config.num_kv_heads
    D = layer.config.head_size
    W_q, W_k, W_v = layer.qkv.weight.split([H * D, K * D, K * D])
    b_q, b_k, b_v = layer.qkv.bias.split([H * D, K * D, K * D])
    y = torch.zeros(B, T, H * D)
    for b in range(B):
        for h in range(H):
            query_rows = slice(h * D, h * D + D)
            group = h // (H // K)  # H / K neighbouring query heads share one key/value head
            rows = slice(group * D, group * D + D)
            for t in range(T):
                q = W_q[query_rows] @ x[b, t] + b_q[query_rows]
                keys = [W_k[rows] @ x[b, s] + b_k[rows] for s in range(t + 1)]
                values = [W_v[rows] @ x[b, s] + b_v[rows] for s in range(t + 1)]
                weights = [math.exp(q @ key / math.sqrt(D)) for key in keys]
                for weight, value in zip(weights, values, strict=True):
                    y[b, t, query_rows] += weight / sum(weights) * value
    return y @ layer.out.weight.T + layer.out.bias


def test_partial_rotation_turns_the_first_channels_alone():
    """As if these were the whole head."""
    x = torch.randn(1, 1, 20, 16)
    config = GPTConfig(11, head_size=16, rotary_fraction=0.25, position="rotary")
    turned = rotate(x, rotary_table(20, rotary_rates(config)))
    whole = rotary_table(20, rotary_rates(GPTConfig(11, head_size=4)))
    assert torch.equal(turned[..., :4], rotate(x[..., :4], whole))
    assert torch.equal(turned[..., 4:], x[..., 4:])


SCALED = {"position": "rotary", "head_size": 32, "rotary_base": 500_000.0, "rope_factor": 8.0}


def test_linear_scaling_slows_all_rotation_alike():
    """By position interpolation: token 8 turns as far as token 1 did."""
    scaled = rotary_rates(GPTConfig(11, **SCALED, rope_scaling="linear"))
    plain = rotary_rates(GPTConfig(11, **SCALED))
    torch.testing.assert_close(8 * scaled, plain)


def test_llama3_scaling_slows_what_turns_slowly():
    """By wavelengths, as in Llama 3.1: below 8192 / 4 tokens kept, above 8192 / 1 divided."""
    config = GPTConfig(11, **SCALED, rope_scaling="llama3", rope_original_context=8192)
    seen = set()
    for i, found in enumerate(rotary_rates(config).tolist()):
        rate = 500_000 ** (-2 * i / 32)
        wavelength = 2 * math.pi / rate
        if wavelength < 2048:
            expected, kind = rate, "kept"
        elif wavelength > 8192:
            expected, kind = rate / 8, "divided"
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            expected, kind = (1 - smooth) * rate / 8 + smooth * rate, "between"
        seen.add(kind)
        assert found == pytest.approx(expected, rel=1e-5), i
    assert seen == {"kept", "divided", "between"}


@torch.no_grad()
@pytest.mark.parametrize("window", [1, 3, 8, 9])
@pytest.mark.parametrize("num_kv_heads", [2, 4])
def test_attention_in_a_window_is_that_to_the_tokens_in_it(window, num_kv_heads):
    """Token t attends as the last one of a text that begins at t - window + 1."""
    options = {"num_kv_heads": num_kv_heads, "sliding_window": window}
    model, x = tiny(**options), torch.randn(2, 8, 16)
    found = model.blocks[0].attention(x, None, None, model._window_mask(some_ids(2, 8)))
    plain = tiny(num_kv_heads=num_kv_heads).blocks[0].attention
    for t in range(8):
        seen = x[:, max(0, t - window + 1) : t + 1]
        expected = attention_by_hand(plain, seen)[:, -1]
        torch.testing.assert_close(found[:, t], expected, rtol=1e-4, atol=1e-5)


def test_a_window_that_is_not_shorter_than_the_text_is_none():
    ids = some_ids(2, 8)
    assert torch.equal(tiny(sliding_window=8)(ids), tiny()(ids))
    assert tiny(sliding_window=8)._window_mask(ids) is None


@torch.no_grad()
def test_parallel_layers_read_the_same_x():
    block, x = tiny(parallel_residual=True).blocks[0], torch.randn(2, 8, 16)
    expected = x + block.attention(block.attention_norm(x), None, None)
    expected = expected + block.feed_forward(block.feed_forward_norm(x))
    torch.testing.assert_close(block(x, None, None), expected)


@torch.no_grad()
@pytest.mark.parametrize(("num_kv_heads", "head_size"), [(1, 4), (2, 4), (4, 4), (2, 7)])
def test_attention_is_a_plain_loop(num_kv_heads, head_size):
    layer = tiny(num_kv_heads=num_kv_heads, head_size=head_size).blocks[0].attention
    x = torch.randn(2, 5, 16)
    expected = attention_by_hand(layer, x)
    torch.testing.assert_close(layer(x, None, None), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_qk_norm_scales_each_query_and_key_to_mean_square_1():
    """So weights of queries and keys that are 10 times larger attend alike."""
    plain, normed = (tiny(qk_norm=choice).blocks[0].attention for choice in (False, True))
    x = torch.randn(2, 5, 16)
    for layer, changes in ((plain, True), (normed, False)):
        before = layer(x, None, None)
        layer.qkv.weight[:32] *= 10  # queries and keys are rows 0..31, values the rest
        layer.qkv.bias[:32] *= 10
        assert ((layer(x, None, None) - before).abs().max() > 1e-3) == changes


@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "swiglu"])
def test_feed_forward_is_its_formula(activation):
    layer, x = tiny(activation=activation).blocks[0].feed_forward, torch.randn(3, 16)
    up = x @ layer.up.weight.T + layer.up.bias
    if activation == "relu":
        hidden = up * (up > 0)
    elif activation == "gelu":
        hidden = up * (1 + torch.erf(up / math.sqrt(2))) / 2
    elif activation == "gelu_tanh":  # Hendrycks and Gimpel 2016
        hidden = up * (1 + torch.tanh(math.sqrt(2 / math.pi) * (up + 0.044715 * up**3))) / 2
    else:
        gate, value = up[:, :48], up[:, 48:]
        hidden = gate / (1 + torch.exp(-gate)) * value
    expected = hidden @ layer.out.weight.T + layer.out.bias
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("activation", "d_model", "hidden"),
    [("relu", 80, 320), ("gelu", 80, 320), ("swiglu", 80, 216), ("swiglu", 96, 256)],
)
def test_feed_forward_width(activation, d_model, hidden):
    config = GPTConfig(11, d_model=d_model, activation=activation)
    assert FeedForward(config).out.in_features == config.hidden_size == hidden


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_a_width_that_is_given_is_the_feed_forward_s(activation):
    layer = FeedForward(GPTConfig(11, d_model=80, activation=activation, hidden_size=123))
    assert layer.out.weight.shape == (80, 123)
    assert layer.up.weight.shape == (123 * (2 if activation == "swiglu" else 1), 80)


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_norm_is_its_formula(norm):
    x = torch.randn(3, 16) * 5 + 2
    centred = x - x.mean(-1, keepdim=True) if norm == "layer" else x
    expected = centred / centred.square().mean(-1, keepdim=True).sqrt()
    layer = make_norm(GPTConfig(11, norm=norm), 16)
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("norm", "least"), [("layer", 1e-5), ("rms", 1e-6)])
@pytest.mark.parametrize("given", [None, 0.5])
def test_epsilon_is_added_to_the_mean_square(norm, least, given):
    config = GPTConfig(11, norm=norm, qk_norm=True, norm_eps=given)
    assert config.norm_eps == (given or least)
    x = torch.tensor([[1.0, -1.0] * 8]) / 100  # mean 0, mean square 1e-4
    expected = x / math.sqrt(1e-4 + config.norm_eps)
    torch.testing.assert_close(make_norm(config, 16)(x), expected, rtol=1e-4, atol=0)
    # Of a head's it is RMSNorm's, as in Qwen3; beside LayerNorm, that of earlier releases.
    of_head = GPT(config).blocks[0].attention.q_norm.eps
    assert of_head == (config.norm_eps if norm == "rms" else 1e-6)


@pytest.mark.parametrize("bias", [True, False])
def test_parts_have_biases_as_all_have_unless_they_say_otherwise(bias):
    config = GPTConfig(11, bias=bias)
    assert (config.qkv_bias, config.mlp_bias) == (bias, bias)
    block = GPT(GPTConfig(11, bias=bias, qkv_bias=not bias, mlp_bias=not bias)).blocks[0]
    layers = (block.attention.qkv, block.feed_forward.up, block.feed_forward.out)
    assert [layer.bias is not None for layer in layers] == [not bias] * 3
    others = (block.attention.out, block.attention_norm)
    assert [layer.bias is not None for layer in others] == [bias] * 2


# Training


def test_dropout_takes_its_share_of_the_embedding_and_of_each_layer_in_training_only():
    model, shares = tiny(dropout=0.25), []
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.register_forward_hook(lambda m, x, y: shares.append((y == 0).float().mean()))
    ids = some_ids(64, 8)
    model.train()(ids)
    assert torch.stack(shares).tolist() == pytest.approx([0.25] * 5, abs=0.03)
    shares.clear()
    model.eval()(ids)
    assert torch.stack(shares).tolist() == [0.0] * 5


@pytest.mark.parametrize("style", STYLES)
def test_dropout_changes_logits_in_training_and_never_in_evaluation(style):
    model, ids = tiny(style, dropout=0.25), some_ids(2, 8)
    assert torch.equal(model.eval()(ids), model.eval()(ids))
    assert not torch.allclose(model.train()(ids), model.train()(ids), atol=0.1)


@pytest.mark.parametrize("style", STYLES)
def test_one_batch_is_memorized(style):
    torch.manual_seed(0)
    sizes = {"context_length": 16, "d_model": 32, "num_blocks": 2, "dropout": 0.0}
    model = GPT(GPTConfig(50, style=style, **sizes))
    w = some_ids(4, 17, vocab_size=50)
    x, y = w[:, :-1], w[:, 1:]
    x[:, 0] = torch.arange(4)  # the first token tells which text it is
    optimizer = build_optimizer(model, 1e-2, weight_decay=0.0, betas=(0.9, 0.999))
    for _ in range(100):
        loss = loss_of(model, x, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss_of(model, x, y).item() < 0.01


def reference_model(**sizes) -> nn.Module:
    path = Path(__file__).parents[2] / "benchmarks" / "reference_loop.py"
    spec = importlib.util.spec_from_file_location("reference_loop", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.ReferenceGPT(**sizes, output_bias=False, dropout=0.0)


def weights_of_reference(reference: nn.Module) -> dict[str, Tensor]:
    """The classic loop's weights under our names; each head's three layers become one."""
    weights = {
        "embedding.weight": reference.embedding.weight,
        "norm.weight": reference.norm.weight,
        "norm.bias": reference.norm.bias,
        "head.weight": reference.output.weight,
    }
    for i, block in enumerate(reference.blocks):
        parts = {
            "attention_norm": block.norm_1,
            "attention.out": block.projection,
            "feed_forward_norm": block.norm_2,
            "feed_forward.up": block.feed_forward[0],
            "feed_forward.out": block.feed_forward[2],
        }
        for kind in ("weight", "bias"):
            layers = [getattr(h, part) for part in ("query", "key", "value") for h in block.heads]
            qkv = torch.cat([getattr(layer, kind) for layer in layers])
            weights[f"blocks.{i}.attention.qkv.{kind}"] = qkv
            for name, layer in parts.items():
                weights[f"blocks.{i}.{name}.{kind}"] = getattr(layer, kind)
    return weights


def test_classic_style_learns_exactly_as_the_classic_loop():
    """Same weights, same batches, plain AdamW: the same loss at each of 20 steps."""
    torch.manual_seed(1337)
    sizes = {"vocab_size": 500, "context_length": 32}
    reference = reference_model(**sizes)
    model = GPT(GPTConfig(**sizes, style="classic", dropout=0.0))
    model.load_state_dict(weights_of_reference(reference))
    windows = torch.randint(500, (20, 2, 33))
    losses = {}
    for name, trained, fused in (("loop", reference, False), ("ours", model, True)):
        optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-3, fused=fused)
        losses[name] = []
        for w in windows:
            loss = loss_of(trained, w[:, :-1], w[:, 1:])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[name].append(loss.item())
    assert losses["ours"] == pytest.approx(losses["loop"], abs=1e-5, rel=0)
    assert losses["ours"][0] == pytest.approx(6.4, abs=0.3)  # ln(500) = 6.2


# Values that don't fit


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"d_model": 82},
            "d_model 82: must be divisible by num_heads (4); use 84, for example",
        ),
        (
            {"d_model": 3, "num_heads": 8},
            "d_model 3: must be divisible by num_heads (8); use 8, for example",
        ),
        ({"dropout": 1.0}, "dropout 1.0: must be in [0, 1)"),
        ({"dropout": -0.1}, "dropout -0.1: must be in [0, 1)"),
        ({"dropout": math.nan}, "dropout nan: must be in [0, 1)"),
        ({"vocab_size": 0}, "vocab_size 0: must be at least 1"),
        ({"context_length": 0}, "context_length 0: must be at least 1"),
        ({"context_length": -8}, "context_length -8: must be at least 1"),
        ({"d_model": 0}, "d_model 0: must be at least 1"),
        ({"d_model": -80}, "d_model -80: must be at least 1"),
        ({"num_blocks": 0}, "num_blocks 0: must be at least 1"),
        ({"num_heads": 0}, "num_heads 0: must be at least 1"),
        ({"num_kv_heads": 0}, "num_kv_heads 0: must be at least 1"),
        ({"head_size": 0}, "head_size 0: must be at least 1"),
        ({"hidden_size": -4}, "hidden_size -4: must be at least 1"),
        ({"bigram_rows": -1}, "bigram_rows -1: must be at least 0"),
        ({"spelling_rows": -1}, "spelling_rows -1: must be at least 0"),
        ({"output_spelling_rows": -1}, "output_spelling_rows -1: must be at least 0"),
        ({"softmax_cutoff": -0.1}, "softmax_cutoff -0.1: must be in [0, 1)"),
        ({"softmax_cutoff": 1}, "softmax_cutoff 1: must be in [0, 1)"),
        ({"smear": 2}, "smear 2: must be one of False, True"),
        ({"style": "fastest"}, "style 'fastest': must be one of classic, modern, fast"),
        ({"rotary_base": 1}, "rotary_base 1: must be above 1"),
        ({"rotary_base": math.inf}, "rotary_base inf: must be above 1"),
        ({"rotary_base": math.nan}, "rotary_base nan: must be above 1"),
        ({"norm_eps": 0}, "norm_eps 0: must be in (0, 1)"),
        ({"norm_eps": math.nan}, "norm_eps nan: must be in (0, 1)"),
        ({"rotary_fraction": 0}, "rotary_fraction 0: must be in (0, 1]"),
        ({"rotary_fraction": 1.5}, "rotary_fraction 1.5: must be in (0, 1]"),
        (
            {"rotary_fraction": 0.25, "position": "rotary"},
            "rotary_fraction 0.25: rotates 5 of 20 channels, not an even number",
        ),
        (
            {"rotary_fraction": 0.01, "position": "rotary"},
            "rotary_fraction 0.01: rotates 0 of 20 channels, not an even number",
        ),
        ({"sliding_window": 2.5}, "sliding_window 2.5: must be a whole number"),
        ({"sliding_window": 0}, "sliding_window 0: must be at least 1"),
        ({"rope_factor": 0.5}, "rope_factor 0.5: must be at least 1"),
        ({"rope_scaling": "yarn"}, "rope_scaling 'yarn': must be one of None, linear, llama3"),
        (
            {"rope_scaling": "llama3"},
            "rope_scaling 'llama3': needs the context length before it; give rope_original_context",
        ),
        ({"rope_original_context": 0}, "rope_original_context 0: must be at least 1"),
        (
            {"rope_low_freq_factor": 4.0},
            "rope_high_freq_factor 4.0: must be above rope_low_freq_factor (4.0), and that above 0",
        ),
        ({"num_kv_heads": 3}, "num_kv_heads 3: must divide num_heads (4)"),
        ({"num_kv_heads": 8}, "num_kv_heads 8: must divide num_heads (4)"),
        (
            {"d_model": 20, "position": "rotary"},
            "head_size 5: must be even for rotary positions; change it, or d_model (20) / "
            "num_heads (4)",
        ),
    ],
)
def test_values_that_do_not_fit_are_a_user_error(changes, message):
    with pytest.raises(UserError) as error:
        GPTConfig(**{"vocab_size": 11, **changes})
    assert str(error.value) == message


@pytest.mark.parametrize(
    "changes",
    [
        {"dropout": 0.0},
        {"dropout": 0.99},
        {"d_model": 20, "num_heads": 4},  # an odd head size, where nothing rotates
        {"d_model": 20, "num_heads": 3, "head_size": 8, "position": "rotary"},
        {"num_heads": 1, "d_model": 1, "num_blocks": 1, "context_length": 1, "vocab_size": 1},
    ],
)
def test_values_at_the_edge_fit(changes):
    config = GPTConfig(**{"vocab_size": 11, **changes})
    ids = torch.zeros(1, config.context_length, dtype=torch.int64)
    assert GPT(config)(ids).shape == (1, config.context_length, config.vocab_size)
