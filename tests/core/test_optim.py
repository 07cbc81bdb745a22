"""The optimizer's parameter groups and the learning-rate schedule, by numbers."""

import copy
import math

import pytest
import torch

from lit_gpt.errors import UserError
from lit_gpt.model import GPT, GPTConfig
from lit_gpt.module import LitGPT
from lit_gpt.optim import build_optimizer, learning_rate_factor


def small_model(style: str = "classic", **choices) -> GPT:
    config = GPTConfig(11, 8, d_model=16, num_blocks=1, num_heads=4, style=style, **choices)
    return GPT(config)


def names_of(model: GPT, group: dict) -> set[str]:
    names = {id(weight): name for name, weight in model.named_parameters()}
    return {names[id(weight)] for weight in group["params"]}


# 4 steps of warm-up, the last step is 12, a tenth of the peak remains.
@pytest.mark.parametrize(
    ("step", "constant", "linear", "cosine"),
    [
        (0, 0.25, 0.25, 0.25),
        (1, 0.5, 0.5, 0.5),
        (2, 0.75, 0.75, 0.75),
        (3, 1.0, 1.0, 1.0),
        (4, 1.0, 1.0, 1.0),
        (5, 1.0, 0.8875, 0.965746),
        (6, 1.0, 0.775, 0.868198),
        (8, 1.0, 0.55, 0.55),
        (10, 1.0, 0.325, 0.231802),
        (11, 1.0, 0.2125, 0.134254),
        (12, 1.0, 0.1, 0.1),
        (20, 1.0, 0.1, 0.1),
    ],
)
def test_learning_rate_table(step, constant, linear, cosine):
    expected = {"constant": constant, "linear": linear, "cosine": cosine}
    for schedule, factor in expected.items():
        assert learning_rate_factor(step, 12, 4, schedule, 0.1) == pytest.approx(factor, abs=1e-6)


@pytest.mark.parametrize(
    ("schedule", "factors"),
    [
        ("constant", [1, 1, 1, 1, 1]),
        ("linear", [1, 0.75, 0.5, 0.25, 0]),
        ("cosine", [1, 0.853553, 0.5, 0.146447, 0]),
    ],
)
def test_without_warm_up_and_minimum_it_starts_at_the_peak_and_falls_to_nothing(schedule, factors):
    found = [learning_rate_factor(step, 4, 0, schedule, 0.0) for step in range(5)]
    assert found == pytest.approx(factors, abs=1e-6)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize(("step", "factor"), [(0, 0.5), (1, 1.0), (2, 1.0), (1_000_000, 1.0)])
def test_without_an_end_it_stays_at_the_peak(schedule, step, factor):
    assert learning_rate_factor(step, -1, 2, schedule, 0.1) == factor


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("max_steps", [3, 4])
def test_a_warm_up_as_long_as_the_run_or_longer_only_rises(schedule, max_steps):
    found = [learning_rate_factor(step, max_steps, 4, schedule, 0.1) for step in range(max_steps)]
    assert found == [0.25, 0.5, 0.75, 1.0][:max_steps]


def test_matrices_decay_and_biases_and_norms_do_not():
    model = small_model()
    decayed, others = build_optimizer(model, 1e-3, 0.1, (0.9, 0.95)).param_groups
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    assert names_of(model, decayed) == {
        "embedding.weight",
        "blocks.0.attention.qkv.weight",
        "blocks.0.attention.out.weight",
        "blocks.0.feed_forward.up.weight",
        "blocks.0.feed_forward.out.weight",
        "head.weight",
    }
    assert names_of(model, others) == {
        "blocks.0.attention_norm.weight",
        "blocks.0.attention_norm.bias",
        "blocks.0.attention.qkv.bias",
        "blocks.0.attention.out.bias",
        "blocks.0.feed_forward_norm.weight",
        "blocks.0.feed_forward_norm.bias",
        "blocks.0.feed_forward.up.bias",
        "blocks.0.feed_forward.out.bias",
        "norm.weight",
        "norm.bias",
    }


