"""Our GPT and transformers' GPT-2 and Qwen3: configs and weights, both ways."""

import json
from dataclasses import asdict

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, Qwen3Config

from lit_gpt.errors import UserError
from lit_gpt.huggingface.architectures import LAYOUTS, gpt_weights, hf_weights, layout_of
from lit_gpt.huggingface.config import gpt_config, hf_config
from lit_gpt.huggingface.importing import read_model_config
from lit_gpt.model import GPT, GPTConfig

SIZES = {"vocab_size": 50, "context_length": 16, "d_model": 24, "num_blocks": 2, "num_heads": 4}
FIT = {
    "gpt2": [
        {},
        {"tie_embeddings": True},
        {"bias": False},
        {"position": "learned", "activation": "gelu"},
        {"activation": "gelu_tanh", "hidden_size": 40},
        {"style": "modern", "position": "learned", "norm": "layer", "activation": "gelu"}
        | {"qk_norm": False},
    ],
    "qwen3": [
        {"style": "modern"},
        {"style": "modern", "tie_embeddings": False, "num_kv_heads": 2},
        {"style": "modern", "num_kv_heads": 1, "head_size": 10, "hidden_size": 40},
        {"style": "modern", "rotary_base": 50_000.0},
        {"position": "rotary", "norm": "rms", "activation": "swiglu", "bias": False}
        | {"qk_norm": True},
    ],
}
CASES = [(kind, choices) for kind, cases in FIT.items() for choices in cases]
IDS = torch.randint(50, (2, 16), generator=torch.Generator().manual_seed(1))


def random_model(**choices) -> GPT:
    """In eval mode, all weights random: norms and biases too."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SIZES | choices)).eval()
    for weight in model.parameters():
        nn.init.normal_(weight, std=0.3)
    return model


def theirs_of(model: GPT, folder) -> nn.Module:
    """The model that transformers makes of our config.json and weights."""
    (folder / "config.json").write_text(json.dumps(hf_config(model.config)))
    theirs = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).eval()
    missing, unexpected = theirs.load_state_dict(hf_weights(model), strict=False)
    assert missing == (["lm_head.weight"] if model.config.tie_embeddings else [])
    assert unexpected == []
    return theirs


@torch.inference_mode()
def difference(ours: GPT, theirs: nn.Module) -> float:
    return (ours(IDS) - theirs(IDS).logits).abs().max().item()


@pytest.mark.parametrize(("kind", "choices"), CASES)
def test_transformers_computes_our_logits(kind, choices, tmp_path):
    model = random_model(**choices)
    theirs = theirs_of(model, tmp_path)
    assert theirs.config.model_type == kind
    assert model(IDS).abs().max() > 0.5
    assert difference(model, theirs) < 1e-5


@pytest.mark.parametrize(("kind", "choices"), CASES)
def test_exported_weights_can_be_imported(kind, choices):
    model = random_model(**choices)
    theirs = AutoConfig.for_model(**hf_config(model.config)).to_dict()
    config = GPTConfig(**gpt_config(theirs))
    again = GPT(config).eval()
    again.load_state_dict(gpt_weights(hf_weights(model), config))
    assert torch.equal(again(IDS), model(IDS))
    kept = ("num_kv_heads", "head_size", "hidden_size", "activation", "tie_embeddings", "qk_norm")
    for name in (*SIZES, *kept):
        assert getattr(config, name) == getattr(model.config, name), name


@pytest.mark.parametrize("name", ["attention.qkv", "feed_forward.up", "attention_norm"])
@pytest.mark.parametrize("style", ["classic", "modern"])
def test_a_changed_weight_changes_the_logits(name, style, tmp_path):
    model = random_model(style=style)
    theirs = theirs_of(model, tmp_path)
    model.get_submodule(f"blocks.1.{name}").weight.data[0] += 0.1
    assert difference(model, theirs) > 1e-4


MODELS = {
    "gpt2": GPT2Config(
        vocab_size=50, n_positions=16, n_embd=24, n_layer=2, n_head=4, bos_token_id=1
    ),
    "gpt2 of its own": GPT2Config(
        **{"vocab_size": 50, "n_positions": 16, "n_embd": 24, "n_layer": 2, "n_head": 4},
        **{"n_inner": 30, "activation_function": "gelu_pytorch_tanh"},
        tie_word_embeddings=False,
    ),
    "qwen3": Qwen3Config(
        **{"vocab_size": 50, "max_position_embeddings": 16, "hidden_size": 24, "head_dim": 10},
        **{"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2},
        **{"intermediate_size": 30, "tie_word_embeddings": True},
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    ),
    "qwen3 untied": Qwen3Config(
        **{"vocab_size": 50, "max_position_embeddings": 16, "hidden_size": 24, "head_dim": 6},
        **{"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4},
        **{"intermediate_size": 64, "use_sliding_window": True, "max_window_layers": 2},
    ),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("bare", [False, True])
def test_an_imported_model_computes_the_same(name, bare):
    torch.manual_seed(0)
    theirs = AutoModelForCausalLM.from_config(MODELS[name]).eval()
    for weight in theirs.parameters():
        nn.init.normal_(weight, std=0.3)
    config = GPTConfig(**gpt_config(theirs.config.to_dict()))
    weights = theirs.state_dict()
    if bare:  # as GPT-2 was published: names without prefix, masks among the weights
        prefix = layout_of(config).prefix
        weights = {name.removeprefix(prefix): weight for name, weight in weights.items()}
        weights["h.0.attn.bias"] = torch.ones(1, 1, 16, 16)
    ours = GPT(config).eval()
    ours.load_state_dict(gpt_weights(weights, config))
    assert difference(ours, theirs) < 1e-5


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"norm": "rms"}, "GPT-2 needs norm layer instead of rms; Qwen3 needs position rotary"),
        ({"position": "rotary"}, "GPT-2 needs position sinusoidal or learned instead of rotary"),
        ({"activation": "swiglu"}, "activation relu or gelu or gelu_tanh instead of swiglu"),
        ({"qk_norm": True}, "GPT-2 needs qk_norm False instead of True"),
        ({"num_kv_heads": 2}, "GPT-2 needs num_kv_heads 4 instead of 2"),
        ({"head_size": 8}, "GPT-2 needs head_size 6.0 instead of 8"),
        ({"style": "modern", "bias": True}, "Qwen3 needs bias False instead of True"),
        ({"style": "modern", "qk_norm": False}, "Qwen3 needs qk_norm True instead of False"),
        ({"style": "modern", "position": "learned"}, "Qwen3 needs position rotary instead of"),
        ({"style": "modern", "norm": "layer"}, "Qwen3 needs norm rms instead of layer"),
        ({"style": "modern", "activation": "gelu"}, "Qwen3 needs activation swiglu instead of"),
    ],
)
def test_a_model_that_fits_neither_is_refused(choices, message):
    config = GPTConfig(**SIZES | choices)
    with pytest.raises(UserError, match="neither a GPT-2 nor a Qwen3") as error:
        layout_of(config)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("choices", "shown"),
    [
        ({"style": "fast"}, "smear True, bigram_rows 0"),
        ({"style": "fast", "bigram_rows": 8}, "smear True, bigram_rows 8"),
        ({"bigram_rows": 5}, "smear False, bigram_rows 5"),
    ],
)
def test_what_the_token_before_adds_has_no_place_in_either(choices, shown):
    with pytest.raises(UserError) as error:
        layout_of(GPTConfig(**SIZES | choices))
    assert str(error.value) == (
        "neither GPT-2 nor Qwen3 adds to a token's embedding what the one before it says "
        f"({shown}); train a model that is to be exported with style=modern"
    )


@pytest.mark.parametrize("kind", LAYOUTS)
def test_a_folder_of_transformers_has_no_pairs(kind):
    """So that a run can't ask for them and take its weights from there."""
    ours = gpt_config({"gpt2": GPT2_JSON, "qwen3": QWEN3_JSON}[kind])
    assert (ours["smear"], ours["bigram_rows"]) == (False, 0)


GPT2_JSON = json.loads(MODELS["gpt2"].to_json_string())
QWEN3_JSON = json.loads(MODELS["qwen3"].to_json_string())


@pytest.mark.parametrize("kind", LAYOUTS)
def test_required_values_are_the_defaults_of_transformers(kind):
    default = {"gpt2": GPT2Config, "qwen3": Qwen3Config}[kind]()
    for name, value in LAYOUTS[kind].required.items():
        assert getattr(default, name, value) == value, name