@pytest.mark.parametrize("style", ["classic", "modern", "fast"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("position", ["learned", "rotary"])
@pytest.mark.parametrize("rates", [{}, {"table_rate": 2.0}, {"table_eps": 1e-3}], ids=str)
@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_every_parameter_is_in_exactly_one_group(style, tied, position, rates, kind):
    model = small_model(style, tie_embeddings=tied, position=position)
    groups = build_optimizer(model, 1e-3, 0.1, (0.9, 0.95), kind=kind, **rates).param_groups
    listed = [id(weight) for group in groups for weight in group["params"]]
    assert sorted(listed) == sorted(id(weight) for weight in model.parameters())


def test_frozen_parameters_are_left_out():
    model = small_model()
    model.embedding.requires_grad_(False)
    groups = build_optimizer(model, 1e-3, 0.1, (0.9, 0.95)).param_groups
    listed = set().union(*(names_of(model, group) for group in groups))
    assert {name for name, _ in model.named_parameters()} - listed == {"embedding.weight"}


@pytest.mark.parametrize("fused", [True, False])
def test_options_reach_every_group(fused):
    optimizer = build_optimizer(small_model(), 3e-4, 0.1, (0.8, 0.95), fused=fused)
    for group in optimizer.param_groups:
        assert (group["lr"], group["betas"], group["fused"]) == (3e-4, (0.8, 0.95), fused)


def test_the_fused_kernel_is_the_default():
    assert build_optimizer(small_model(), 1e-3, 0.1, (0.9, 0.95)).defaults["fused"] is True


def test_a_step_without_gradient_shrinks_matrices_by_rate_times_decay():
    model = small_model()
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    optimizer = build_optimizer(model, learning_rate=0.1, weight_decay=0.5, betas=(0.9, 0.999))
    for weight in model.parameters():
        weight.grad = torch.zeros_like(weight)
    optimizer.step()
    for name, weight in model.named_parameters():
        expected = before[name] * (1 - 0.1 * 0.5 if weight.ndim > 1 else 1)
        torch.testing.assert_close(weight.detach(), expected, rtol=1e-6, atol=0)


def test_muon_takes_the_blocks_matrices_and_adamw_the_rest():
    model = small_model("modern")
    optimizer = build_optimizer(model, 1e-3, 0.1, (0.9, 0.95), kind="muon")
    matrices, tables, others = (names_of(model, group) for group in optimizer.param_groups)
    assert matrices == {
        f"blocks.0.{name}.weight"
        for name in ("attention.qkv", "attention.out", "feed_forward.up", "feed_forward.out")
    }
    assert tables == {"embedding.weight"}
    assert all("norm" in name for name in others)
    assert len(matrices | tables | others) == len(list(model.parameters()))
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.1, 0.0]


def test_muon_steps_as_torchs_muon_and_adamw_do():
    """One step of each, from the same gradients, equals a step of torch's own two optimizers."""
    model, twin = small_model("modern"), small_model("modern")
    twin.load_state_dict(model.state_dict())
    for weight, same in zip(model.parameters(), twin.parameters(), strict=True):
        weight.grad = torch.randn_like(weight)
        same.grad = weight.grad.clone()
    optimizer = build_optimizer(
        model, 1e-2, 0.1, (0.9, 0.95), kind="muon", muon_dtype=torch.bfloat16
    )
    optimizer.step()
    matrices = [p for p in twin.blocks.parameters() if p.ndim == 2]
    others = [p for p in twin.parameters() if p.ndim == 1]
    torch.optim.Muon(matrices, 1e-2, 0.1, momentum=0.9, adjust_lr_fn="match_rms_adamw").step()
    torch.optim.AdamW([twin.embedding.weight], 1e-2, (0.9, 0.95), weight_decay=0.1).step()
    torch.optim.AdamW(others, 1e-2, (0.9, 0.95), weight_decay=0.0).step()
    for weight, same in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(weight, same)


def test_muons_state_is_saved_and_loaded_exactly():
    torch.manual_seed(0)
    model = small_model("modern")
    optimizer = build_optimizer(model, 1e-2, 0.1, (0.9, 0.95), kind="muon")

    def step(model, optimizer, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for weight in model.parameters():
            weight.grad = torch.randn(weight.shape, generator=generator)
        optimizer.step()

    step(model, optimizer, 1)
    twin = small_model("modern")
    twin.load_state_dict(model.state_dict())
    loaded = build_optimizer(twin, 1e-2, 0.1, (0.9, 0.95), kind="muon")
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    step(model, optimizer, 2)
    step(twin, loaded, 2)
    for weight, same in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(weight, same)


TABLES = {"embedding.weight", "pairs.table.weight", "head.weight"}


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("rates", [{"table_rate": 3.0}, {"table_eps": 1e-3}], ids=str)
def test_tables_have_a_rate_and_an_epsilon_of_their_own(kind, rates):
    model = small_model("fast", bigram_rows=50)
    build = {"learning_rate": 1e-2, "weight_decay": 0.1, "betas": (0.9, 0.95), "kind": kind}
    *first, tables, others = build_optimizer(model, **build, **rates).param_groups
    assert names_of(model, tables) == TABLES
    found = (tables["lr"], tables["eps"], tables["weight_decay"])
    expected = (1e-2 * rates.get("table_rate", 1), rates.get("table_eps", 1e-8), 0.1)
    assert found == pytest.approx(expected)
    inner = [group for group in first if group["params"]]
    matrices = ("attention.qkv", "attention.out", "feed_forward.up", "feed_forward.out")
    assert [names_of(model, g) for g in inner] == [{f"blocks.0.{m}.weight" for m in matrices}]
    assert (inner[0]["lr"], inner[0]["weight_decay"]) == (1e-2, 0.1)
    assert (others["lr"], others["eps"], others["weight_decay"]) == (1e-2, 1e-8, 0.0)
    assert "pairs.share" in names_of(model, others)


@pytest.mark.parametrize("style", ["classic", "modern", "fast"])
@pytest.mark.parametrize(("kind", "number"), [("adamw", 2), ("muon", 3)])
def test_without_a_rate_of_their_own_tables_are_where_they_were(style, kind, number):
    """So that the optimizer states of earlier checkpoints fit."""
    model = small_model(style)
    groups = build_optimizer(model, 1e-3, 0.1, (0.9, 0.95), kind=kind).param_groups
    assert len(groups) == number
    assert {group["eps"] for group in groups[-2:]} == {1e-8}
    assert {group["lr"] for group in groups} == {1e-3}
    decayed = names_of(model, groups[-2])
    assert decayed >= {"embedding.weight"}
    assert ("blocks.0.attention.qkv.weight" in decayed) == (kind == "adamw")


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("fused", [True, False])
def test_the_first_update_of_a_table_is_adamws_with_its_rate_and_epsilon(kind, fused):
    """Bias-corrected, the moments after one step are g and g^2: p(1 - rD) - r g / (|g| + eps)."""
    torch.manual_seed(0)
    model = small_model("fast", bigram_rows=50)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = build_optimizer(
        model, 1e-2, 0.1, (0.9, 0.95), fused, kind, torch.float32, table_rate=3, table_eps=1e-3
    )
    for weight in model.parameters():
        weight.grad = torch.full_like(weight, 1e-3)
        weight.grad[0] = 1e-5  # a token that is hardly ever seen
    optimizer.step()
    for name, weight in model.named_parameters():
        if name in TABLES:
            rate, eps, decay = 3e-2, 1e-3, 0.1
        elif weight.ndim == 1 or kind == "adamw":
            rate, eps, decay = 1e-2, 1e-8, 0.1 * (weight.ndim > 1)
        else:
            continue  # Muon's
        moved = weight.detach() - before[name] * (1 - rate * decay)
        expected = -rate * weight.grad / (weight.grad + eps)
        torch.testing.assert_close(moved, expected, rtol=1e-3, atol=1e-6, msg=name)
        if name in TABLES:  # half the rate, and a hundredth of it for the rare token
            assert moved[1, 0].item() == pytest.approx(-1.5e-2, rel=1e-3)
            assert moved[0, 0].item() == pytest.approx(-3e-2 / 101, rel=1e-2)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_rate_of_their_own_does_not_pass_to_others_where_tables_are_frozen(kind):
    model = small_model("fast", bigram_rows=50)
    for name, weight in model.named_parameters():
        weight.requires_grad_(name not in TABLES)
    optimizer = build_optimizer(model, 1e-3, 0.1, (0.9, 0.95), kind=kind, table_rate=3)
    assert {group["lr"] for group in optimizer.param_groups if group["params"]} == {1e-3}
    for weight in model.parameters():
        weight.grad = torch.zeros_like(weight)
    optimizer.step()


@pytest.mark.parametrize("name", ["table_rate", "table_eps"])
@pytest.mark.parametrize("value", [0, -1.0, math.inf, math.nan])
def test_a_rate_or_epsilon_that_is_not_above_0_is_refused(name, value):
    with pytest.raises(UserError) as error:
        LitGPT(vocab_size=11, context_length=8, **{name: value})
    assert str(error.value) == f"{name} {value}: must be above 0"


@pytest.mark.parametrize(
    ("option", "choices"), [("optimizer", "adamw, muon"), ("schedule", "constant, linear, cosine")]
)
def test_an_unknown_kind_is_refused_from_python_too(option, choices):
    with pytest.raises(UserError) as error:
        LitGPT(vocab_size=11, context_length=8, **{option: "sgd"})
    assert str(error.value) == f"{option} 'sgd': must be one of {choices}"