def fields_of(folder, config: dict) -> dict:
    """The GPTConfig of a folder with that config.json."""
    (folder / "config.json").write_text(json.dumps(config))
    return asdict(read_model_config(folder)[1])


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        ({}, {}, "model_type None is not supported, only gpt2 and qwen3"),
        (GPT2_JSON, {"model_type": "llama"}, "model_type 'llama' is not supported, only gpt2 and"),
        (GPT2_JSON, {"model_type": ["gpt2"]}, "model_type ['gpt2'] is not supported"),
        (GPT2_JSON, {"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon 1e-06 is not supported"),
        (GPT2_JSON, {"scale_attn_weights": False}, "scale_attn_weights False is not supported"),
        (GPT2_JSON, {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        (GPT2_JSON, {"add_cross_attention": True}, "add_cross_attention"),
        (GPT2_JSON, {"pruned_heads": {"0": [1]}}, "pruned_heads"),
        (GPT2_JSON, {"quantization_config": {"bits": 4}}, "quantization_config"),
        (GPT2_JSON, {"activation_function": "silu"}, "activation_function 'silu'"),
        (GPT2_JSON, {"n_embd": "768"}, "n_embd"),  # by transformers, like the next ones
        (GPT2_JSON, {"n_layer": True}, "n_layer"),
        (GPT2_JSON, {"n_head": None}, "n_head"),
        (GPT2_JSON, {"n_head": 0}, "n_head must be a whole number above 0, not 0"),
        (GPT2_JSON, {"n_inner": 0}, "n_inner must be a whole number above 0, not 0"),
        (GPT2_JSON, {"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        (QWEN3_JSON, {"rms_norm_eps": 1e-5}, "rms_norm_eps 1e-05"),
        (QWEN3_JSON, {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        (QWEN3_JSON, {"attention_bias": True}, "attention_bias True"),
        (QWEN3_JSON, {"head_dim": None}, "head_dim"),
        (QWEN3_JSON, {"num_key_value_heads": 1.5}, "num_key_value_heads"),
        (QWEN3_JSON, {"rope_scaling": {"type": "linear", "factor": 2}}, "rope_type 'linear' is"),
        (
            QWEN3_JSON,
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 2}},
            "rope_type 'yarn' is not supported, only default",
        ),
        (QWEN3_JSON, {"rope_parameters": "yarn"}, "rope_parameters"),
        (QWEN3_JSON, {"rope_parameters": {"rope_theta": 0}}, "rotary_base 0.0: must be above 1"),
        (QWEN3_JSON, {"rope_parameters": {"rope_theta": "x"}}, "'x'"),
        (QWEN3_JSON, {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        (QWEN3_JSON, {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        (QWEN3_JSON, {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        (
            QWEN3_JSON,
            {
                "layer_types": None,
                "use_sliding_window": True,
                "sliding_window": 8,
                "max_window_layers": 1,
            },
            "layer_types ['full_attention', 'sliding_attention'] is not supported",
        ),
    ],
)
def test_unsupported_fields_are_refused_by_name(config, change, message, tmp_path):
    with pytest.raises(UserError, match=r"config\.json(:| can't be read)") as error:
        fields_of(tmp_path, config | change)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_fields_have_the_defaults_of_older_files(tmp_path):
    """As GPT-2 and Qwen3 were published: rope_theta beside rope_scaling, no tie_word_embeddings."""
    few = ("model_type", "vocab_size", "n_positions", "n_embd", "n_layer", "n_head")
    ours = fields_of(tmp_path, {name: GPT2_JSON[name] for name in few})
    assert ours["tie_embeddings"] is True
    assert ours["activation"] == "gelu_tanh"
    assert ours["hidden_size"] == 96
    old = {n: v for n, v in QWEN3_JSON.items() if n not in ("rope_parameters", "layer_types")}
    ours = fields_of(tmp_path, old | {"rope_theta": 1000000, "rope_scaling": None})
    assert (ours["rotary_base"], ours["num_kv_heads"], ours["head_size"]) == (1e6, 2, 10)
    assert fields_of(tmp_path, old)["rotary_base"] == 10_000


def test_half_precision_is_imported_as_float32():
    model = random_model(style="modern")
    weights = {name: weight.bfloat16() for name, weight in hf_weights(model).items()}
    ours = gpt_weights(weights, model.config)
    assert {weight.dtype for weight in ours.values()} == {torch.float32}
    assert torch.equal(ours["norm.weight"], model.norm.weight.bfloat16().float())
